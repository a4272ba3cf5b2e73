"""The fused moments: sums of tensors on a CUDA device about their pivots, in one read, by Triton.

Each program sums one tile in float64; a second kernel adds the tiles of each tensor with compensation. The
sums of a tile are chains of at most 2 STEPS + LANES / 2 additions, in whatever order Triton takes them, which
is within `moments.RELATIVE_ERROR`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from noisytune_cli.noise.devices.cuda.launch import (
    ALIGNMENT,
    END,
    FIRST_TILE,
    LANES,
    OPTIONS,
    SLOT,
    STEPS,
    TILE,
    TILES,
    Row,
    column,
    launches,
    upcast,
    values_of,
)
from noisytune_cli.noise.devices.torch.operations import PIVOT_VALUES, SUMS

_PIVOT_VALUES, _SUMS, _PARTIALS = tl.constexpr(PIVOT_VALUES), tl.constexpr(SUMS), tl.constexpr(3)
_FOLDS = tl.constexpr(LANES.value.bit_length() - 1)

#: Chains of additions in a tile, and how many steps of it to load at a time.
_CHAINS, _UNROLL = tl.constexpr(LANES.value // 2), tl.constexpr(4)


@triton.jit
def _find_pivot(table, sums, dtype: tl.constexpr, bits_type: tl.constexpr):
    """Write the mean of the first values of this program's tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    end, at = column(table, tensor, END), tl.arange(0, _PIVOT_VALUES)
    bits = tl.load(values_of(table, tensor, bits_type, 1) + at, at < end, other=0)
    total = tl.sum(upcast(bits, dtype).to(tl.float64))
    pivot = total / tl.minimum(end, _PIVOT_VALUES).to(tl.float64)
    tl.store(sums + column(table, tensor, SLOT) * _SUMS, pivot)


@triton.jit
def _tile_sums(
    values, start, end, pivot, unroll: tl.constexpr, whole: tl.constexpr,
    dtype: tl.constexpr, bits_type: tl.constexpr, infinity: tl.constexpr,
):  # fmt: skip
    """Return Σd and Σd² of a tile, d = x - pivot, and how many F64 values are not finite."""
    first, second = tl.zeros([_CHAINS], tl.float64), tl.zeros([_CHAINS], tl.float64)
    wild = tl.zeros([LANES], tl.int32)
    steps = STEPS if whole else tl.cdiv((end - start).to(tl.int32), LANES)
    for step in tl.range(steps, loop_unroll_factor=unroll):
        at = start + step * LANES + tl.arange(0, LANES)
        if whole:
            bits = tl.load(values + at)
            d = upcast(bits, dtype).to(tl.float64) - pivot
        else:
            bits = tl.load(values + at, at < end, other=0)
            d = tl.where(at < end, upcast(bits, dtype).to(tl.float64) - pivot, 0.0)
        # Neighbours share a chain, because registers for one each would leave too few threads under way.
        d0, d1 = tl.split(tl.reshape(d, [_CHAINS, 2]))
        first += d0 + d1
        second = tl.fma(d1, d1, tl.fma(d0, d0, second))
        if dtype == tl.float64:  # the squares of the others cannot overflow, so that their sum tells
            wild += ((bits & infinity) == infinity).to(tl.int32)
    return tl.sum(first), tl.sum(second), tl.sum(wild)


@triton.jit
def _sum_tiles(
    table, owners, sums, partials,
    dtype: tl.constexpr, bits_type: tl.constexpr, infinity: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Write the sums of this program's tile."""
    tensor = tl.load(owners + tl.program_id(0))
    start = (tl.program_id(0) - column(table, tensor, FIRST_TILE)) * TILE
    end, pivot = column(table, tensor, END), tl.load(sums + column(table, tensor, SLOT) * _SUMS)
    values = values_of(table, tensor, bits_type, ALIGNMENT if aligned else 1)
    if start + TILE <= end:
        first, second, wild = _tile_sums(values, start, end, pivot, _UNROLL, True, dtype, bits_type, infinity)
    else:
        first, second, wild = _tile_sums(values, start, end, pivot, 1, False, dtype, bits_type, infinity)
    partial = partials + tl.program_id(0).to(tl.int64) * _PARTIALS
    tl.store(partial, first)
    tl.store(partial + 1, second)
    tl.store(partial + 2, wild.to(tl.float64))


@triton.jit
def _two_sum(a, b):
    """Return a + b and its rounding error (Knuth)."""
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


@triton.jit
def _fold(high, low):
    """Return the sum of [LANES] unevaluated sums as one, neighbours first."""
    for _ in tl.static_range(_FOLDS):
        left, right = tl.split(tl.reshape(high, [high.shape[0] // 2, 2]))
        low_left, low_right = tl.split(tl.reshape(low, [low.shape[0] // 2, 2]))
        high, error = _two_sum(left, right)
        low = low_left + low_right + error
    return tl.sum(high), tl.sum(low)  # of one value each


@triton.jit
def _add_up(table, partials, sums, wide: tl.constexpr):
    """Write the compensated sums over the tiles of this program's tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    first_tile, tiles = column(table, tensor, FIRST_TILE), column(table, tensor, TILES)
    s1, s2 = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    low1, low2 = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    wild = tl.zeros([LANES], tl.float64)
    for begin in range(0, tiles, LANES):
        at = begin + tl.arange(0, LANES)
        partial, mask = partials + (first_tile + at) * _PARTIALS, at < tiles
        s1, error = _two_sum(s1, tl.load(partial, mask, other=0.0))
        low1 += error
        s2, error = _two_sum(s2, tl.load(partial + 1, mask, other=0.0))
        low2 += error
        wild += tl.load(partial + 2, mask, other=0.0)
    s1, low1 = _fold(s1, low1)
    s2, low2 = _fold(s2, low2)
    finite = tl.sum(wild) == 0.0 if wide else s2 < float("inf")
    row = sums + column(table, tensor, SLOT) * _SUMS
    tl.store(row + 1, finite.to(tl.float64))
    tl.store(row + 2, s1)
    tl.store(row + 3, s2)
    tl.store(row + 4, low1)
    tl.store(row + 5, low2)


def sums(values: Sequence[Tensor]) -> Tensor:
    """Return float64 [tensors, SUMS] of tensors of one device, each contiguous and not empty.

    The columns are those of `operations.sums`. Nothing waits for the result.
    """
    device = values[0].device
    found = torch.empty((len(values), SUMS), dtype=torch.float64, device=device)
    for launch in launches([Row(v) for v in values]):
        partials = torch.empty((launch.tiles, _PARTIALS.value), dtype=torch.float64, device=device)
        dtype, bits = launch.constants["dtype"], launch.constants["bits_type"]
        _find_pivot[(launch.tensors,)](launch.table, found, dtype=dtype, bits_type=bits, **OPTIONS)
        _sum_tiles[(launch.tiles,)](
            launch.table, launch.owners, found, partials, **launch.constants, **OPTIONS
        )
        _add_up[(launch.tensors,)](launch.table, partials, found, wide=dtype == tl.float64, **OPTIONS)
    return found
