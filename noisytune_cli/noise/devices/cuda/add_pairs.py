"""Uniform noise for BF16 and F16 values in Triton, two at a time, in the 32-bit words that hold them.

This is the way of whole tiles, where the number of instructions decides: while an H200 reads and writes two
bytes, it can issue some 27. Its bits are those of the way for all tiles (`noise/devices/cuda/add.py`), to
which it leaves sums that overflow.

A uniform c is k - (2^24 - 1) / 2, k the top 24 bits of a word, times 2^-24. That difference is exact in
float32, and where the amplitude times 2^-24 is exact too, one multiplication gives float32(c · a).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from noisytune_cli.noise.devices.cuda.launch import INTERPRETED, LANES, STEPS, round_bits, upcast
from noisytune_cli.noise.devices.cuda.philox import words

#: How many steps of a tile to unroll, which share what a step costs beside its values.
_UNROLL = tl.constexpr(2)

#: The smallest amplitude whose product with 2^-24 is not subnormal.
SMALLEST_AMPLITUDE = tl.constexpr(2.0**-102)

#: c = (k - MIDDLE) · STEP.
MIDDLE, STEP = tl.constexpr((2**24 - 1) / 2), tl.constexpr(2.0**-24)

#: The least sums that BF16 and F16 round to infinity.
_PAST_BF16, _PAST_F16 = tl.constexpr(2.0**128 - 2.0**119), tl.constexpr(65520.0)

#: A 1, and the largest value, in each half of a word.
_ONES, _MAGNITUDES = tl.constexpr(0x00010001), tl.constexpr(0x7FFF7FFF)


def capability(device: torch.device) -> int:
    """Return the major compute capability whose instructions kernels may name; 0: they may name none."""
    if INTERPRETED or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


@triton.jit
def centred(word):
    """Return c / STEP."""
    return (word >> 8).to(tl.float32) - MIDDLE


@triton.jit
def _rounded(even, odd, dtype: tl.constexpr, capability: tl.constexpr):
    """Return pairs of sums rounded to dtype, nearest-even."""
    if capability < 8:
        return round_bits(even, dtype) | round_bits(odd, dtype) << 16
    # The instruction is named because what the compiler makes of two roundings and a shift is several, and
    # differs with what is around them.
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], tl.uint32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def _different(x, y, capability: tl.constexpr):
    """Return pairs of 0 and 1: whether the halves of x and y differ."""
    d = x ^ y
    if capability < 9:
        return (((d & _MAGNITUDES) + _MAGNITUDES | d) >> 15) & _ONES
    else:
        return tl.inline_asm_elementwise(
            "min.u16x2 $0, $1, $2;", "=r,r,r", [d, _ONES], tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def _noised(pairs, even, odd, scale, dtype: tl.constexpr, capability: tl.constexpr):
    """Return pairs with the noise of two words each, and the sum of their magnitudes."""
    first = upcast(pairs.to(tl.uint16), dtype) + centred(even) * scale
    second = upcast((pairs >> 16).to(tl.uint16), dtype) + centred(odd) * scale
    return _rounded(first, second, dtype, capability), tl.abs(first) + tl.abs(second)


@triton.jit
def add_to_pairs(
    source, values, c0, c1, k0, k1, s0, s1, amplitude, dtype: tl.constexpr, capability: tl.constexpr
):  # fmt: skip
    """Write a whole tile + noise, save counters whose values may overflow; return (changed, left).

    c0 and c1 are the words of the tile's first counter, and no counter's c1 may differ. The amplitude must be
    SMALLEST_AMPLITUDE or more. `changed` elements got other bits; `left` has, for each counter of a step, the
    bits of the steps whose four values were not written.
    """
    counters: tl.constexpr = LANES // 4
    # A counter's four values are two pairs, eight bytes, a row of its thread.
    at = tl.arange(0, counters)[:, None] * 2 + tl.arange(0, 2)[None, :]
    pairs = values.to(tl.pointer_type(tl.uint32)) + at
    before = source.to(tl.pointer_type(tl.uint32)) + at
    scale = amplitude.to(tl.float32) * STEP
    changed, left = tl.zeros([counters], tl.uint32), tl.zeros([counters], tl.uint32)
    steps, following = tl.full([], STEPS, tl.int32), tl.load(before)
    for step in tl.range(STEPS, loop_unroll_factor=_UNROLL):
        place = pairs + step * (LANES // 2)
        x0, x1 = tl.split(following)
        # Under way while this step is worked on; the last step reads the first again, for nothing.
        following = tl.load(before + (step + 1) % steps * (LANES // 2))
        ordinal = tl.arange(0, counters) + step * counters
        w0, w1, w2, w3 = words(c0 + ordinal.to(tl.uint32), c1, k0, k1, s0, s1)
        y0, size0 = _noised(x0, w0, w1, scale, dtype, capability)
        y1, size1 = _noised(x1, w2, w3, scale, dtype, capability)
        # No smaller than any of the four, however it is rounded.
        fits = size0 + size1 < (_PAST_BF16 if dtype == tl.bfloat16 else _PAST_F16)
        tl.store(place, tl.join(y0, y1), fits[:, None])
        differ = _different(x0, y0, capability) + _different(x1, y1, capability)
        changed += tl.where(fits, differ, 0)
        left |= tl.where(fits, 0, 1 << step).to(tl.uint32)
    return tl.sum(((changed & 0xFFFF) + (changed >> 16)).to(tl.int32)), left
