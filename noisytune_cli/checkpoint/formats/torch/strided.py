"""Where a tensor's elements lie when they do not lie in order: transposed tensors, and views with gaps.

Noise counts elements in row-major order, files hold them in the order of their storage. A tensor that lies
in row-major order is one run of bytes and never comes here. Any other is a number of runs; it is held in
memory, as it is stored, and looked at through a view in row-major order. What takes no noise may be expanded
(position ids, masks): one run of bytes then stands for many equal ones, and is read and written as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from noisytune_cli.checkpoint.formats.torch.globals import StoredTensor
from noisytune_cli.checkpoint.formats.torch.values import PickleFault

#: More pieces than this in one file would be read an element at a time.
MAX_RUNS = 4_000_000

#: Bytes that the expanded tensors of one file may stand for.
MAX_EXPANDED = 16 << 20

_RESAVE = "Load it in torch, make every tensor contiguous, and save the state dict again"
_CLONE = "Load it in torch, clone() every tensor, and save the state dict again"


@dataclass(frozen=True, eq=False, slots=True)
class Runs:
    """A tensor's bytes in the file: runs of `length` bytes from each of `starts`, ascending.

    `shape` and `axes` say how the runs, end to end, are seen in row-major order; `expanded` are the shapes
    before and after expanding, where the tensor is expanded.
    """

    starts: NDArray[np.int64]
    length: int
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    itemsize: int
    expanded: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def in_order(self) -> bool:
        """Whether the bytes are one run, in row-major order."""
        in_order = len(self.starts) <= 1 and self.axes == tuple(range(len(self.axes)))
        return in_order and self.expanded is None


def find_runs(tensor: StoredTensor, base: int, room: int = MAX_RUNS, expanded: int = 0) -> Runs:
    """Return where `tensor` lies, its storage beginning at byte `base`.

    Raises PickleFault if it overlaps itself, or lies in more than `room` runs beyond the first; it may be
    expanded to `expanded` bytes.
    """
    itemsize = tensor.dtype.itemsize
    if tensor.nbytes == 0:
        return Runs(np.empty(0, np.int64), 0, (0,), (0,), itemsize)
    if tensor.nbytes <= expanded and any(step == 0 for _, step in _true_axes(tensor)):
        return _find_expanded(tensor, base, room)
    sizes = [(step, size, axis) for axis, (size, step) in enumerate(_true_axes(tensor))]
    stored = sorted(sizes, key=lambda item: -item[0])
    run, extent = 1, 1  # elements without a gap; elements up to the last one so far
    outer: list[tuple[int, int]] = []
    for step, size, _ in reversed(stored):
        if step < extent:
            raise PickleFault("a tensor's elements overlap: it is expanded, or a window over itself", _RESAVE)
        if step == run and not outer:
            run *= size
        else:
            outer.insert(0, (step, size))
        extent += (size - 1) * step
    if math.prod(size for _, size in outer) > room + 1:
        raise PickleFault("a tensor is a view in too many pieces of its storage", _RESAVE)
    starts = np.zeros(1, np.int64)
    for step, size in outer:
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * step).reshape(-1)
    order = [axis for _, _, axis in stored]
    return Runs(
        starts * itemsize + (base + tensor.start),
        run * itemsize,
        tuple(size for _, size, _ in stored) or (1,),
        tuple(int(i) for i in np.argsort(order)) or (0,),
        itemsize,
    )


def _find_expanded(tensor: StoredTensor, base: int, room: int) -> Runs:
    """Return where the elements lie that an expanded tensor repeats."""
    stored = tuple(1 if step == 0 else n for n, step in zip(tensor.shape, tensor.stride, strict=True))
    runs = find_runs(replace(tensor, shape=stored), base, room)
    return replace(runs, expanded=(stored, tensor.shape))


def merge_extents(runs: Iterable[Runs]) -> NDArray[np.int64]:
    """Return the bytes that tensors cover, as rows of (start, end), ascending and apart.

    The tensors must not share bytes; raises PickleFault if they do.
    """
    pairs = [np.stack([r.starts, r.starts + r.length], axis=1) for r in runs if len(r.starts)]
    if not pairs:
        return np.empty((0, 2), np.int64)
    extents = np.concatenate(pairs)
    extents = extents[np.argsort(extents[:, 0], kind="stable")]
    if (extents[1:, 0] < extents[:-1, 1]).any():
        raise PickleFault("two of its tensors share a part of one storage and are no tie", _CLONE)
    first = np.concatenate([[True], extents[1:, 0] != extents[:-1, 1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([extents[first, 0], extents[last, 1]], axis=1)


class Held:
    """A tensor in memory: `stored` are its bytes as the file has them, run after run."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.stored = np.empty(len(runs.starts) * runs.length, np.uint8)
        elements = self.stored.view(np.complex128 if runs.itemsize == 16 else f"u{runs.itemsize}")
        self._logical = elements.reshape(runs.shape).transpose(runs.axes)
        if runs.expanded is not None:
            stored, shape = runs.expanded
            once = self._logical.reshape(stored)
            strides = np.broadcast_to(once, shape).strides
            self._logical = np.lib.stride_tricks.as_strided(once, shape, strides)

    def read(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` in row-major order; both are whole elements."""
        first, count = start // self.runs.itemsize, len(buffer) // self.runs.itemsize
        elements = np.frombuffer(buffer, self._logical.dtype)
        elements[:] = self._logical.flat[first : first + count]

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        """Take the bytes from `start` in row-major order; both are whole elements."""
        first, count = start // self.runs.itemsize, len(buffer) // self.runs.itemsize
        self._logical.flat[first : first + count] = np.frombuffer(buffer, self._logical.dtype)

    def pieces(self) -> Iterable[tuple[int, memoryview]]:
        """Yield each run's offset in the file and its bytes."""
        view, length = self.stored.data, self.runs.length
        for index, start in enumerate(self.runs.starts.tolist()):
            yield start, view[index * length : (index + 1) * length]


def _true_axes(tensor: StoredTensor) -> list[tuple[int, int]]:
    """Return size and step of each axis with more than one element; the step of others means nothing."""
    return [(n, step) for n, step in zip(tensor.shape, tensor.stride, strict=True) if n > 1]
