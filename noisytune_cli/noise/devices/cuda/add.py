"""The fused noise kernels: draw, add and round tensors on a CUDA device, by Triton.

Values are read once and written once; words and coefficients never leave the registers. The bits are the
reference's: floating-point fusion is off, and sums are rounded to BF16 on their integer bits (in
`add_pairs.py`, by the GPU's own instruction). The kernel here is that of one term; `mix.py` has the other. A
distribution without a function in `DRAWS` is left to torch's `operations`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from noisytune_cli.noise.devices.cuda import mix
from noisytune_cli.noise.devices.cuda.add_pairs import SMALLEST_AMPLITUDE, add_to_pairs, capability
from noisytune_cli.noise.devices.cuda.draws import DRAWS, in_order
from noisytune_cli.noise.devices.cuda.launch import (
    AMPLITUDE,
    KEY,
    LANES,
    OPTIONS,
    SID,
    SLOT,
    SOURCE,
    STEPS,
    TILE,
    Row,
    column,
    launches,
    round_bits,
    tile_of,
    upcast,
    values_of,
    word,
)
from noisytune_cli.noise.devices.cuda.philox import words

#: Steps of a tile to unroll, and whether `add_pairs.py` does it. For Gaussian noise float64 sets the pace:
#: there several loads under way at once would gain nothing and take long to compile.
_WAYS = {"uniform": (2, True), "gaussian": (1, False)}


@triton.jit
def _noise_tile(
    source, values, begin, end, left, counter, k0, k1, s0, s1, amplitude,
    draw: tl.constexpr, unroll: tl.constexpr, whole: tl.constexpr,
    dtype: tl.constexpr, bits_type: tl.constexpr, infinity: tl.constexpr,
):  # fmt: skip
    """Write a tile + noise, all of it if it is `whole`; return (changed, clamped) elements.

    Of one that is not, elements begin … end - 1 are written whose counter has the bit of its step in `left`.
    """
    counters: tl.constexpr = LANES // 4
    changed, clamped = tl.zeros([LANES], tl.uint32), tl.zeros([LANES], tl.uint32)
    sign_bit: tl.constexpr = bits_type.primitive_bitwidth - 1
    magnitude: tl.constexpr = (1 << sign_bit) - 1
    to_sign_bit: tl.constexpr = (1 << sign_bit) - infinity
    steps = STEPS if whole else tl.cdiv(end, LANES)
    for step in tl.range(steps, loop_unroll_factor=unroll):
        at = step * LANES + tl.arange(0, LANES)
        if whole:
            mask = None
        else:
            wanted = tl.broadcast_to((left >> step)[:, None], [counters, 4])
            mask = (at >= begin) & (at < end) & ((tl.reshape(wanted, [LANES]) & 1) != 0)
        before = tl.load(source + at, mask)
        here = counter + (tl.arange(0, counters) + step * counters)
        c = in_order(*draw(*words(here.to(tl.uint32), (here >> 32).to(tl.uint32), k0, k1, s0, s1)))
        x = upcast(before, dtype)
        bits = round_bits(x + c.to(x.dtype) * amplitude.to(x.dtype), dtype)
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
    return tl.sum(changed).to(tl.int32), tl.sum(clamped).to(tl.int32)


@triton.jit
def _add_noise(
    table, owners, counts,
    draw: tl.constexpr, unroll: tl.constexpr, even: tl.constexpr, capability: tl.constexpr,
    in_place: tl.constexpr,
    dtype: tl.constexpr, bits_type: tl.constexpr, infinity: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Write this program's tile + noise, and add its (unchanged, clamped) to the tensor's."""
    tensor, start, begin, end, counter = tile_of(table, owners)
    k0, k1 = word(table, tensor, KEY, 0), word(table, tensor, KEY, 1)
    s0, s1 = word(table, tensor, SID, 0), word(table, tensor, SID, 1)
    amplitude = column(table, tensor, AMPLITUDE).to(tl.float64, bitcast=True)
    # Four elements are a counter's: in wider accesses noise would have to change its place among threads.
    alignment: tl.constexpr = bits_type.primitive_bitwidth // 2 if aligned else 1
    values = values_of(table, tensor, bits_type, alignment) + start
    source = values if in_place else values_of(table, tensor, bits_type, alignment, SOURCE) + start
    whole = (begin == 0) & (end == TILE)
    left = tl.full([LANES // 4], 0xFFFFFFFF, tl.uint32)
    if even and aligned and bits_type.primitive_bitwidth == 16:
        changed, clamped = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        if whole & (amplitude >= SMALLEST_AMPLITUDE) & (c0 <= 2**32 - TILE // 4):
            changed, left = add_to_pairs(source, values, c0, c1, k0, k1, s0, s1, amplitude, dtype, capability)
        if tl.max(left) > 0:
            more, clamped = _noise_tile(
                source, values, begin, end, left, counter, k0, k1, s0, s1, amplitude,
                draw, 1, False, dtype, bits_type, infinity,
            )  # fmt: skip
            changed += more
    elif whole:  # what is not masked is loaded and stored in wide accesses
        changed, clamped = _noise_tile(
            source, values, begin, end, left, counter, k0, k1, s0, s1, amplitude,
            draw, unroll, True, dtype, bits_type, infinity,
        )  # fmt: skip
    else:
        changed, clamped = _noise_tile(
            source, values, begin, end, left, counter, k0, k1, s0, s1, amplitude,
            draw, 1, False, dtype, bits_type, infinity,
        )  # fmt: skip
    unchanged, count = end - begin - changed, counts + 2 * column(table, tensor, SLOT)
    tl.atomic_add(count, unchanged.to(tl.int64), mask=unchanged > 0, sem="relaxed")
    tl.atomic_add(count + 1, clamped.to(tl.int64), mask=clamped > 0, sem="relaxed")


def offers(distribution: str) -> bool:
    """Say whether the kernels can draw from a distribution."""
    return distribution in DRAWS


def add_noise(rows: Sequence[Row]) -> Tensor:
    """Write values + noise to tensors of one device, each contiguous, finite and not empty, without grad.

    Returns [rows, 2] int64 (unchanged, clamped) elements on the device; nothing waits for it.
    """
    device = rows[0].values.device
    counts = torch.zeros((len(rows), 2), dtype=torch.int64, device=device)
    for launch in launches(rows):
        if not launch.kind.is_single:
            mix.mix(launch, counts)
            continue
        unroll, even = _WAYS[launch.kind.distribution]
        how = {"draw": DRAWS[launch.kind.distribution], "unroll": unroll, "even": even}
        how |= {"capability": capability(device), "in_place": launch.kind.in_place}
        _add_noise[(launch.tiles,)](launch.table, launch.owners, counts, **how, **launch.constants, **OPTIONS)
    return counts
