"""The weighted mean of several checkpoints, tensor by tensor.

Each tensor is one task of a pool of threads. A value is the mean's, as if worked out exactly and rounded
once, nearest-even, to the stored dtype (`engine/exact_mean.py`). So the bytes depend on nothing but the
values and their coefficients, not on the order of the sources; what all agree on stays as it is to the bit.
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
    Pool(tasks, tile_bytes=_TILE_BYTES, buffer_bytes=_TILE_BYTES).run(threads)
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
        mean = _MeanTile(tensor.dtype, weights, device, nbytes) if tensor.dtype in FLOAT_DTYPES else None
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
    """The mean of stored tiles."""

    def __init__(self, dtype: str, weights: Weights, device: Device, nbytes: int) -> None:
        self._dtype, self._device = dtype, device
        self._count = nbytes // FLOAT_DTYPES[dtype]
        self._mean = Mean(weights, self._count, wide=dtype == "F64")
        self._first = b""
        self._agree = np.ones(self._count, bool)

    def add(self, tile: memoryview, index: int) -> None:
        """Add a member's tile, the first first."""
        if index == 0:
            self._first = bytes(tile)
        else:
            self._agree &= self._bits(tile) == self._bits(self._first)
        self._mean.add(self._values(tile), index)

    def write(self, out: memoryview, read: Callable[[int], memoryview]) -> int:
        """Write the mean to `out`; return how many of its values are NaN or infinite."""
        mean = self._mean.round(lambda index: self._values(read(index)))
        self._device.convert(_bytes(mean), out, "F64", self._dtype)
        np.copyto(self._bits(out), self._bits(self._first), where=self._agree)
        return self._count - int(np.isfinite(mean).sum())

    def _bits(self, tile: memoryview | bytes) -> NDArray[Any]:
        return np.frombuffer(tile, f"<u{FLOAT_DTYPES[self._dtype]}")

    def _values(self, tile: memoryview) -> NDArray[np.float64]:
        values = np.empty(self._count)
        self._device.convert(tile, _bytes(values), self._dtype, "F64")
        return values


def _bytes(values: NDArray[np.float64]) -> memoryview:
    return values.view(np.uint8).data
