"""The weighted mean of several checkpoints, tensor by tensor.

Each tensor is one task of a pool of threads. A value is the mean's, as if worked out exactly and rounded
once, nearest-even, to the stored dtype (`engine/quick_mean.py`, and where that is not sure,
`engine/exact_mean.py`). So the bytes depend on nothing but the values and their coefficients, not on the
order of the sources; what all agree on stays as it is to the bit.
Memory is a few tiles for each thread, whatever the number and the size of the sources.

Tensors that hold no floats cannot be averaged: the first source's bytes are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from blake3 import blake3

from noisytune_cli.checkpoint.formats import Sink, Source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.exact_mean import Mean, Weights
from noisytune_cli.engine.quick_mean import FRACTIONS, QuickMean
from noisytune_cli.engine.threads import Pool, Worker
from noisytune_cli.manifest.average import AveragedTensor
from noisytune_cli.noise.devices import Device
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes of a tile: its values, their sums and their errors in float64 stay in a core's cache.
_TILE_BYTES = 1 << 16


@dataclass(frozen=True)
class AverageMember:
    """One source of a mean: its weight, its files by name, and its tensors by name."""

    weight: float
    sources: Mapping[str, Source]
    tensors: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Done:
    """What was written of a tensor, and how many of its values are NaN or infinite."""

    tensor: AveragedTensor
    strange: int
    differs: bool


def average(
    tensors: Sequence[TensorSpec],
    members: Sequence[AverageMember],
    sinks: Mapping[str, Sink],
    device: Device,
    *,
    threads: int,
    progress: Callable[[int], None],
) -> list[Done]:
    """Write the mean of each of `tensors`, the first member's; the sinks are left unfinished.

    Every member has every tensor, in one dtype and shape. `progress` is called, from any thread, with the
    bytes just read.
    """
    done: list[Done | None] = [None] * len(tensors)
    weights = Weights([member.weight for member in members])

    def task(index: int, worker: Worker) -> None:
        tensor = tensors[index]
        done[index] = _average(tensor, members, weights, sinks[tensor.file], device, progress, worker)

    tasks = [partial(task, index) for index in range(len(tensors))]
    # Room for two tiles of any dtype in float64.
    Pool(tasks, tile_bytes=_TILE_BYTES, buffer_bytes=8 * _TILE_BYTES).run(threads)
    return [one for one in done if one is not None]


def _average(
    tensor: TensorSpec,
    members: Sequence[AverageMember],
    weights: Weights,
    sink: Sink,
    device: Device,
    progress: Callable[[int], None],
    worker: Worker,
) -> Done:
    hashes, out_hash, strange = [blake3() for _ in members], blake3(), 0
    for start in range(0, tensor.nbytes, _TILE_BYTES):
        worker.pool.check()
        nbytes = min(_TILE_BYTES, tensor.nbytes - start)
        written = worker.out[:nbytes]
        tiles = _Tiles(tensor, members, start, worker.tile[:nbytes])
        mean = (
            _MeanTile(tensor.dtype, weights, device, worker.buffer, nbytes)
            if tensor.dtype in FLOAT_DTYPES
            else None
        )
        for k, content in enumerate(hashes):
            data = tiles.read(k)
            content.update(data)
            if mean is not None:
                mean.add(data, k)
            elif k == 0:
                written[:] = data
            progress(nbytes)
        if mean is not None:
            strange += mean.write(written, tiles.read)
        sink.write(tensor, start, written)
        out_hash.update(written)
    digests = [f"blake3:{content.hexdigest()}" for content in hashes]
    action: Literal["average", "copy"] = "average" if tensor.dtype in FLOAT_DTYPES else "copy"
    record = AveragedTensor(tensor, action, tuple(digests), f"blake3:{out_hash.hexdigest()}")
    return Done(record, strange, len(set(digests)) > 1)


@dataclass(frozen=True)
class _Tiles:
    """The members' tiles at one place of a tensor."""

    tensor: TensorSpec
    members: Sequence[AverageMember]
    start: int
    room: memoryview

    def read(self, index: int) -> memoryview:
        """Return a member's tile, aligned to its elements."""
        member = self.members[index]
        own = member.tensors[self.tensor.name]
        data = member.sources[own.file].read(own, self.start, self.room)
        if data is not self.room and own.offset % FLOAT_DTYPES.get(own.dtype, 1):
            self.room[:] = data
            return self.room
        return data


class _MeanTile:
    """The mean of stored tiles: what `QuickMean` is sure of, and of the rest what `Mean` works out."""

    def __init__(self, dtype: str, weights: Weights, device: Device, buffer: memoryview, nbytes: int) -> None:
        self._dtype, self._device, self._weights = dtype, device, weights
        self._count = nbytes // FLOAT_DTYPES[dtype]
        room = np.frombuffer(buffer, np.float64)
        self._sums, self._others = room[: self._count], room[len(room) // 2 :][: self._count]
        self._quick = QuickMean(dtype, weights) if dtype in FRACTIONS else None

    def add(self, tile: memoryview, index: int) -> None:
        """Add a member's tile, the first first."""
        if self._quick is not None:
            values = self._values(tile, self._others if index else self._sums)
            self._quick.add(self._bits(tile), values, index)

    def write(self, out: memoryview, read: Callable[[int], memoryview]) -> int:
        """Write the mean to `out`; return how many of its values are NaN or infinite."""
        means = self._bits(out)
        if self._quick is None:
            unsure = np.arange(self._count)
        else:
            means[:], unsure = self._quick.round(self._stored, lambda index: self._bits(read(index)))
        if len(unsure):
            means[unsure] = self._exactly(unsure, read)
        if self._quick is not None and self._quick.finite:
            return 0
        return self._count - int(np.isfinite(self._values(out)).sum())

    def _exactly(self, where: NDArray[np.int64], read: Callable[[int], memoryview]) -> NDArray[Any]:
        """Return the stored means of some elements: of what all agree on, the first member's bits."""
        mean = Mean(self._weights, len(where), wide=self._dtype == "F64")
        first, agree = np.empty(0), np.ones(len(where), bool)
        for index in range(len(self._weights.values)):
            tile = read(index)
            stored = self._bits(tile)[where]
            if index == 0:
                first = stored
            agree &= stored == first
            mean.add(self._values(tile)[where], index)
        return np.where(
            agree, first, self._stored(mean.round(lambda index: self._values(read(index))[where]))
        )

    def _bits(self, tile: memoryview) -> NDArray[Any]:
        return np.frombuffer(tile, f"<u{FLOAT_DTYPES[self._dtype]}")

    def _values(self, tile: memoryview, room: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        values = np.empty(self._count) if room is None else room
        self._device.convert(tile, _bytes(values), self._dtype, "F64")
        return values

    def _stored(self, values: NDArray[np.float64]) -> NDArray[Any]:
        stored = np.empty(len(values), f"<u{FLOAT_DTYPES[self._dtype]}")
        self._device.convert(_bytes(values), stored.view(np.uint8).data, "F64", self._dtype)
        return stored


def _bytes(values: NDArray[np.float64]) -> memoryview:
    return values.view(np.uint8).data
