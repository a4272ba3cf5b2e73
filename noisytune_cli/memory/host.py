"""Tensors that lie flat in host memory: measured, and given noise, by rows of calls.

Every tensor is cut into tiles, those of a dtype are rows of one array, which all threads take in turn. So a
model of many small tensors takes no longer than one large tensor of as many values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.memory.sharded import Dose, LocalRun, LocalTensor
from noisytune_cli.noise.devices.cpu import Cpu
from noisytune_cli.noise.devices.cpu.rows import work_through
from noisytune_cli.noise.devices.torch import operations
from noisytune_cli.noise.std import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Bytes of a tile. Threads that take small ones in turn get in the way of each other's prefetching.
_TILE_BYTES = 4 << 20

_CPU = Cpu()


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of parts, all [n]: the key of its part, where it lies, its elements and the first one's index."""

    keys: NDArray[np.int64]
    addresses: NDArray[np.int64]
    counts: NDArray[np.int64]
    firsts: NDArray[np.int64]


def measure(parts: Mapping[int, LocalTensor], threads: int) -> dict[int, list[Moments]]:
    """Return the moments of the tiles of each part, of a sharded one as of one tile."""
    kinds: dict[tuple[str, bool], list[tuple[int, LocalTensor]]] = {}
    for key, part in parts.items():
        kind = operations.NAMES[part.values.dtype], part.mesh is None
        kinds.setdefault(kind, []).append((key, part))
    calls, results = [], []
    for (dtype, divided), group in kinds.items():
        whole = ((key, part, LocalRun(0, 0, part.values.numel())) for key, part in group)
        tiles = _tiles(whole, FLOAT_DTYPES[dtype], divided=divided)
        rows, moments = _CPU.moments_rows(tiles.addresses, tiles.counts, dtype, keeps=group)
        calls.append(rows)
        results.append((tiles.keys.tolist(), moments))
    work_through(calls, threads)
    found: dict[int, list[Moments]] = {}
    for keys, moments in results:
        for key, each in zip(keys, moments(), strict=True):
            found.setdefault(key, []).append(each)
    return found


def add_noise(doses: Mapping[int, Dose], threads: int) -> dict[int, list[int]]:
    """Add the noise of each dose; return the [unchanged, clamped] elements of each.

    A base lies in host memory too.
    """
    kinds: dict[tuple[str, str, bool], list[int]] = {}
    for key, dose in doses.items():
        kind = operations.NAMES[dose.held.values.dtype], dose.noise.distribution, dose.noise.is_single
        kinds.setdefault(kind, []).append(key)
    calls, results = [], []
    for (dtype, _, _), group in kinds.items():
        runs = ((key, doses[key].held, run) for key in group for run in doses[key].held.runs)
        tiles = _tiles(runs, FLOAT_DTYPES[dtype])
        each = {key: i for i, key in enumerate(group)}
        of = np.array([each[key] for key in tiles.keys.tolist()], np.int64)
        away = np.array([_to_base(doses[key]) for key in group], np.int64)
        rows = _CPU.noise_rows(
            tiles.addresses,
            tiles.counts,
            dtype,
            noises=[doses[key].noise for key in group],
            of=of,
            firsts=tiles.firsts,
            sources=tiles.addresses + away[of],
            keeps=[doses[key] for key in group],
        )
        calls.append(rows)
        results.append(tiles.keys.tolist())
    work_through(calls, threads)
    counts = {key: [0, 0] for key in doses}
    for keys, done in zip(results, calls, strict=True):
        both = zip(keys, done.rows["unchanged"].tolist(), done.rows["clamped"].tolist(), strict=True)
        for key, unchanged, clamped in both:
            counts[key][0] += unchanged
            counts[key][1] += clamped
    return counts


def _to_base(dose: Dose) -> int:
    """Return how many bytes from a dose's values its base lies."""
    return 0 if dose.base is None else dose.base.data_ptr() - dose.held.values.data_ptr()


def _tiles(runs: Iterable[tuple[int, LocalTensor, LocalRun]], size: int, *, divided: bool = True) -> _Tiles:
    """Cut runs of parts, each with the key of its part, into tiles of elements of `size` bytes."""
    listed = [
        (key, part.values.data_ptr() + run.start * size, run.count, run.first) for key, part, run in runs
    ]
    keys, addresses, counts, firsts = np.array(listed, np.int64).reshape(-1, 4).T
    tile = _TILE_BYTES // size if divided else int(counts.max(initial=1))
    pieces = -(-counts // tile)
    of = np.repeat(np.arange(len(counts)), pieces)
    at = (np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * tile
    return _Tiles(keys[of], addresses[of] + at * size, np.minimum(counts[of] - at, tile), firsts[of] + at)
