"""The compiled noise loop: draw, add and round over a run of stored bytes.

It is compiled for every pair of a source's and a target's dtype and every distribution. What `registers.py`
can do is done there. The rest (other dtypes and distributions, a run's last values, values that overflow)
goes through blocks that stay in the L1 cache: words, then coefficients, then the sum and the rounding. That
part is written for LLVM's vectoriser, with selects in place of branches and every integer cast back to its
width where Numba would have widened it.

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
from noisytune_cli.philox_vectors import COUNTERS, WORDS
from noisytune_cli.register_sums import SMALLEST_AMPLITUDE
from noisytune_cli.registers import draw_words, even_noise
from noisytune_cli.stored import (
    INFINITE,
    LOAD,
    NAN,
    ROUND,
    STORED,
    load_bf16,
    load_f16,
    round_bf16,
    round_f16,
)
from noisytune_cli.stream import M0, M1, MASK, ROUNDS, W0, W1
from noisytune_cli.vectors import prefer_wide_vectors

_MASK, _HIGH = np.uint64(MASK), np.uint64(32)
_HIGHEST = np.uint64(2**32)
_TURN = COUNTERS
_M0, _M1, _W0, _W1 = np.uint64(M0), np.uint64(M1), np.uint64(W0), np.uint64(W1)
_U32, _I32, _F32, _F64 = np.uint32, np.int32, np.float32, np.float64
# Numba wraps a negative index, which costs a branch and the vectoriser; an unsigned index it takes as it is.
_INDEX = np.uint64


@register_jitable
def _draw_words(words: Any, counter: Any, counters: Any, k0: Any, k1: Any, s0: Any, s1: Any) -> None:
    """Write the words of `counters` consecutive counters, and perhaps more, as far as `words` has room.

    The room is for a multiple of the words that registers hold, and for these counters at least.
    """
    turns = (counters + (_TURN - 1)) // _TURN
    if (counter & _MASK) + np.uint64(turns * _TURN) <= _HIGHEST:
        draw_words(words, turns, counter, k0, k1, s0, s1)
        return
    for t in range(counters):  # the upper word of the counter changes on the way
        i = counter + np.uint64(t)
        c0, c1, c2, c3, q0, q1 = i & _MASK, i >> _HIGH, s0, s1, k0, k1
        for _ in range(ROUNDS):
            p0, p1 = _M0 * c0, _M1 * c2
            c0, c1 = (p1 >> _HIGH) ^ c1 ^ q0, p1 & _MASK
            c2, c3 = (p0 >> _HIGH) ^ c3 ^ q1, p0 & _MASK
            q0, q1 = (q0 + _W0) & _MASK, (q1 + _W1) & _MASK
        words[4 * t], words[4 * t + 1], words[4 * t + 2], words[4 * t + 3] = (
            _U32(c0),
            _U32(c1),
            _U32(c2),
            _U32(c3),
        )


# One function a pair of dtypes: y[b + i] = x[i] + c[skip + i] · a for i < count, where x is a copy of the
# block. Each returns how many values are what they would be without noise, and the largest magnitude's bits,
# by which the caller knows whether to clamp.


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


def _add_converted(dtype: str, out_dtype: str) -> Callable[..., Any]:
    load, round_to = LOAD[dtype], ROUND[computed_in(dtype), out_dtype]
    wide = _F64 if dtype == "F64" else _F32
    bits = np.int64 if "F64" in (dtype, out_dtype) else _I32
    mask = bits(np.iinfo(_signed(out_dtype)).max)

    def add(x: Any, y: Any, b: Any, count: Any, c: Any, skip: Any, a: Any) -> Any:
        same, largest = bits(0), bits(0)
        for i in range(count):
            value = wide(load(x, i))
            rounded = round_to(wide(value + wide(c[skip + _INDEX(i)]) * wide(a)))
            same = bits(same + bits(rounded == round_to(value)))
            magnitude = bits(bits(rounded) & mask)
            largest = magnitude if magnitude > largest else largest
            y[b + _INDEX(i)] = rounded
        return same, largest

    return add


def computed_in(dtype: str) -> str:
    """Return the dtype that sums of stored values of a dtype are computed in."""
    return "F64" if dtype == "F64" else "F32"


def _signed(dtype: str) -> Any:
    """Return the signed integer type as wide as a dtype."""
    return np.dtype(f"i{np.dtype(STORED[dtype]).itemsize}").type


def _bits(dtype: str) -> Any:
    """Return the unsigned integer type as wide as a dtype."""
    return np.dtype(f"u{np.dtype(STORED[dtype]).itemsize}").type


def _adding(dtype: str, out_dtype: str) -> Callable[..., Any]:
    """Return the function that adds for a pair of dtypes."""
    if dtype != out_dtype:
        return _add_converted(dtype, out_dtype)
    if dtype in ("F32", "F64"):
        return {"F32": _add_f32, "F64": _add_f64}[dtype]
    return _add_half(*{"BF16": (load_bf16, round_bf16), "F16": (load_f16, round_f16)}[dtype])


def _plain(dtype: str, out_dtype: str) -> Callable[..., Any]:
    """Return the function (source values, index) -> the target's stored value without noise."""
    load, round_to = LOAD[dtype], ROUND[computed_in(dtype), out_dtype]

    def same(x: Any, i: Any) -> Any:
        return x[i]

    def converted(x: Any, i: Any) -> Any:
        return round_to(load(x, i))

    return same if dtype == out_dtype else converted


