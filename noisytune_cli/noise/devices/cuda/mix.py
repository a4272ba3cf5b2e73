"""The fused kernel of noise that is more than one term, or goes to shrunk values: kept · x + Σ c_k · a_k.

However many terms there are, values are read once and written once: the terms of a step are added up in the
registers.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from noisytune_cli.noise.devices.cuda.draws import DRAWS, in_order
from noisytune_cli.noise.devices.cuda.launch import (
    AMPLITUDE,
    END_TERM,
    FIRST_TERM,
    KEPT,
    KEY,
    LANES,
    OPTIONS,
    SID,
    SLOT,
    SOURCE,
    TERM_COLUMNS,
    TILE,
    Launch,
    column,
    round_bits,
    tile_of,
    upcast,
    values_of,
    word,
)
from noisytune_cli.noise.devices.cuda.philox import words


@triton.jit
def _mix_tile(
    source, values, begin, end, counter, terms, first, last, kept,
    draw: tl.constexpr, whole: tl.constexpr,
    dtype: tl.constexpr, bits_type: tl.constexpr, infinity: tl.constexpr,
):  # fmt: skip
    """Write elements begin … end - 1 of a tile, all if it is `whole`; return (unchanged, clamped) of them."""
    counters: tl.constexpr = LANES // 4
    magnitude: tl.constexpr = (1 << (bits_type.primitive_bitwidth - 1)) - 1
    unchanged, clamped = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32)
    for step in tl.range(tl.cdiv(end, LANES)):
        at = step * LANES + tl.arange(0, LANES)
        # What is not masked is loaded and stored in wide accesses.
        mask = None if whole else (at >= begin) & (at < end)
        x = upcast(tl.load(source + at, mask), dtype)
        here = counter + (tl.arange(0, counters) + step * counters)
        c0, c1 = here.to(tl.uint32), (here >> 32).to(tl.uint32)
        # Minus zero: whatever is added to it stays as it is, to the sign of a zero.
        t0, t1 = tl.full([counters], -0.0, x.dtype), tl.full([counters], -0.0, x.dtype)
        t2, t3 = tl.full([counters], -0.0, x.dtype), tl.full([counters], -0.0, x.dtype)
        for term in tl.range(first, last):
            k0, k1 = word(terms, term, KEY, 0, TERM_COLUMNS), word(terms, term, KEY, 1, TERM_COLUMNS)
            s0, s1 = word(terms, term, SID, 0, TERM_COLUMNS), word(terms, term, SID, 1, TERM_COLUMNS)
            amplitude = column(terms, term, AMPLITUDE, TERM_COLUMNS).to(tl.float64, bitcast=True).to(x.dtype)
            u0, u1, u2, u3 = draw(*words(c0, c1, k0, k1, s0, s1))
            t0, t1 = t0 + u0.to(x.dtype) * amplitude, t1 + u1.to(x.dtype) * amplitude
            t2, t3 = t2 + u2.to(x.dtype) * amplitude, t3 + u3.to(x.dtype) * amplitude
        x *= kept.to(x.dtype)
        plain, bits = round_bits(x, dtype), round_bits(x + in_order(t0, t1, t2, t3), dtype)
        infinite = ((bits & magnitude) >= infinity).to(bits.dtype)
        # One below infinity's bits is the largest finite value; the sign is a bit of its own.
        bits -= infinite
        same = (bits == plain).to(tl.int32)
        if not whole:
            infinite, same = tl.where(mask, infinite, 0), tl.where(mask, same, 0)
        unchanged += same
        clamped += infinite.to(tl.int32)
        tl.store(values + at, bits.to(bits_type), mask)
    return tl.sum(unchanged), tl.sum(clamped)


@triton.jit
def _mix(
    table, owners, terms, counts,
    draw: tl.constexpr, dtype: tl.constexpr, bits_type: tl.constexpr, infinity: tl.constexpr,
    aligned: tl.constexpr,
):  # fmt: skip
    """Write this program's tile of kept · x + noise, and add its (unchanged, clamped) to the tensor's."""
    tensor, start, begin, end, counter = tile_of(table, owners)
    first, last = column(table, tensor, FIRST_TERM), column(table, tensor, END_TERM)
    kept = column(table, tensor, KEPT).to(tl.float64, bitcast=True)
    alignment: tl.constexpr = bits_type.primitive_bitwidth // 2 if aligned else 1
    values = values_of(table, tensor, bits_type, alignment) + start
    source = values_of(table, tensor, bits_type, alignment, SOURCE) + start
    if (begin == 0) & (end == TILE):
        unchanged, clamped = _mix_tile(
            source, values, begin, TILE, counter, terms, first, last, kept,
            draw, True, dtype, bits_type, infinity,
        )  # fmt: skip
    else:
        unchanged, clamped = _mix_tile(
            source, values, begin, end, counter, terms, first, last, kept,
            draw, False, dtype, bits_type, infinity,
        )  # fmt: skip
    count = counts + 2 * column(table, tensor, SLOT)
    tl.atomic_add(count, unchanged.to(tl.int64), sem="relaxed")
    tl.atomic_add(count + 1, clamped.to(tl.int64), sem="relaxed")


def mix(launch: Launch, counts: Tensor) -> None:
    """Write kept · x + Σ c_k · a_k to the tensors of a launch, and what each counts, (unchanged, clamped)."""
    how = {"draw": DRAWS[launch.kind.distribution], **launch.constants, **OPTIONS}
    _mix[(launch.tiles,)](launch.table, launch.owners, launch.terms, counts, **how)
