"""The weighted mean of several checkpoints, tensor by tensor.

Each tensor is one task of a pool of threads. A tile of every source is scaled by its coefficient and added
in float64, in the order of the sources; the sum is rounded once, nearest-even, to the stored dtype. So the
bytes depend on nothing but the values, the coefficients and the order, and what all sources agree on stays as
it is. Memory is a few tiles for each thread, whatever the number and the size of the sources.

Tensors that hold no floats cannot be averaged: the first source's bytes are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from blake3 import blake3

from noisytune_cli.checkpoint.formats import Sink, Source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.threads import Pool, Worker
from noisytune_cli.manifest.average import AveragedTensor
from noisytune_cli.noise.devices import Device
from noisytune_cli.records import TensorSpec

_TILE_BYTES = 1 << 20

#: Bytes of the float64 sums of a tile, and of a tile's values in float64, for the shortest dtype.
_ROOM = 2 * _TILE_BYTES // min(FLOAT_DTYPES.values()) * 8


@dataclass(frozen=True)
class AverageMember:
    """One source of a mean: its share (of all, 1), its files by name, and its tensors by name."""

    share: float
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

    def task(index: int, worker: Worker) -> None:
        tensor = tensors[index]
        done[index] = _average(tensor, members, sinks[tensor.file], device, progress, worker)

    tasks = [partial(task, index) for index in range(len(tensors))]
    Pool(tasks, tile_bytes=_TILE_BYTES, buffer_bytes=_ROOM).run(threads)
    return [one for one in done if one is not None]


def _average(
    tensor: TensorSpec,
    members: Sequence[AverageMember],
    sink: Sink,
    device: Device,
    progress: Callable[[int], None],
    worker: Worker,
) -> Done:
    is_float = tensor.dtype in FLOAT_DTYPES
    hashes, out_hash, strange = [blake3() for _ in members], blake3(), 0
    for start in range(0, tensor.nbytes, _TILE_BYTES):
        worker.pool.check()
        nbytes = min(_TILE_BYTES, tensor.nbytes - start)
        written = worker.out[:nbytes]
        count = nbytes // FLOAT_DTYPES[tensor.dtype] if is_float else 0
        room = np.frombuffer(worker.buffer, np.float64)
        sums, values = room[:count], room[len(room) // 2 :][:count]
        sums[:] = 0.0
        first, agree = np.empty(0), np.ones(count, bool)
        for k, member in enumerate(members):
            own = member.tensors[tensor.name]
            data = _read(member.sources[own.file], own, start, worker.tile[:nbytes])
            hashes[k].update(data)
            if is_float:
                device.convert(data, _bytes(values), tensor.dtype, "F64")
                if tensor.dtype == "F64":  # the shares' rounding shows in no shorter dtype
                    first = values.copy() if k == 0 else first
                    agree &= values == first
                with np.errstate(all="ignore"):  # of infinities, which are counted
                    np.multiply(values, member.share, out=values)
                    np.add(sums, values, out=sums)
            elif k == 0:
                written[:] = data
            progress(nbytes)
        if tensor.dtype == "F64":
            sums[agree] = first[agree]
        if is_float:
            strange += count - int(np.isfinite(sums).sum())
            device.convert(_bytes(sums), written, "F64", tensor.dtype)
        sink.write(tensor, start, written)
        out_hash.update(written)
    digests = [f"blake3:{content.hexdigest()}" for content in hashes]
    record = AveragedTensor(
        tensor, "average" if is_float else "copy", tuple(digests), f"blake3:{out_hash.hexdigest()}"
    )
    return Done(record, strange, len(set(digests)) > 1)


def _read(source: Source, tensor: TensorSpec, start: int, room: memoryview) -> memoryview:
    """Return a tile of a tensor, aligned to its elements."""
    data = source.read(tensor, start, room)
    if data is not room and tensor.offset % FLOAT_DTYPES.get(tensor.dtype, 1):
        room[:] = data
        return room
    return data


def _bytes(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> memoryview:
    return values.view(np.uint8).data
