"""Which tensors a Triton launch works through: a table on the device, a row for each tensor.

All tensors of a dtype that are aligned alike go into one launch, so a model of many small tensors costs a few
launches. Each program takes one tile of one tensor; `owners` says of which. Where a tensor's first element is
not the first of its counter, its row begins up to three elements before it, and these are masked.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from noisytune_cli.noise.devices.torch.operations import BITS
from noisytune_cli.noise.stream import StreamWords

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

#: The numbers of a row, all int64; words past 2^63 and the amplitude, a float64, as the bits that they are.
POINTER, SLOT, TILES, FIRST_TILE, SKIP, END, COUNTER, KEY, SID, AMPLITUDE = map(tl.constexpr, range(10))
_COLUMNS = tl.constexpr(10)

_TYPES: dict[torch.dtype, Any] = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_INTEGERS = {torch.int64: tl.uint64, torch.int32: tl.uint32, torch.int16: tl.uint16}


class Row(NamedTuple):
    """A tensor to work on, contiguous, and its noise; none where it is only measured."""

    values: Tensor
    stream: StreamWords = (0, 0, 0, 0)
    first: int = 0
    amplitude: float = 0.0


@dataclass(frozen=True, slots=True)
class Launch:
    """Tensors of one dtype and device, in the form that the kernels take them."""

    table: Tensor
    owners: Tensor
    kind: dict[str, Any]

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
    groups: dict[tuple[torch.dtype, bool], list[tuple[int, ...]]] = {}
    tiles_of: Counter[tuple[torch.dtype, bool]] = Counter()
    for slot, row in enumerate(rows):
        values, (k0, k1, s0, s1), skip = row.values, row.stream, row.first % 4
        pointer, end = values.data_ptr() - skip * values.element_size(), skip + values.numel()
        # Whether every tile can be loaded and stored at full width.
        kind = values.dtype, skip == 0 and pointer % ALIGNMENT.value == 0
        tiles = -(-end // TILE.value)
        # In the order of the columns.
        groups.setdefault(kind, []).append(
            (pointer, slot, tiles, tiles_of[kind], skip, end, row.first // 4, k0 | k1 << 32, s0 | s1 << 32, 0)
        )
        tiles_of[kind] += tiles
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for (dtype, aligned), lines in groups.items():
            table = np.array(lines, np.uint64)
            table.view(np.float64)[:, AMPLITUDE.value] = [rows[line[SLOT.value]].amplitude for line in lines]
            integer, infinity = BITS[dtype]
            names = {"dtype": _TYPES[dtype], "bits_type": _INTEGERS[integer], "infinity": infinity}
            held, owners = _to_device(table, tiles_of[dtype, aligned], device)
            yield Launch(held, owners, {**names, "aligned": aligned})


def _to_device(table: NDArray[np.uint64], tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a table on the device, and for each of its tiles the row that it belongs to."""
    host = torch.from_numpy(table.view(np.int64))
    # Pinned, because a copy from other memory would wait for the device.
    held = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    return held, torch.repeat_interleave(held[:, TILES.value].contiguous(), output_size=tiles)


@triton.jit
def column(table, tensor, index: tl.constexpr):
    """Return a number of a tensor's row."""
    return tl.load(table + tensor * _COLUMNS + index)


@triton.jit
def word(table, tensor, index: tl.constexpr, half: tl.constexpr):
    """Return the lower (0) or upper (1) 32 bits of a number of a tensor's row."""
    return tl.load((table + tensor * _COLUMNS + index).to(tl.pointer_type(tl.uint32)) + half)


@triton.jit
def values_of(table, tensor, bits_type: tl.constexpr, alignment: tl.constexpr):
    """Return a pointer, aligned to so many bytes, to stored bits SKIP elements before a tensor's first."""
    return tl.multiple_of(column(table, tensor, POINTER).to(tl.pointer_type(bits_type)), alignment)


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
