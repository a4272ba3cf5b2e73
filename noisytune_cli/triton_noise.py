"""The fused noise kernel: draw, add and round tensors on a CUDA device in place, by Triton.

Values are read once and written once; words and coefficients never leave the registers. The bits are the
reference's: floating-point fusion is off, the rounding to BF16 is done on the integer bits, and Gaussian
coefficients come from the very functions of `distributions/gaussian.py`, whose float64 `+ - * / sqrt` CUDA
rounds as IEEE 754 says. A distribution without a function in `_DRAWS` is left to `torch_kernels`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from noisytune_cli import stream
from noisytune_cli.distributions import gaussian, uniform
from noisytune_cli.triton_tables import (
    AMPLITUDE,
    COUNTER,
    END,
    FIRST_TILE,
    KEY,
    LANES,
    OPTIONS,
    SID,
    SKIP,
    SLOT,
    STEPS,
    TILE,
    Row,
    column,
    launches,
    upcast,
    values_of,
)

_ROUNDS = tl.constexpr(stream.ROUNDS)
_M0, _M1, _W0, _W1 = map(tl.constexpr, (stream.M0, stream.M1, stream.W0, stream.W1))
_ODD, _STEP = tl.constexpr(int(uniform._ODD)), tl.constexpr(float(uniform._STEP))
_SQRT_HALF, _RADIANS = tl.constexpr(int(gaussian._SQRT_HALF)), tl.constexpr(gaussian._RADIANS)
_WORD_STEP = tl.constexpr(2.0**-32)


def _shared(function: Callable[..., Any]) -> Any:
    """Return a function of plain operators, with its module's constants, as one that kernels can call."""
    constants = {k: tl.constexpr(v) for k, v in function.__globals__.items() if isinstance(v, float)}
    # Beside its constants a kernel has to see triton's language, and the module that it is from.
    visible = {"tl": tl, "Any": tl.constexpr(None), "__name__": function.__module__, **constants}
    return triton.jit(types.FunctionType(function.__code__, visible, function.__name__))


_minus_two_ln, _turned = _shared(gaussian.minus_two_ln), _shared(gaussian.turned)


@triton.jit
def _words(counter, k0, k1, s0, s1):
    """Return the four u32 words of each u64 counter."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + s0, tl.zeros_like(c0) + s1
    for _ in tl.static_range(_ROUNDS):
        # One wide multiplication each, where umulhi beside a product would be two.
        p0, p1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _centred(word):
    return ((word >> 8).to(tl.int32) * 2 - _ODD).to(tl.float32) * _STEP


@triton.jit
def _uniform(w0, w1, w2, w3):
    """Return the coefficients of a counter's four words, as `uniform.coefficients`."""
    return _centred(w0), _centred(w1), _centred(w2), _centred(w3)


@triton.jit
def _pair(word, turn_word):
    u = (word.to(tl.float64) + 0.5) * _WORD_STEP
    bits = u.to(tl.int64, bitcast=True)
    k = (bits - _SQRT_HALF) >> 52
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    length = tl.sqrt(_minus_two_ln(k.to(tl.float64), m))
    turn = turn_word.to(tl.int64)
    q = (turn + (1 << 29)) >> 30
    x = ((turn - (q << 30)).to(tl.float64) + 0.5) * _RADIANS
    odd = (q & 1).to(tl.float64)
    cos, sin = _turned(x, odd, (1 - ((q + 1) & 2)).to(tl.float64), (1 - (q & 2)).to(tl.float64))
    return (length * cos).to(tl.float32), (length * sin).to(tl.float32)


@triton.jit
def _gaussian(w0, w1, w2, w3):
    """Return the coefficients of a counter's four words, as `gaussian.coefficients`."""
    c0, c1 = _pair(w0, w1)
    c2, c3 = _pair(w2, w3)
    return c0, c1, c2, c3


#: The function of each distribution, and how many steps of a tile to unroll. For Gaussian noise float64 sets
#: the pace: there several loads under way at once would gain nothing and take long to compile.
_DRAWS = {"uniform": (_uniform, 4), "gaussian": (_gaussian, 1)}


@triton.jit
def _round(y, dtype: tl.constexpr):
    """Return the bits of sums rounded to dtype, nearest-even, in u32 or u64; infinity past its range."""
    if dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    elif dtype == tl.float16:
        return y.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    elif dtype == tl.float32:
        return y.to(tl.uint32, bitcast=True)
    else:
        return y.to(tl.uint64, bitcast=True)


