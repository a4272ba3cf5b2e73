"""The matrices of a tensor in one tile of it: which are there, and how to measure them and add their noise.

A tile is a run of the tensor's elements, and holds of a matrix some runs, the first and the last perhaps cut
off. Long runs are worked on where they lie. Short ones (columns of a row, every second element) are gathered
for their sums; for their noise the loop goes over everything from the first run to the last, into scratch
space, and the matrix's own elements are picked from there. So the bits are those of the whole tensor's noise
with another amplitude, whatever the layout.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.noise import stream as reference
from noisytune_cli.noise.devices import Device
from noisytune_cli.records import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from noisytune_cli.noise.stream import Noise

#: Elements from which a run is worth a call of its own: below, the call costs more than what it does.
_LONG = 4096

#: Neighbours that are looked at to see whether a tile may have many faint values.
_RUN = 64


class Block(NamedTuple):
    """Runs of elements in a tile, all whole: counted from the tile's first element."""

    at: int
    length: int
    stride: int
    repeat: int

    @property
    def extent(self) -> int:
        """The elements from the first to the last of it, what lies between included."""
        return (self.repeat - 1) * self.stride + self.length

    def runs(self) -> Iterator[slice]:
        """Yield where each run lies."""
        for start in range(self.at, self.at + self.repeat * self.stride, self.stride):
            yield slice(start, start + self.length)

    def of(self, values: NDArray[Any], origin: int = 0) -> NDArray[Any]:
        """Return the block's elements as [repeat, length], a view; `origin` is where `values` begin."""
        item = values.itemsize
        return as_strided(values[self.at - origin :], (self.repeat, self.length), (self.stride * item, item))


