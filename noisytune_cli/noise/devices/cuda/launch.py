"""Which tensors a Triton launch works through: a table on the device, a row for each tensor.

All tensors of a dtype that are aligned alike go into one launch, so a model of many small tensors costs a few
launches. Each program takes one tile of one tensor; `owners` says of which. Where a tensor's first element is
not the first of its counter, its row begins up to three elements before it, and these are masked. Noise that
is not one term alone has its terms in a second table.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from noisytune_cli.noise.devices.torch.operations import BITS
from noisytune_cli.noise.stream import Noise, StreamWords

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Values that a program works on at a time, and how often: a tile. To read its row of the table must not be
#: too large a share of the work.
LANES, STEPS = tl.constexpr(1024), tl.constexpr(16)
TILE = tl.constexpr(LANES.value * STEPS.value)

#: How every kernel is launched; c · a and x + c · a are two roundings.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

#: Whether Triton's interpreter stands in for a GPU, with the CPU as the device.
INTERPRETED: bool = triton.knobs.runtime.interpret

#: Bytes that tensors have to be aligned to for loads of full width.
ALIGNMENT = tl.constexpr(16)

#: The numbers of a term, all int64; words past 2^63 and the amplitude, a float64, as the bits that they are.
KEY, SID, AMPLITUDE = map(tl.constexpr, range(3))
TERM_COLUMNS = tl.constexpr(3)

#: The numbers of a row: of its only term, and these. FIRST_TERM and END_TERM bound its rows in the table of
#: terms; KEPT is a float64.
POINTER, SOURCE, SLOT, TILES, FIRST_TILE, SKIP, END, COUNTER = map(tl.constexpr, range(3, 11))
FIRST_TERM, END_TERM, KEPT = map(tl.constexpr, range(11, 14))
_COLUMNS = tl.constexpr(14)

_TYPES: dict[torch.dtype, Any] = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_INTEGERS = {torch.int64: tl.uint64, torch.int32: tl.uint32, torch.int16: tl.uint16}


class Row(NamedTuple):
    """A tensor to work on, contiguous, and its noise; none where it is only measured.

    Noise is added to the values of `base`, of the same dtype, size and device, where there is one.
    """

    values: Tensor
    noise: Noise = Noise("uniform", ())
    first: int = 0
    base: Tensor | None = None


class LaunchKind(NamedTuple):
    """What tensors of one launch have in common."""

    dtype: torch.dtype
    #: Whether every tile can be loaded and stored at full width.
    aligned: bool
    #: Whether noise goes to where the values are that it is added to.
    in_place: bool
    #: Whether each gets the noise of one term, and nothing else.
    is_single: bool
    distribution: str


@dataclass(frozen=True, slots=True)
class Launch:
    """Tensors of one dtype and device, in the form that the kernels take them."""

    table: Tensor
    owners: Tensor
    terms: Tensor
    kind: LaunchKind

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel is told as it is compiled."""
        integer, infinity = BITS[self.kind.dtype]
        names = {"dtype": _TYPES[self.kind.dtype], "bits_type": _INTEGERS[integer], "infinity": infinity}
        return {**names, "aligned": self.kind.aligned}

    @property
    def tensors(self) -> int:
        """How many tensors there are."""
        return self.table.shape[0]

    @property
    def tiles(self) -> int:
        """How many tiles they have in all."""
        return self.owners.shape[0]


def launches(rows: Sequence[Row]) -> Iterator[Launch]:
    """Yield the launches that work through tensors of one device, which is made the current one meanwhile.

    The results of `rows[i]` go to row i of the kernel's result.
    """
    device = rows[0].values.device
    groups: dict[LaunchKind, list[int]] = {}
    for slot, row in enumerate(rows):
        groups.setdefault(_kind(row), []).append(slot)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for kind, slots in groups.items():
            table, terms, tiles = _tables(rows, slots, kind)
            held = _to_device(table, device)
            owners = torch.repeat_interleave(held[:, TILES.value].contiguous(), output_size=tiles)
            yield Launch(held, owners, _to_device(terms, device), kind)


def _kind(row: Row) -> LaunchKind:
    values, base = row.values, row.values if row.base is None else row.base
    skipped = row.first % 4 * values.element_size()
    places = values.data_ptr() - skipped, base.data_ptr() - skipped
    aligned = not skipped and all(place % ALIGNMENT.value == 0 for place in places)
    return LaunchKind(values.dtype, aligned, base is values, row.noise.is_single, row.noise.distribution)


