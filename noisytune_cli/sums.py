"""The compiled loops that measure: moments, exact sums and statistics over runs of stored bytes.

Numba's floating-point arithmetic is strict. Only the additions inside one block of BLOCK values may be
reordered, for the vectoriser's sake, and a square may be added without being rounded first; the error bound
in `moments.py` covers every order and both roundings. The sums of blocks are then added with compensation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from noisytune_cli.moments import BLOCK, EXACT_BINS, EXACT_SUMS
from noisytune_cli.stored import LOAD, STORED
from noisytune_cli.vectors import prefer_wide_vectors

_I32, _F32, _F64 = np.int32, np.float32, np.float64
# Numba wraps a negative index, which costs a branch and the vectoriser; an unsigned index it takes as it is.
_INDEX = np.uint64


@njit(error_model="numpy")
def _two_sum(a: Any, b: Any) -> Any:
    """Return a + b and its rounding error (Knuth)."""
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


@njit(error_model="numpy")
def _deviation(value: Any, pivot: Any) -> Any:
    """Return value - pivot in strict arithmetic: reordered, values added first, the bound would be lost."""
    return value - pivot


def moments_loop(dtype: str) -> Callable[..., None]:
    """Build the loop (source, n, out): out gets float64 [pivot, s1 and its low part, s2 and its, finite]."""
    load, stored = LOAD[dtype], STORED[dtype]

    @njit(error_model="numpy", fastmath={"reassoc", "contract"})
    def block_sums(x: Any, b: Any, count: Any) -> Any:
        prefer_wide_vectors()
        s1 = s2 = 0.0
        for i in range(count):
            value = _F64(load(x, _INDEX(b) + _INDEX(i)))
            s1 += value
            s2 += value * value
        return s1, s2

    @njit(error_model="numpy", fastmath={"reassoc", "contract"})
    def block_sums_about(x: Any, b: Any, count: Any, pivot: Any) -> Any:
        prefer_wide_vectors()
        s1 = s2 = 0.0
        for i in range(count):
            d = _deviation(_F64(load(x, _INDEX(b) + _INDEX(i))), pivot)
            s1 += d
            s2 += d * d
        return s1, s2

    def loop(source, n, out):  # type: ignore[no-untyped-def]
        prefer_wide_vectors()
        x, result = carray(source, (n,), stored), carray(out, (6,), np.float64)
        first = min(n, 64)
        total, squares = block_sums(x, 0, first)
        # Zero does as well where values spread wider than their mean is from it, and takes no subtraction.
        pivot = total / first if 2 * total * total > first * squares else 0.0
        s1 = s2 = low1 = low2 = 0.0
        for b in range(0, n, BLOCK):
            count = min(BLOCK, n - b)
            if pivot == 0.0:
                sum1, sum2 = block_sums(x, b, count)
            else:
                sum1, sum2 = block_sums_about(x, b, count, pivot)
            s1, error = _two_sum(s1, sum1)
            low1 += error
            s2, error = _two_sum(s2, sum2)
            low2 += error
        finite = True
        if not np.isfinite(s2):
            # F64 squares can overflow though no value is infinite.
            for i in range(n):
                finite &= np.isfinite(load(x, i))
        result[0], result[1], result[2], result[3], result[4] = pivot, s1, low1, s2, low2
        result[5] = 1.0 if finite else 0.0

    return loop


def exact_loop(dtype: str) -> Callable[..., None]:
    """Build the loop (source, n, sums) that adds n finite values to `moments.new_exact_sums`."""
    load, stored = LOAD[dtype], STORED[dtype]
    low_bits, low_mask = np.int64(27), np.int64((1 << 27) - 1)

    def loop(source, n, sums):  # type: ignore[no-untyped-def]
        prefer_wide_vectors()
        x, total = carray(source, (n,), stored), carray(sums, (EXACT_BINS, EXACT_SUMS), np.int64)
        for i in range(n):
            bits = _F64(load(x, i)).view(np.int64)
            power = (bits >> np.int64(52)) & np.int64(0x7FF)
            m = bits & np.int64((1 << 52) - 1)
            if power > 0:
                m |= np.int64(1 << 52)
            else:
                power = np.int64(1)  # subnormal: the unit is that of power 1, without the leading bit
            h, low = m >> low_bits, m & low_mask
            sign = np.int64(-1) if bits < 0 else np.int64(1)
            total[power, 0] += sign * h
            total[power, 1] += sign * low
            for j, product in ((2, h * h), (4, h * low), (6, low * low)):
                total[power, j] += product >> low_bits
                total[power, j + 1] += product & low_mask

    return loop


def summary_loop(dtype: str) -> Callable[..., None]:
    """Build the loop (source, n, out): out gets float64 [min, max, Σ|x|, zeros, NaNs, infinities]."""
    load, stored = LOAD[dtype], STORED[dtype]
    real: Any
    signed: Any
    real, signed = (_F64, np.int64) if dtype == "F64" else (_F32, _I32)
    magnitude_mask, sign_shift = signed(np.iinfo(signed).max), signed(np.iinfo(signed).bits - 1)
    infinite = signed(real(np.inf).view(signed))
    smallest, largest = signed(np.iinfo(signed).min), signed(np.iinfo(signed).max)

    @njit(error_model="numpy", fastmath={"reassoc", "contract"})
    def block_sum(x: Any, b: Any, count: Any) -> Any:
        s = 0.0
        for i in range(count):
            s += abs(_F64(load(x, _INDEX(b) + _INDEX(i))))
        return s

    @njit(error_model="numpy")
    def block_counts(x: Any, b: Any, count: Any) -> Any:
        low, high, zeros, nans, infinities = largest, smallest, signed(0), signed(0), signed(0)
        for i in range(count):
            bits = real(load(x, _INDEX(b) + _INDEX(i))).view(signed)
            magnitude = signed(bits & magnitude_mask)
            # Integers in the order of the values they stand for, because integer extremes vectorise.
            order = signed(bits ^ signed(signed(bits >> sign_shift) & magnitude_mask))
            low = order if order < low else low
            high = order if order > high else high
            zeros = signed(zeros + signed(magnitude == 0))
            nans = signed(nans + signed(magnitude > infinite))
            infinities = signed(infinities + signed(magnitude == infinite))
        return low, high, zeros, nans, infinities

    @njit(error_model="numpy")
    def value_at(order: Any) -> Any:
        return signed(order ^ signed(signed(order >> sign_shift) & magnitude_mask)).view(real)

    def loop(source, n, out):  # type: ignore[no-untyped-def]
        prefer_wide_vectors()
        x, result = carray(source, (n,), stored), carray(out, (6,), np.float64)
        low, high, total, low_total = np.inf, -np.inf, 0.0, 0.0
        zeros = nans = infinities = np.int64(0)
        for b in range(0, n, BLOCK):
            count = min(BLOCK, n - b)
            lowest, highest, block_zeros, block_nans, block_infinities = block_counts(x, b, count)
            low, high = min(low, _F64(value_at(lowest))), max(high, _F64(value_at(highest)))
            zeros, nans, infinities = zeros + block_zeros, nans + block_nans, infinities + block_infinities
            total, error = _two_sum(total, block_sum(x, b, count))
            low_total += error
        result[0], result[1] = low, high
        result[2] = total + low_total if np.isfinite(total) else total
        result[3], result[4], result[5] = zeros, nans, infinities

    return loop
