"""A tensor that is stored in rectangles, seen in row-major order.

A run of a tensor's bytes is a part of a row, whole rows, and a part of a row again; whole rows meet a
rectangle in rows of its own, which lie together there, and a part of a row is a run of a tensor with one
dimension less. So every run falls apart into blocks that are contiguous where they are stored. Bytes are
counted throughout: an element's bytes are one more, innermost dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noisytune_cli.checkpoint.formats.torch.values import PickleFault

#: Comparisons of rectangles that lie in no grid, as no sharding of torch's makes them.
_MAX_COMPARED = 300_000

_OVERLAP = "two of its chunks overlap"

#: For each dimension, offset and size.
_Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Rectangle:
    """`sizes` from `offsets`; element 0 of its row-major run is byte `first` of what `piece` identifies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int
    piece: Any


#: Moves the bytes of a piece from a given one on into, or out of, an array of uint8 of any shape.
Move = Callable[[Any, int, NDArray[np.uint8]], None]


def check_tiles(shape: Sequence[int], rectangles: Sequence[Rectangle]) -> None:
    """Raise PickleFault unless the rectangles, none of them empty, cover the shape and do not overlap."""
    covered = 0
    for rectangle in rectangles:
        ends = zip(rectangle.offsets, rectangle.sizes, shape, strict=True)
        if any(offset + size > most for offset, size, most in ends):
            raise PickleFault("a chunk goes past the end of its tensor")
        covered += math.prod(rectangle.sizes)
    if covered != math.prod(shape):
        raise PickleFault(f"its chunks have {covered:,} of {math.prod(shape):,} elements")
    # With as many elements as the shape, chunks that do not overlap leave no hole.
    _check_apart([tuple(zip(r.offsets, r.sizes, strict=True)) for r in rectangles])


def move_run(
    shape: Sequence[int], rectangles: Sequence[Rectangle], start: int, run: NDArray[np.uint8], move: Move
) -> None:
    """Move the bytes from `start` of the tensor, row-major, between its rectangles and the flat `run`.

    Shape and rectangles count bytes, in an innermost dimension. `move` gets views of `run`.
    """
    row = math.prod(shape[1:])
    while run.size:
        first, skip = divmod(start, row)
        if len(shape) > 1 and (skip or run.size < row):
            length = min(row - skip, run.size)
            move_run(shape[1:], _inside(rectangles, first), skip, run[:length], move)
        else:
            rows = run.size // row
            length = rows * row
            block = run[:length].reshape(rows, *shape[1:])
            for rectangle in rectangles:
                _move_block(rectangle, first, block, move)
        start, run = start + length, run[length:]


def _move_block(rectangle: Rectangle, first: int, block: NDArray[np.uint8], move: Move) -> None:
    """Move what whole rows from `first` on have in common with a rectangle."""
    offset, size = rectangle.offsets[0], rectangle.sizes[0]
    low, high = max(first, offset), min(first + len(block), offset + size)
    if low < high:
        sides = zip(rectangle.offsets[1:], rectangle.sizes[1:], strict=True)
        part = block[(slice(low - first, high - first), *(slice(at, at + n) for at, n in sides))]
        move(rectangle.piece, rectangle.first + (low - offset) * math.prod(rectangle.sizes[1:]), part)


def _inside(rectangles: Sequence[Rectangle], row: int) -> list[Rectangle]:
    """Return what a row has in common with the rectangles."""
    return [
        Rectangle(
            r.offsets[1:], r.sizes[1:], r.first + (row - r.offsets[0]) * math.prod(r.sizes[1:]), r.piece
        )
        for r in rectangles
        if r.offsets[0] <= row < r.offsets[0] + r.sizes[0]
    ]


def _check_apart(boxes: list[_Box]) -> None:
    """Raise PickleFault if two boxes overlap; a grid is taken apart dimension by dimension."""
    if len(boxes) < 2:
        return
    if not boxes[0]:
        raise PickleFault(_OVERLAP)
    together: list[_Box] = []  # boxes that may meet, for those before them end before they begin
    end = 0
    for box in sorted(boxes):
        if together and box[0][0] >= end:
            _check_together(together)
            together = []
        end = max(end, sum(box[0])) if together else sum(box[0])
        together.append(box)
    if len(together) > 1:
        _check_together(together)


def _check_together(boxes: list[_Box]) -> None:
    if all(box[0] == boxes[0][0] for box in boxes):
        _check_apart([box[1:] for box in boxes])
    elif len(boxes) ** 2 > _MAX_COMPARED:
        raise PickleFault("its chunks cannot be told apart: there are too many side by side")
    elif any(_overlap(a, b) for a, b in itertools.combinations(boxes, 2)):
        raise PickleFault(_OVERLAP)


def _overlap(a: _Box, b: _Box) -> bool:
    return all(p < q + n and q < p + m for (p, m), (q, n) in zip(a, b, strict=True))
