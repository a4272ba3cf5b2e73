"""The compiled noise loop: draw, add and round over a run of stored bytes.

It is written once for float32 and once for float64 values and compiled for every stored dtype and
distribution. It works through blocks of values that stay in the L1 cache: words, then coefficients, then the
sum and the rounding. It is written for LLVM's vectoriser: 32-bit words in 64-bit lanes, selects in place of
branches, every integer cast back to its width where Numba would have widened it.

Floating-point contraction is off (Numba's default): c · a and x + c · a are two roundings.

Addresses come as voidptr and are viewed with `carray`, because a loop may not call Numba's runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable
from numba.np.numpy_support import carray

from noisytune_cli.distributions import Distribution
from noisytune_cli.stored import STORED, load_bf16, load_f16, round_bf16, round_f16
from noisytune_cli.stream import M0, M1, MASK, ROUNDS, W0, W1

_MASK, _HIGH = np.uint64(MASK), np.uint64(32)
_M0, _M1, _W0, _W1 = np.uint64(M0), np.uint64(M1), np.uint64(W0), np.uint64(W1)
_U32, _I32, _F32, _F64 = np.uint32, np.int32, np.float32, np.float64
# Numba wraps a negative index, which costs a branch and the vectoriser; an unsigned index it takes as it is.
_INDEX = np.uint64


@register_jitable
def _draw_words(
    words: Any, planes: Any, counter: Any, counters: Any, k0: Any, k1: Any, s0: Any, s1: Any
) -> None:
    """Write the words of `counters` consecutive counters, by way of four planes of scratch.

    A counter's words go to a plane each, and from there to their places: two loops that vectorise well,
    where a single one would have to store every fourth word.
    """
    n = _INDEX(counters)
    for t in range(counters):
        i = counter + np.uint64(t)
        c0, c1, c2, c3, q0, q1 = i & _MASK, i >> _HIGH, s0, s1, k0, k1
        for _ in range(ROUNDS):
            p0, p1 = _M0 * c0, _M1 * c2
            c0, c1 = (p1 >> _HIGH) ^ c1 ^ q0, p1 & _MASK
            c2, c3 = (p0 >> _HIGH) ^ c3 ^ q1, p0 & _MASK
            q0, q1 = (q0 + _W0) & _MASK, (q1 + _W1) & _MASK
        planes[_INDEX(t)] = _U32(c0)
        planes[n + _INDEX(t)] = _U32(c1)
        planes[n + n + _INDEX(t)] = _U32(c2)
        planes[n + n + n + _INDEX(t)] = _U32(c3)
    for t in range(counters):
        words[4 * t] = planes[_INDEX(t)]
        words[4 * t + 1] = planes[n + _INDEX(t)]
        words[4 * t + 2] = planes[n + n + _INDEX(t)]
        words[4 * t + 3] = planes[n + n + n + _INDEX(t)]


# One function a dtype: y[b + i] = x[i] + c[skip + i] · a for i < count, where x is a copy of the block. Each
# returns how many values stayed as they were and the largest magnitude's bits, by which the caller knows
# whether to clamp.


def _add_f32(x: Any, y: Any, b: Any, count: Any, c: Any, skip: Any, a: Any) -> Any:
    for i in range(count):
        y[b + _INDEX(i)] = x[i] + c[skip + _INDEX(i)] * a
    same, largest = _I32(0), _I32(0)
    for i in range(count):
        bits = _F32(y[b + _INDEX(i)]).view(_I32)
        same = _I32(same + _I32(bits == _F32(x[i]).view(_I32)))
        magnitude = _I32(bits & _I32(0x7FFFFFFF))
        largest = magnitude if magnitude > largest else largest
    return same, largest


def _add_f64(x: Any, y: Any, b: Any, count: Any, c: Any, skip: Any, a: Any) -> Any:
    wide = _F64(a)
    for i in range(count):
        y[b + _INDEX(i)] = x[i] + _F64(c[skip + _INDEX(i)]) * wide
    same, largest = np.int64(0), np.int64(0)
    for i in range(count):
        bits = _F64(y[b + _INDEX(i)]).view(np.int64)
        same += np.int64(bits == _F64(x[i]).view(np.int64))
        magnitude = bits & np.int64(0x7FFFFFFFFFFFFFFF)
        largest = magnitude if magnitude > largest else largest
    return same, largest


def _add_half(load: Callable[..., Any], round_to: Callable[..., Any]) -> Callable[..., Any]:
    def add(x: Any, y: Any, b: Any, count: Any, c: Any, skip: Any, a: Any) -> Any:
        same, largest = _I32(0), _I32(0)
        for i in range(count):
            rounded = round_to(_F32(load(x, i) + c[skip + _INDEX(i)] * a))
            same = _I32(same + _I32(rounded == x[i]))
            magnitude = _I32(_I32(rounded) & _I32(0x7FFF))
            largest = magnitude if magnitude > largest else largest
            y[b + _INDEX(i)] = rounded
        return same, largest

    return add


def noise_loop(distribution: Distribution, dtype: str, block: int) -> Callable[..., None]:
    """Build the loop (source, out, n, first, k0, k1, s0, s1, amplitude, w, p, coefficients, held, counts).

    It writes n stored values + noise to `out`, which is the source itself or does not overlap it. `first` is
    the logical index of the first value; `w`, `p`, `coefficients` and `held` are scratch for `block` u32,
    u32, float32 and stored values; `counts` gets i64 [unchanged, clamped].
    """
    for part in (*distribution.PARTS, distribution.fill):
        register_jitable(part)
    fill = distribution.fill
    add = njit(error_model="numpy", inline="always")(
        {
            "F32": _add_f32,
            "F64": _add_f64,
            "BF16": _add_half(load_bf16, round_bf16),
            "F16": _add_half(load_f16, round_f16),
        }[dtype]
    )
    stored = STORED[dtype]
    bits = np.dtype(f"i{np.dtype(stored).itemsize}").type
    infinite = {"F32": 0x7F800000, "F64": 0x7FF0000000000000, "BF16": 0x7F80, "F16": 0x7C00}[dtype]
    magnitude_mask = bits(np.iinfo(bits).max)

    def loop(source, out, n, first, k0, k1, s0, s1, amplitude, w, p, coefficients, held, counts):  # type: ignore[no-untyped-def]
        source_values, y = carray(source, (n,), stored), carray(out, (n,), stored)
        x = carray(held, (block,), stored)
        y_bits = carray(out, (n,), bits)
        words, planes = carray(w, (block,), _U32), carray(p, (block,), _U32)
        c = carray(coefficients, (block,), _F32)
        count = carray(counts, (2,), np.int64)
        counter, skip = first >> np.uint64(2), np.int64(first & np.uint64(3))
        same, clamped, b = np.int64(0), np.int64(0), np.int64(0)
        while b < n:
            m = min(block - skip, n - b)
            _draw_words(words, planes, counter, (skip + m + 3) // 4, k0, k1, s0, s1)
            fill(c, words)
            # From a copy in the L1 cache the sums vectorise, and are right where out is the source.
            for i in range(m):
                x[i] = source_values[_INDEX(b) + _INDEX(i)]
            kept, largest = add(x, y, _INDEX(b), m, c, _INDEX(skip), amplitude)
            if largest >= infinite:
                for i in range(b, b + m):
                    if y_bits[i] & magnitude_mask >= infinite:
                        # One below infinity's bits is the largest finite value; the sign stays.
                        y_bits[i] = bits((y_bits[i] & ~magnitude_mask) | bits(infinite - 1))
                        clamped += 1
                        kept += np.int64(y[i] == x[i - b])
            same += kept
            b += m
            counter += np.uint64(block // 4)
            skip = np.int64(0)
        count[0], count[1] = same, clamped

    return loop