class Places:
    """Where the parts of a tensor are, to be asked for each tile."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Take parts in the order of their first elements."""
        self._parts = parts
        self._firsts = [part.first for part in parts]
        ends = (part.first + (part.repeat - 1) * part.stride + part.length for part in parts)
        self._ends = list(itertools.accumulate(ends, max))

    def in_tile(self, first: int, count: int) -> Iterator[tuple[int, list[Block]]]:
        """Yield the index of each part with elements among `count` from `first`, and these as blocks."""
        start = bisect.bisect_right(self._ends, first)
        for index in range(start, bisect.bisect_left(self._firsts, first + count)):
            if blocks := _blocks(self._parts[index], first, count):
                yield index, blocks

    def values(
        self, first: int, tile: memoryview, dtype: str, wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield the index of each part in a tile from element `first`, and its elements there in order.

        Of parts that are not `wanted` nothing is taken.
        """
        for part, blocks in self.in_tile(first, count(tile, dtype)):
            if wanted is None or part in wanted:
                yield part, gather(tile, dtype, blocks)


def _blocks(part: Part, first: int, count: int) -> list[Block]:
    """Return what a tile has of a part: a run cut off at its start, whole runs, one cut off at its end."""
    begin = max(0, (first - part.first - part.length) // part.stride + 1)
    end = min(part.repeat, -(-(first + count - part.first) // part.stride))
    blocks = []
    whole = [begin, end]
    at = part.first + begin * part.stride - first
    if begin < end and (at < 0 or at + part.length > count):
        stop = min(at + part.length, count)
        blocks.append(Block(max(at, 0), stop - max(at, 0), stop - max(at, 0), 1))
        whole[0] += 1
    tail = []
    at = part.first + (end - 1) * part.stride - first
    if whole[0] < end and at + part.length > count:
        tail.append(Block(at, count - at, count - at, 1))
        whole[1] -= 1
    if whole[0] < whole[1]:
        at = part.first + whole[0] * part.stride - first
        blocks.append(Block(at, part.length, part.stride, whole[1] - whole[0]))
    return blocks + tail


def count(tile: memoryview, dtype: str) -> int:
    """Return how many elements a tile has."""
    return len(tile) // FLOAT_DTYPES[dtype]


def gather(tile: memoryview, dtype: str, blocks: Sequence[Block]) -> memoryview:
    """Return the bytes of a part's elements in a tile, in order; a copy unless they are one run."""
    if len(blocks) == 1 and blocks[0].repeat == 1:
        return _bytes(tile, FLOAT_DTYPES[dtype], slice(blocks[0].at, blocks[0].at + blocks[0].length))
    values = _values(tile, dtype)
    return np.concatenate([block.of(values).ravel() for block in blocks]).view(np.uint8).data


def add_noise(
    device: Device,
    tile: memoryview,
    out: memoryview,
    dtype: str,
    out_dtype: str,
    blocks: Sequence[Block],
    noise: Noise,
    first: int,
) -> tuple[int, int]:
    """Write the elements of a part with their noise to their places in `out`; return (unchanged, clamped).

    `first` is the tile's first element in the tensor. What else is in `out` stays; in one dtype, `out` may be
    the tile itself.
    """
    unchanged = clamped = 0
    for block in blocks:
        if block.repeat == 1 or block.length >= _LONG:
            for run in block.runs():
                source, target = (
                    _bytes(memory, FLOAT_DTYPES[kind], run)
                    for memory, kind in ((tile, dtype), (out, out_dtype))
                )
                counts = device.add_noise(
                    source, target, dtype, out_dtype, noise=noise, first=first + run.start
                )
                unchanged, clamped = unchanged + counts[0], clamped + counts[1]
        else:
            counts = _pick(device, tile, out, dtype, out_dtype, block, noise, first)
            unchanged, clamped = unchanged + counts[0], clamped + counts[1]
    return unchanged, clamped


def _pick(
    device: Device,
    tile: memoryview,
    out: memoryview,
    dtype: str,
    out_dtype: str,
    block: Block,
    noise: Noise,
    first: int,
) -> tuple[int, int]:
    """Add noise to all from the first run to the last, and write those of the runs."""
    span = slice(block.at, block.at + block.extent)
    source = _bytes(tile, FLOAT_DTYPES[dtype], span)
    scratch = np.empty(block.extent * FLOAT_DTYPES[out_dtype], np.uint8)
    _, suspects = device.add_noise(
        source, scratch.data, dtype, out_dtype, noise=noise, first=first + block.at
    )
    noised = block.of(_values(scratch.data, out_dtype), block.at)
    if suspects:
        # Something between the runs may have been clamped, or be no number: only the reference tells which.
        values = np.frombuffer(tile, reference.STORED[dtype])
        each = [
            reference.mix(values[run], dtype, noise, first + run.start, out_dtype) for run in block.runs()
        ]
        counts = sum(unchanged for _, unchanged, _ in each), sum(clamped for _, _, clamped in each)
    else:
        plain = source
        if out_dtype != dtype:
            plain = np.empty_like(scratch).data
            device.convert(source, plain, dtype, out_dtype)
        same = noised == block.of(_values(plain, out_dtype), block.at)
        counts = int(np.count_nonzero(same)), 0
    block.of(_values(out, out_dtype))[...] = noised  # last: out may be the tile itself
    return counts


def _bytes(memory: memoryview, size: int, elements: slice) -> memoryview:
    return memory[elements.start * size : elements.stop * size]


def _values(memory: memoryview, dtype: str) -> NDArray[Any]:
    """Return stored values as integers of their width, which compare and copy bit by bit."""
    return np.frombuffer(memory, np.dtype(f"u{FLOAT_DTYPES[dtype]}"))


def faint(data: memoryview, dtype: str, limit: float) -> int:
    """Return how many of a tile's values are within ±`limit` (0: are 0 or -0), if a good part is; else 0.

    A few runs of neighbours tell: counting all takes as long as reading them, and few tensors have many.
    """
    bits = _values(data, dtype)
    # Without their signs, stored numbers are in the order of their bits.
    bound = _magnitude(limit, dtype)
    few = np.concatenate([bits[at : at + _RUN] for at in (0, len(bits) // 2, max(0, len(bits) - _RUN))])
    if 4 * np.count_nonzero(few << 1 <= bound) < len(few):
        return 0
    return int(np.count_nonzero(bits << 1 <= bound))


def _magnitude(value: float, dtype: str) -> int:
    """Return the bits of a positive number without the sign, as the upper ones of their width."""
    if dtype == "BF16":
        return int(np.float32(value).view(np.uint32)) >> 16 << 1
    return int(np.dtype(reference.STORED[dtype]).type(value).view(f"u{FLOAT_DTYPES[dtype]}")) << 1
