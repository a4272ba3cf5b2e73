"""The compiled loops: noise, moments, exact sums and statistics over runs of stored bytes.

Each loop is written once for float32 or float64 values and compiled for every stored dtype and distribution.
It works through blocks of BLOCK values that stay in the L1 cache: words, then coefficients, then the sum and
the rounding. The loops are written for LLVM's vectoriser: 32-bit words in 64-bit lanes, selects in place of
branches, half precisions converted on the integer bits (which needs no hardware support and is the same on
all), every integer cast back to its width where Numba would have widened it.

Floating-point contraction is off (Numba's default): c · a and x + c · a are two roundings. Only the sums of
one block of moments may be reordered, and the error bound in `moments.py` covers every order.

Addresses come as voidptr and are viewed with `carray`, because a loop may not call Numba's runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit
from numba.extending import register_jitable

from noisytune_cli.distributions import Distribution
from noisytune_cli.moments import BLOCK, EXACT_BINS, EXACT_SUMS
from noisytune_cli.stream import M0, M1, MASK, ROUNDS, W0, W1

_MASK, _HIGH = np.uint64(MASK), np.uint64(32)
_M0, _M1, _W0, _W1 = np.uint64(M0), np.uint64(M1), np.uint64(W0), np.uint64(W1)
_U16, _U32, _I32 = np.uint16, np.uint32, np.int32
_F32, _F64 = np.float32, np.float64
# Numba wraps a negative index, which costs a branch and the vectoriser; an unsigned index it takes as it is.
_INDEX = np.uint64

#: What scales the bits of a half shifted into a float32 to its value, infinities excepted.
_HALF_SCALE = _F32(2.0**112)

#: NumPy's view of each dtype's stored values; BF16 and F16 are handled as bits.
STORED = {"F32": np.float32, "F64": np.float64, "BF16": np.uint16, "F16": np.uint16}


@register_jitable
def _load_f32(stored: Any, i: Any) -> Any:
    return stored[i]


@register_jitable
def _load_bf16(stored: Any, i: Any) -> Any:
    return _U32(_U32(stored[i]) << _U32(16)).view(_F32)


@register_jitable
def _load_f16(stored: Any, i: Any) -> Any:
    half = _U32(stored[i])
    magnitude = _U32(half & _U32(0x7FFF))
    value = _U32(magnitude << _U32(13)).view(_F32) * _HALF_SCALE
    value = _F32(np.inf) if magnitude >= _U32(0x7C00) else value
    return -value if half >= _U32(0x8000) else value


_LOAD = {"F32": _load_f32, "F64": _load_f32, "BF16": _load_bf16, "F16": _load_f16}


@register_jitable
def _round_bf16(y: Any) -> Any:
    bits = _F32(y).view(_U32)
    even = _U32(_U32(bits >> _U32(16)) & _U32(1))
    return _U16(_U32(bits + _U32(0x7FFF) + even) >> _U32(16))


@register_jitable
def _round_f16(y: Any) -> Any:
    bits = _F32(y).view(_U32)
    sign = _U32(_U32(bits >> _U32(16)) & _U32(0x8000))
    magnitude = _U32(bits & _U32(0x7FFFFFFF))
    even = _U32(_U32(magnitude >> _U32(13)) & _U32(1))
    normal = _U32(_U32(_U32(magnitude + _U32(0xFFF) + even) >> _U32(13)) - _U32(112 << 10))
    # Adding 1/2 lines a subnormal half's last bit up with a float32's, so the addition does the rounding.
    subnormal = _U32(_F32(abs(y) + _F32(0.5)).view(_U32) - _U32(0x3F000000))
    rounded = subnormal if magnitude < _U32(0x38800000) else normal
    rounded = _U32(0x7C00) if magnitude >= _U32(0x47800000) else rounded
    return _U16(rounded | sign)


@register_jitable
def _draw_words(words: Any, counter: Any, counters: Any, k0: Any, k1: Any, s0: Any, s1: Any) -> None:
    """Write the words of `counters` consecutive counters."""
    for t in range(counters):
        i = counter + np.uint64(t)
        c0, c1, c2, c3, q0, q1 = i & _MASK, i >> _HIGH, s0, s1, k0, k1
        for _ in range(ROUNDS):
            p0, p1 = _M0 * c0, _M1 * c2
            c0, c1 = (p1 >> _HIGH) ^ c1 ^ q0, p1 & _MASK
            c2, c3 = (p0 >> _HIGH) ^ c3 ^ q1, p0 & _MASK
            q0, q1 = (q0 + _W0) & _MASK, (q1 + _W1) & _MASK
        words[4 * t] = _U32(c0)
        words[4 * t + 1] = _U32(c1)
        words[4 * t + 2] = _U32(c2)
        words[4 * t + 3] = _U32(c3)


# One function a dtype: out[b + i] = source[b + i] + c[skip + i] · a for i < count. Each returns how many
# values stayed as they were and the largest magnitude's bits, by which the caller knows whether to clamp.


def _add_f32(x: Any, y: Any, b: Any, count: Any, c: Any, skip: Any, a: Any) -> Any:
    for i in range(count):
        y[b + _INDEX(i)] = x[b + _INDEX(i)] + c[skip + _INDEX(i)] * a
    same, largest = _I32(0), _I32(0)
    for i in range(count):
        bits = _F32(y[b + _INDEX(i)]).view(_I32)
        same = _I32(same + _I32(bits == _F32(x[b + _INDEX(i)]).view(_I32)))
        magnitude = _I32(bits & _I32(0x7FFFFFFF))
        largest = magnitude if magnitude > largest else largest
    return same, largest


def _add_f64(x: Any, y: Any, b: Any, count: Any, c: Any, skip: Any, a: Any) -> Any:
    wide = _F64(a)
    for i in range(count):
        y[b + _INDEX(i)] = x[b + _INDEX(i)] + _F64(c[skip + _INDEX(i)]) * wide
    same, largest = np.int64(0), np.int64(0)
    for i in range(count):
        bits = _F64(y[b + _INDEX(i)]).view(np.int64)
        same += np.int64(bits == _F64(x[b + _INDEX(i)]).view(np.int64))
        magnitude = bits & np.int64(0x7FFFFFFFFFFFFFFF)
        largest = magnitude if magnitude > largest else largest
    return same, largest


def _add_half(load: Callable[..., Any], round_to: Callable[..., Any]) -> Callable[..., Any]:
    def add(x: Any, y: Any, b: Any, count: Any, c: Any, skip: Any, a: Any) -> Any:
        same, largest = _I32(0), _I32(0)
        for i in range(count):
            rounded = round_to(_F32(load(x, b + _INDEX(i)) + c[skip + _INDEX(i)] * a))
            same = _I32(same + _I32(rounded == x[b + _INDEX(i)]))
            magnitude = _I32(_I32(rounded) & _I32(0x7FFF))
            largest = magnitude if magnitude > largest else largest
            y[b + _INDEX(i)] = rounded
        return same, largest

    return add


def noise_loop(distribution: Distribution, dtype: str, block: int) -> Callable[..., None]:
    """Build the loop (source, out, n, first, k0, k1, s0, s1, amplitude, w, coefficients, counts).

    It writes n stored values + noise to `out`, which must not overlap the source. `first` is the logical
    index of the first value; `w` and `coefficients` are scratch for `block` u32 and float32; `counts` gets
    i64 [unchanged, clamped].
    """
    for part in (*distribution.PARTS, distribution.fill):
        register_jitable(part)
    fill = distribution.fill
    add = njit(error_model="numpy", inline="always")(
        {
            "F32": _add_f32,
            "F64": _add_f64,
            "BF16": _add_half(_load_bf16, _round_bf16),
            "F16": _add_half(_load_f16, _round_f16),
        }[dtype]
    )
    stored = STORED[dtype]
    bits = np.dtype(f"i{np.dtype(stored).itemsize}").type
    infinite = {"F32": 0x7F800000, "F64": 0x7FF0000000000000, "BF16": 0x7F80, "F16": 0x7C00}[dtype]
    magnitude_mask = bits(np.iinfo(bits).max)

    def loop(source, out, n, first, k0, k1, s0, s1, amplitude, w, coefficients, counts):  # type: ignore[no-untyped-def]
        x, y = carray(source, (n,), stored), carray(out, (n,), stored)
        y_bits = carray(out, (n,), bits)
        words, c = carray(w, (block,), _U32), carray(coefficients, (block,), _F32)
        count = carray(counts, (2,), np.int64)
        counter, skip = first >> np.uint64(2), np.int64(first & np.uint64(3))
        same, clamped, b = np.int64(0), np.int64(0), np.int64(0)
        while b < n:
            m = min(block - skip, n - b)
            _draw_words(words, counter, (skip + m + 3) // 4, k0, k1, s0, s1)
            fill(c, words)
            kept, largest = add(x, y, _INDEX(b), m, c, _INDEX(skip), amplitude)
            if largest >= infinite:
                for i in range(b, b + m):
                    if y_bits[i] & magnitude_mask >= infinite:
                        # One below infinity's bits is the largest finite value; the sign stays.
                        y_bits[i] = bits((y_bits[i] & ~magnitude_mask) | bits(infinite - 1))
                        clamped += 1
                        kept += np.int64(y[i] == x[i])
            same += kept
            b += m
            counter += np.uint64(block // 4)
            skip = np.int64(0)
        count[0], count[1] = same, clamped

    return loop


@njit(error_model="numpy")
def _two_sum(a: Any, b: Any) -> Any:
    """Return a + b and its rounding error (Knuth)."""
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


def moments_loop(dtype: str) -> Callable[..., None]:
    """Build the loop (source, n, out): out gets float64 [pivot, s1, its low part, s2, its low part, finite]."""
    load, stored = _LOAD[dtype], STORED[dtype]

    @njit(error_model="numpy", fastmath={"reassoc"})
    def block_sums(x: Any, b: Any, count: Any, pivot: Any) -> Any:
        s1 = s2 = 0.0
        for i in range(count):
            d = _F64(load(x, _INDEX(b) + _INDEX(i))) - pivot
            s1 += d
            s2 += d * d
        return s1, s2

    def loop(source, n, out):  # type: ignore[no-untyped-def]
        x, result = carray(source, (n,), stored), carray(out, (6,), np.float64)
        first = min(n, 64)
        pivot, _ = block_sums(x, 0, first, 0.0)
        pivot /= first
        s1 = s2 = low1 = low2 = 0.0
        for b in range(0, n, BLOCK):
            sum1, sum2 = block_sums(x, b, min(BLOCK, n - b), pivot)
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
    load, stored = _LOAD[dtype], STORED[dtype]
    low_bits, low_mask = np.int64(27), np.int64((1 << 27) - 1)

    def loop(source, n, sums):  # type: ignore[no-untyped-def]
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
    load, stored = _LOAD[dtype], STORED[dtype]

    @njit(error_model="numpy", fastmath={"reassoc"})
    def block_sum(x: Any, b: Any, count: Any) -> Any:
        s = 0.0
        for i in range(count):
            s += abs(_F64(load(x, _INDEX(b) + _INDEX(i))))
        return s

    def loop(source, n, out):  # type: ignore[no-untyped-def]
        x, result = carray(source, (n,), stored), carray(out, (6,), np.float64)
        low, high, total, error_sum = np.inf, -np.inf, 0.0, 0.0
        zeros = nans = infinities = np.int64(0)
        for b in range(0, n, BLOCK):
            count = min(BLOCK, n - b)
            for i in range(count):
                value = _F64(load(x, _INDEX(b) + _INDEX(i)))
                low = value if value < low else low
                high = value if value > high else high
                zeros += np.int64(value == 0.0)
                nans += np.int64(value != value)
                infinities += np.int64(abs(value) == np.inf)
            total, error = _two_sum(total, block_sum(x, b, count))
            error_sum += error
        result[0], result[1], result[2] = low, high, total + error_sum
        result[3], result[4], result[5] = zeros, nans, infinities

    return loop
