"""The matrices of a tensor in memory: views to measure each, and noise for all of them in one pass.

Sums do not depend on where a matrix lies, so a view of its elements is measured like a tensor. Noise does,
and is added by way of the host tile by tile, as to a file (`engine/tiles.py`). Whole tensors only: which
elements of a matrix a process holds of a sharded one is not worked out here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from noisytune_cli.engine import tiles
from noisytune_cli.engine.threads import Pool, TileLoop, Worker, default_threads
from noisytune_cli.memory import in_place
from noisytune_cli.memory.sharded import LocalRun, LocalTensor
from noisytune_cli.noise.devices.cpu import Cpu
from noisytune_cli.noise.devices.torch import operations
from noisytune_cli.noise.stream import Noise
from noisytune_cli.records import Part

_CPU = Cpu()


@dataclass(frozen=True, slots=True)
class PartedDose:
    """The noise for each of a tensor's matrices, None for one that gets none."""

    held: LocalTensor
    parts: tuple[Part, ...]
    noises: tuple[Noise | None, ...]


def views(held: LocalTensor, parts: Sequence[Part]) -> list[LocalTensor]:
    """Return each matrix of a tensor as a tensor of its own, to be measured."""
    with torch.no_grad():
        values = in_place.flat(held.values)
    found = []
    for part in parts:
        start = values.storage_offset() + part.first
        view = values.as_strided((part.repeat, part.length), (part.stride, 1), start)
        found.append(LocalTensor(view, (LocalRun(0, 0, part.elements),)))
    return found


def add_noise(doses: Sequence[PartedDose], threads: int | None = None) -> list[list[tuple[int, int]]]:
    """Add the noise of each dose to its tensor; return (unchanged, clamped) elements of each matrix."""
    counts = [[(0, 0) for _ in dose.parts] for dose in doses]
    tasks = [functools.partial(_add, dose, counts[i]) for i, dose in enumerate(doses)]
    if tasks:
        with torch.no_grad():
            Pool(tasks, tile_bytes=0, buffer_bytes=0).run(threads or default_threads())
    return counts


def _add(dose: PartedDose, counts: list[tuple[int, int]], worker: Worker) -> None:
    with in_place.changing(dose.held.values) as values:
        found = _add_to_host(dose, values, worker)
    for part, unchanged, clamped in found:
        counts[part] = (counts[part][0] + unchanged, counts[part][1] + clamped)


def _add_to_host(dose: PartedDose, values: torch.Tensor, worker: Worker) -> list[tuple[int, int, int]]:
    """Add a dose to values in host memory, [n]; return pieces' (matrix, unchanged, clamped)."""
    dtype = operations.NAMES[values.dtype]
    work = list(in_place.tiles_of(values))
    places = tiles.Places(dose.parts)
    done: list[list[tuple[int, int, int]]] = [[] for _ in work]

    def tile(_: Worker, index: int) -> None:
        data, first = work[index]
        for part, blocks in places.in_tile(first, tiles.count(data, dtype)):
            if (noise := dose.noises[part]) is not None:
                found = tiles.add_noise(_CPU, data, data, dtype, dtype, blocks, noise, first)
                done[index].append((part, *found))

    worker.pool.share(TileLoop(len(work), tile), worker)
    return [entry for entries in done for entry in entries]