def _in_registers(distribution: Distribution, dtype: str, out_dtype: str) -> Callable[..., Any]:
    """Return the function that adds noise in registers, as far as it can: (turns done, values unchanged)."""
    bits = distribution.EVEN_BITS
    add = even_noise(bits, dtype) if bits is not None and dtype == out_dtype else None
    if add is None:
        return register_jitable(_not_in_registers)

    def fitting(
        x: Any, y: Any, b: Any, count: Any, counter: Any, k0: Any, k1: Any, s0: Any, s1: Any, a: Any
    ) -> Any:
        turns = min(count // WORDS, np.int64((_HIGHEST - (counter & _MASK)) // np.uint64(COUNTERS)))
        if a < SMALLEST_AMPLITUDE:
            turns = np.int64(0)
        return add(x, y, _INDEX(b), turns, counter, k0, k1, s0, s1, a)

    return register_jitable(fitting)


def _not_in_registers(
    x: Any, y: Any, b: Any, count: Any, counter: Any, k0: Any, k1: Any, s0: Any, s1: Any, a: Any
) -> Any:
    return np.int64(0), np.int64(0)


def noise_loop(distribution: Distribution, dtype: str, out_dtype: str, block: int) -> Callable[..., None]:
    """Build the loop (source, out, n, first, k0, k1, s0, s1, amplitude, w, coefficients, held, counts).

    It writes n stored values + noise to `out`, which does not overlap the source, or is the source itself
    where the two dtypes are one. `first` is the logical index of the first value; `w`, `coefficients` and
    `held` are scratch for `block` u32, float32 and stored values, a multiple of WORDS; `counts` gets i64
    [unchanged, clamped].
    """
    assert block % WORDS == 0, "registers write whole turns of words to the scratch"
    for part in (*distribution.PARTS, distribution.fill):
        register_jitable(part)
    fill = distribution.fill
    add = njit(error_model="numpy", inline="always")(_adding(dtype, out_dtype))
    add_in_registers = _in_registers(distribution, dtype, out_dtype)
    plain = register_jitable(_plain(dtype, out_dtype))
    stored = STORED[dtype]
    out_stored = stored if dtype == out_dtype else _bits(out_dtype)
    bits, infinite = _signed(out_dtype), INFINITE[out_dtype]
    magnitude_mask = bits(np.iinfo(bits).max)
    # One below infinity's bits is the largest finite value. A sum computed in float32 stays within its range.
    within = bits(0x47EFFFFFE0000000 if (computed_in(dtype), out_dtype) == ("F32", "F64") else infinite - 1)

    def loop(source, out, n, first, k0, k1, s0, s1, amplitude, w, coefficients, held, counts):  # type: ignore[no-untyped-def]
        prefer_wide_vectors()
        source_values, y = carray(source, (n,), stored), carray(out, (n,), out_stored)
        x = carray(held, (block,), stored)
        y_bits = carray(out, (n,), bits)
        words = carray(w, (block,), _U32)
        c = carray(coefficients, (block,), _F32)
        count = carray(counts, (2,), np.int64)
        counter, skip = first >> np.uint64(2), np.int64(first & np.uint64(3))
        same, clamped, b = np.int64(0), np.int64(0), np.int64(0)
        while b < n:
            if skip == 0:
                turns, kept = add_in_registers(source_values, y, b, n - b, counter, k0, k1, s0, s1, amplitude)
                same += kept
                b += turns * WORDS
                counter += np.uint64(turns * COUNTERS)
                if b == n:
                    break
            m = min(block - skip, n - b)
            _draw_words(words, counter, (skip + m + 3) // 4, k0, k1, s0, s1)
            fill(c, words)
            # From a copy in the L1 cache the sums vectorise, and are right where out is the source.
            for i in range(m):
                x[i] = source_values[_INDEX(b) + _INDEX(i)]
            kept, largest = add(x, y, _INDEX(b), m, c, _INDEX(skip), amplitude)
            if largest >= infinite:
                for i in range(b, b + m):
                    if y_bits[i] & magnitude_mask >= infinite:
                        kept -= np.int64(y[i] == plain(x, i - b))  # of a value that overflows by itself
                        y_bits[i] = bits((y_bits[i] & ~magnitude_mask) | within)  # the sign stays
                        clamped += 1
                        kept += np.int64(y[i] == plain(x, i - b))
            same += kept
            b += m
            counter += np.uint64(block // 4)
            skip = np.int64(0)
        count[0], count[1] = same, clamped

    return loop


def convert_loop(dtype: str, out_dtype: str) -> Callable[..., None]:
    """Build the loop (source, out, n, overflowed): n stored values in another dtype, rounded once.

    Infinities stay, NaNs become the target's one NaN; `overflowed` gets i64 [finite values turned infinite].
    """
    load, round_to = LOAD[dtype], ROUND[computed_in(dtype), out_dtype]
    stored, bits = STORED[dtype], _bits(out_dtype)
    nan, infinite, magnitude_mask = (
        bits(NAN[out_dtype]),
        bits(INFINITE[out_dtype]),
        bits(np.iinfo(bits).max >> 1),
    )

    def loop(source, out, n, overflowed):  # type: ignore[no-untyped-def]
        prefer_wide_vectors()
        x, y, count = (
            carray(source, (n,), stored),
            carray(out, (n,), bits),
            carray(overflowed, (1,), np.int64),
        )
        lost = np.int64(0)
        for i in range(n):
            value = load(x, _INDEX(i))
            rounded = bits(nan if value != value else round_to(value))
            lost += np.int64((bits(rounded & magnitude_mask) == infinite) & (abs(value) < np.inf))
            y[_INDEX(i)] = rounded
        count[0] = lost

    return loop