@triton.jit
def _noise_tile(
    values, begin, end, counter, k0, k1, s0, s1, amplitude, counts,
    draw: tl.constexpr, unroll: tl.constexpr, whole: tl.constexpr,
    dtype: tl.constexpr, bits_type: tl.constexpr, infinity: tl.constexpr,
):  # fmt: skip
    """Add noise to elements begin … end - 1 of a tile, whole if that is all, and count them."""
    changed, clamped = tl.zeros([LANES], tl.uint32), tl.zeros([LANES], tl.uint32)
    sign_bit: tl.constexpr = bits_type.primitive_bitwidth - 1
    magnitude: tl.constexpr = (1 << sign_bit) - 1
    to_sign_bit: tl.constexpr = (1 << sign_bit) - infinity
    for step in tl.range(STEPS, loop_unroll_factor=unroll):
        at = step * LANES + tl.arange(0, LANES)
        mask = None if whole else (at >= begin) & (at < end)
        before = tl.load(values + at, mask)
        c0, c1, c2, c3 = draw(
            *_words(counter + (step * (LANES // 4) + tl.arange(0, LANES // 4)), k0, k1, s0, s1)
        )
        c = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
        x = upcast(before, dtype)
        bits = _round(x + c.to(x.dtype) * amplitude.to(x.dtype), dtype)
        # Counted in arithmetic: as comparisons these would need more predicates than there are.
        infinite = ((bits & magnitude) + to_sign_bit) >> sign_bit
        # One below infinity's bits is the largest finite value; the sign is a bit of its own.
        bits -= infinite
        different = tl.minimum(bits ^ before.to(bits.dtype), 1)
        if not whole:
            infinite, different = tl.where(mask, infinite, 0), tl.where(mask, different, 0)
        changed += different.to(tl.uint32)
        clamped += infinite.to(tl.uint32)
        tl.store(values + at, bits.to(bits_type), mask)
    unchanged = (end - begin - tl.sum(changed).to(tl.int32)).to(tl.int64)
    clamped = tl.sum(clamped).to(tl.int64)
    tl.atomic_add(counts, unchanged, mask=unchanged > 0, sem="relaxed")
    tl.atomic_add(counts + 1, clamped, mask=clamped > 0, sem="relaxed")


@triton.jit
def _add_noise(
    table, owners, counts, draw: tl.constexpr, unroll: tl.constexpr,
    dtype: tl.constexpr, bits_type: tl.constexpr, infinity: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Add noise to this program's tile, and its (unchanged, clamped) to the tensor's."""
    tensor = tl.load(owners + tl.program_id(0))
    start = (tl.program_id(0) - column(table, tensor, FIRST_TILE)) * TILE
    begin = tl.maximum(column(table, tensor, SKIP) - start, 0).to(tl.int32)
    end = tl.minimum(column(table, tensor, END) - start, TILE).to(tl.int32)
    counter = (column(table, tensor, COUNTER) + start // 4).to(tl.uint64, bitcast=True)
    key, sid = column(table, tensor, KEY), column(table, tensor, SID)
    k0, k1, s0, s1 = (
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
        sid.to(tl.uint32),
        (sid >> 32).to(tl.uint32),
    )
    amplitude = column(table, tensor, AMPLITUDE).to(tl.float64, bitcast=True)
    # Four elements are a counter's: in wider accesses noise would have to change its place among threads.
    values = values_of(table, tensor, bits_type, bits_type.primitive_bitwidth // 2 if aligned else 1) + start
    count = counts + 2 * column(table, tensor, SLOT)
    if (begin == 0) & (end == TILE):  # what is not masked is loaded and stored in wide accesses
        _noise_tile(
            values, begin, end, counter, k0, k1, s0, s1, amplitude, count,
            draw, unroll, True, dtype, bits_type, infinity,
        )  # fmt: skip
    else:
        _noise_tile(
            values, begin, end, counter, k0, k1, s0, s1, amplitude, count,
            draw, 1, False, dtype, bits_type, infinity,
        )  # fmt: skip


def offers(distribution: str) -> bool:
    """Say whether the kernel can draw from a distribution."""
    return distribution in _DRAWS


def add_noise(rows: Sequence[Row], distribution: str) -> Tensor:
    """Add noise in place to tensors of one device, each [n], contiguous, finite and not empty, without grad.

    Returns [rows, 2] int64 (unchanged, clamped) elements on the device; nothing waits for it.
    """
    counts = torch.zeros((len(rows), 2), dtype=torch.int64, device=rows[0].values.device)
    draw, unroll = _DRAWS[distribution]
    for launch in launches(rows):
        _add_noise[(launch.tiles,)](
            launch.table, launch.owners, counts, draw=draw, unroll=unroll, **launch.kind, **OPTIONS
        )
    return counts