def _tables(
    rows: Sequence[Row], slots: Sequence[int], kind: LaunchKind
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Return a launch's table, its table of terms, which is empty for single ones, and its tiles."""
    table, tiles = np.zeros((len(slots), _COLUMNS.value), np.uint64), 0
    lines: list[tuple[int, int]] = []
    amplitudes: list[float] = []
    for to, slot in zip(table, slots, strict=True):
        values, noise, first, base = rows[slot]
        skip = first % 4
        skipped, end = skip * values.element_size(), skip + values.numel()
        to[POINTER.value] = values.data_ptr() - skipped
        to[SOURCE.value] = (values if base is None else base).data_ptr() - skipped
        to[SLOT.value], to[TILES.value], to[FIRST_TILE.value] = slot, -(-end // TILE.value), tiles
        to[SKIP.value], to[END.value], to[COUNTER.value] = skip, end, first // 4
        tiles += int(to[TILES.value])
        if kind.is_single:
            ((words, amplitude),) = noise.terms
            to[KEY.value], to[SID.value] = _joined(words)
            to.view(np.float64)[AMPLITUDE.value] = amplitude
        else:
            to[FIRST_TERM.value], to[END_TERM.value] = len(lines), len(lines) + len(noise.terms)
            to.view(np.float64)[KEPT.value] = noise.kept
            lines += [_joined(words) for words, _ in noise.terms]
            amplitudes += [amplitude for _, amplitude in noise.terms]
    terms = np.zeros((len(lines), TERM_COLUMNS.value), np.uint64)
    terms[:, : AMPLITUDE.value] = np.array(lines, np.uint64).reshape(-1, AMPLITUDE.value)
    terms.view(np.float64)[:, AMPLITUDE.value] = amplitudes
    return table, terms, tiles


def _joined(words: StreamWords) -> tuple[int, int]:
    """Return KEY and SID."""
    k0, k1, s0, s1 = words
    return k0 | k1 << 32, s0 | s1 << 32


def _to_device(table: NDArray[np.uint64], device: torch.device) -> Tensor:
    host = torch.from_numpy(table.view(np.int64))
    # Pinned, because a copy from other memory would wait for the device.
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


@triton.jit
def tile_of(table, owners):
    """Return this program's tensor; where its tile starts, begins and ends in it; and its first counter.

    Elements `begin` to `end` - 1 of the TILE from `start` on are the tensor's.
    """
    tensor = tl.load(owners + tl.program_id(0))
    start = (tl.program_id(0) - column(table, tensor, FIRST_TILE)) * TILE
    begin = tl.maximum(column(table, tensor, SKIP) - start, 0).to(tl.int32)
    end = tl.minimum(column(table, tensor, END) - start, TILE).to(tl.int32)
    counter = (column(table, tensor, COUNTER) + start // 4).to(tl.uint64, bitcast=True)
    return tensor, start, begin, end, counter


@triton.jit
def column(table, row, index: tl.constexpr, columns: tl.constexpr = _COLUMNS):
    """Return a number of a tensor's row, or with TERM_COLUMNS of a term's."""
    return tl.load(table + row * columns + index)


@triton.jit
def word(table, row, index: tl.constexpr, half: tl.constexpr, columns: tl.constexpr = _COLUMNS):
    """Return the lower (0) or upper (1) 32 bits of such a number."""
    return tl.load((table + row * columns + index).to(tl.pointer_type(tl.uint32)) + half)


@triton.jit
def values_of(table, row, bits_type: tl.constexpr, alignment: tl.constexpr, which: tl.constexpr = POINTER):
    """Return a pointer, aligned to so many bytes, to stored bits SKIP elements before a tensor's first.

    `which` is POINTER, or SOURCE for those that noise is added to.
    """
    return tl.multiple_of(column(table, row, which).to(tl.pointer_type(bits_type)), alignment)


@triton.jit
def upcast(bits, dtype: tl.constexpr):
    """Return stored bits as float32, those of F64 as float64."""
    if dtype == tl.bfloat16:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(dtype, bitcast=True)


@triton.jit
def round_bits(y, dtype: tl.constexpr):
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
