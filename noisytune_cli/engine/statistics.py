"""Statistics of tensors, or of the matrices in them, from one read of their values.

Each tensor is one task of a pool of threads, which share the tiles of a large one. Tiles have a fixed size
and their sums are merged in order, so every number is the same for any count of threads. Where the float64
sums cannot decide std32, or overflow, the tensor is read again for exact sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine import tiles
from noisytune_cli.engine.percentiles import Percentiles
from noisytune_cli.engine.threads import Pool, TileLoop, Worker
from noisytune_cli.noise.devices import Device, Summary
from noisytune_cli.noise.std import (
    Moments,
    exact_mean,
    exact_norm,
    exact_std,
    mean,
    new_exact_sums,
    norm,
    round_std,
)
from noisytune_cli.records import Part, TensorSpec, whole

_TILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the values of one tensor, or of one of its matrices, say.

    `std` is std32, the very number that perturb scales noise with; the other floats are float64. `l1` and
    `l2` are vector norms, `zeros` a share of the elements (0 to 1), `nan` and `inf` are counts. Percentiles
    go by their names, such as `p99.9`.
    """

    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    l1: float | None = None
    l2: float | None = None
    zeros: float | None = None
    nan: int | None = None
    inf: int | None = None
    percentiles: Mapping[str, float] | None = None


def measure(
    tensors: Sequence[TensorSpec],
    sources: Mapping[str, Source],
    device: Device,
    *,
    threads: int,
    progress: Callable[[int], None],
    parts: Mapping[str, Sequence[Part]] = MappingProxyType({}),
    percentiles: Sequence[float] = (),
) -> list[list[Statistics]]:
    """Return the statistics of `tensors`, whose dtypes must be FLOAT_DTYPES; `sources` are keyed by file.

    Those of a tensor that has `parts` are theirs, in order; of any other there is one. `progress` is called,
    from any thread, with the bytes just done. For `percentiles` a tensor is read again, once for each two
    bytes of its dtype.
    """
    jobs = [
        _Job(
            tensor,
            parts.get(tensor.name) or [whole(tensor)],
            sources[tensor.file],
            device,
            progress,
            percentiles,
        )
        for tensor in tensors
    ]
    Pool([job.run for job in jobs], tile_bytes=_TILE_BYTES, buffer_bytes=0).run(threads)
    return [job.statistics for job in jobs]


class _Job:
    """One tensor, and once run its statistics."""

    def __init__(
        self,
        tensor: TensorSpec,
        parts: Sequence[Part],
        source: Source,
        device: Device,
        progress: Callable[[int], None],
        percentiles: Sequence[float],
    ) -> None:
        self._percentiles = percentiles
        self._tensor, self._source, self._device, self._progress = tensor, source, device, progress
        self._places = tiles.Places(parts)
        self._counts = [part.elements for part in parts]
        self.statistics: list[Statistics] = []

    def run(self, worker: Worker) -> None:
        """Read the tensor and take its statistics."""
        tensor = self._tensor
        starts = range(0, tensor.nbytes, _TILE_BYTES)
        sums: list[dict[int, tuple[Moments, Summary]]] = [{} for _ in self._counts]

        def tile(worker: Worker, index: int) -> None:
            data = self._read(worker, starts[index])
            for part, values in self._values(starts[index], data):
                sums[part][index] = (
                    self._device.moments(values, tensor.dtype),
                    self._device.summarize(values, tensor.dtype),
                )
            self._progress(len(data))

        worker.pool.share(TileLoop(len(starts), tile), worker)
        for part, found in enumerate(sums):
            done = [found[index] for index in sorted(found)]
            self.statistics.append(self._merge(part, [m for m, _ in done], [s for _, s in done], worker))
        if self._percentiles:
            self._add_percentiles(worker)

    def _add_percentiles(self, worker: Worker) -> None:
        """Find the percentiles of the matrices that hold numbers alone, reading the tensor again."""
        searched = {
            part: Percentiles(self._percentiles, count, self._tensor.dtype)
            for part, (count, found) in enumerate(zip(self._counts, self.statistics, strict=True))
            if count and not (found.nan or found.inf)
        }
        while searched and not all(search.is_known for search in searched.values()):
            for start in range(0, self._tensor.nbytes, _TILE_BYTES):
                worker.pool.check()
                for part, values in self._values(start, self._read(worker, start), searched):
                    searched[part].add(values)
            for search in searched.values():
                search.narrow()
        names = [f"p{float(percent)!r}".removesuffix(".0") for percent in self._percentiles]
        for part, search in searched.items():
            named = dict(zip(names, search.values(), strict=True))
            self.statistics[part] = replace(self.statistics[part], percentiles=named)

    def _values(
        self, start: int, data: memoryview, wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield each matrix that a tile, from byte `start`, has some of, with its values there."""
        dtype = self._tensor.dtype
        return self._places.values(start // FLOAT_DTYPES[dtype], data, dtype, wanted)

    def _merge(
        self, part: int, moments: list[Moments], summaries: list[Summary], worker: Worker
    ) -> Statistics:
        """Return the statistics of a matrix from those of its tiles, in order."""
        count = self._counts[part]
        if count == 0:
            return Statistics(l1=0.0, l2=0.0, nan=0, inf=0)
        zeros = sum(s.zeros for s in summaries) / count
        nan, inf = sum(s.nans for s in summaries), sum(s.infinities for s in summaries)
        if nan or inf:
            return Statistics(zeros=zeros, nan=nan, inf=inf)
        average, std, l2 = mean(moments), None, norm(moments)
        if count > 1:
            std = round_std(moments)
        if average is None or l2 is None or (std is None and count > 1):
            average, std, l2 = self._exact(part, worker)
        return Statistics(
            mean=average,
            std=std,
            min=min(s.minimum for s in summaries),
            max=max(s.maximum for s in summaries),
            l1=_sum(s.absolute_sum for s in summaries),
            l2=l2,
            zeros=zeros,
            nan=nan,
            inf=inf,
        )

    def _exact(self, part: int, worker: Worker) -> tuple[float, float | None, float]:
        """Return mean, std32 (None of one element) and L2 norm from exact sums, reading the tensor again."""
        sums = new_exact_sums()
        for start in range(0, self._tensor.nbytes, _TILE_BYTES):
            worker.pool.check()
            for _, values in self._values(start, self._read(worker, start), (part,)):
                self._device.add_exact_sums(values, self._tensor.dtype, sums)
        count = self._counts[part]
        return exact_mean(sums, count), exact_std(sums, count) if count > 1 else None, exact_norm(sums)

    def _read(self, worker: Worker, start: int) -> memoryview:
        """Return the tile from byte `start` of the tensor, aligned to its elements."""
        room = worker.tile[: self._tensor.nbytes - start]
        data = self._source.read(self._tensor, start, room)
        if data is not room and self._tensor.offset % FLOAT_DTYPES[self._tensor.dtype]:
            room[:] = data
            return room
        return data


def _sum(values: Iterable[float]) -> float:
    """Return the correctly rounded sum; inf where it is past float64."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf
