"""One tensor's walk: read, measure, add noise, write, and leave a receipt.

Each tensor is one task of a crew of threads, so that all its stages run in one core's cache; idle threads
help with a tensor's tiles. A tensor that fits the slab is read once and kept there between measuring and
adding; a larger one is read twice, tile by tile. Memory is the same for any checkpoint: a slab and two tiles
for each thread.

Noise does not depend on who computes a tile, or when. Digests need the tiles in order, so each tile is
hashed in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from blake3 import blake3

from noisytune_cli import distributions
from noisytune_cli.crew import Crew, Hands, Pass, Task
from noisytune_cli.devices import Device
from noisytune_cli.formats import Sink, Source
from noisytune_cli.moments import (
    Moments,
    all_equal,
    exact_std,
    exactly_equal,
    new_exact_sums,
    round_std,
)
from noisytune_cli.records import FLOAT_DTYPES, NoiseSpec, Plan, Reason, Receipt, Step
from noisytune_cli.stream import stream_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Bytes of a tile: long enough that Python's part of the work is small, short enough for the caches.
TILE_BYTES = 1 << 20

#: Bytes that all slabs together may take, and the most that one is given.
_ALL_SLABS, _LARGEST_SLAB = 128 << 20, 64 << 20


def _no_progress(nbytes: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Walk:
    """How to carry out a plan; none of it changes a byte of the result.

    `tile_bytes` is a multiple of 32. `progress` is called, from any thread, with the bytes just finished;
    over a run they add up to `work_bytes`. `recorded` are an earlier run's receipts by tensor name: their
    tensors are not measured, but get the std and the amplitude that stand there. They are all or none.
    """

    device: Device
    threads: int = 1
    tile_bytes: int = TILE_BYTES
    progress: Callable[[int], None] = _no_progress
    recorded: Mapping[str, Receipt] = field(default_factory=dict)

    def carry_out(
        self, plan: Plan, sources: Mapping[str, Source], sinks: Mapping[str, Sink]
    ) -> tuple[Receipt, ...]:
        """Carry out every step and return the receipts in the plan's order; the sinks are left unfinished."""
        jobs = [
            _Job(self, plan.noise, step, sources[step.tensor.file], sinks[step.tensor.file])
            for step in plan.steps
        ]
        if plan.noise.scope == "global" and not self.recorded:
            noised = [job for job in jobs if job.step.action == "perturb"]
            self._run([job.measure for job in noised])
            self._settle_together(noised)
            self._run([job.write for job in jobs])
        else:
            self._run([job.measure_and_write for job in jobs])
        return tuple(job.receipt() for job in jobs)

    def _settle_together(self, jobs: Sequence[_Job]) -> None:
        """Give all finite tensors the std of the concatenation of their values."""
        finite = [job for job in jobs if job.reason is None]
        count = sum(job.step.tensor.elements for job in finite)
        std: float | None = 0.0  # of fewer than two values there is none, and nothing to scale noise with
        if count >= 2:
            std = round_std(m for job in finite for m in job.moments)
        if std is None:
            sums = new_exact_sums()
            self._run([partial(job.add_exact_sums, sums) for job in finite], threads=1)
            std = exact_std(sums, count)
        for job in finite:
            job.settle(std)

    def _run(self, tasks: Sequence[Task], threads: int | None = None) -> None:
        slab_bytes = min(_LARGEST_SLAB, _ALL_SLABS // self.threads)
        Crew(tasks, tile_bytes=self.tile_bytes, slab_bytes=slab_bytes).run(threads or self.threads)


def work_bytes(plan: Plan, *, recorded: bool = False) -> int:
    """Return how many bytes of progress carrying out a plan reports; `recorded` where nothing is measured."""
    measured_apart = plan.noise.scope == "global" and not recorded
    return sum(s.tensor.nbytes * (2 if measured_apart and s.action == "perturb" else 1) for s in plan.steps)


class _Job:
    """One tensor: what is known of it so far, and the two passes over its tiles."""

    def __init__(self, walk: Walk, noise: NoiseSpec, step: Step, source: Source, sink: Sink) -> None:
        self.step = step
        self._walk, self._noise, self._source, self._sink = walk, noise, source, sink
        self._size = FLOAT_DTYPES.get(step.tensor.dtype, 1)
        tile = walk.tile_bytes
        self._tiles = [(at, min(tile, step.tensor.nbytes - at)) for at in range(0, step.tensor.nbytes, tile)]
        self._distribution = distributions.load(noise.distribution)
        self._stream = stream_words(noise.seed, step.stream)
        self._moments: list[Moments | None] = [None] * len(self._tiles)
        self._slab: memoryview | None = None
        self.reason: Reason | None = step.reason
        self._std: float | None = None
        self._amplitude: float | None = None
        self._unchanged = self._clamped = 0
        self._source_hash, self._hash = blake3(), blake3()
        self._recorded = walk.recorded.get(step.tensor.name)
        if self._recorded is not None:
            self._std, self._amplitude = self._recorded.std, self._recorded.amplitude

    @property
    def moments(self) -> list[Moments]:
        """The sums of every tile, once measured."""
        return [m for m in self._moments if m is not None]

    def measure_and_write(self, hands: Hands) -> None:
        """Do the whole walk of a tensor whose std is its own."""
        if self.step.action == "perturb" and self._recorded is None:
            if self.step.tensor.nbytes <= len(hands.slab):
                self._slab = hands.slab[: self.step.tensor.nbytes]
            self.measure(hands, report=False)
            if self.reason is None:
                std, constant = self._own_std(hands)
                self.settle(std, constant=constant)
        self.write(hands)
        self._slab = None

    def measure(self, hands: Hands, report: bool = True) -> None:
        """Read the tensor for its moments and its source digest."""

        def tile(hands: Hands, index: int) -> None:
            data = self._read(hands, index)
            self._moments[index] = self._walk.device.moments(data, self.step.tensor.dtype)
            with work.in_turn(index):
                self._source_hash.update(data)
            if report:
                self._walk.progress(len(data))

        work = Pass(len(self._tiles), tile)
        self._do(work, hands)
        if not all(m.finite for m in self.moments):
            self.reason = "non-finite"

    def settle(self, std: float, *, constant: bool = False) -> None:
        """Take the std to use, and with it the amplitude or the reason why there is none."""
        self._std = std
        if constant:
            self.reason = "constant"
            return
        amplitude = float(self._distribution.amplitude(self.step.lam, std))
        if amplitude in (0.0, float("inf")):
            self.reason = "unrepresentable"
            return
        self._amplitude = amplitude

    def write(self, hands: Hands) -> None:
        """Write the tensor with its noise, or as it is."""
        work = Pass(len(self._tiles), lambda hands, index: self._write_tile(hands, work, index))
        self._do(work, hands)

    def receipt(self) -> Receipt:
        """Return what was done."""
        perturbed = self._amplitude is not None
        digest = f"blake3:{self._hash.hexdigest()}"
        noise_range = self._distribution.noise_range(self._amplitude) if self._amplitude is not None else {}
        return Receipt(
            step=self.step,
            action="perturb" if perturbed else "copy",
            reason=self.reason,
            lam=self.step.lam if perturbed else 0.0,
            std=self._std,
            amplitude=self._amplitude,
            low=noise_range.get("low"),
            high=noise_range.get("high"),
            noise_std=noise_range.get("noise_std"),
            unchanged=self._unchanged,
            clamped=self._clamped,
            source_digest=f"blake3:{self._source_hash.hexdigest()}" if perturbed else digest,
            digest=digest,
        )

    def _write_tile(self, hands: Hands, work: Pass, index: int) -> None:
        data = source = self._slab_tile(index) if self._slab is not None else self._read(hands, index)
        unchanged = clamped = 0
        if self._amplitude is not None:
            out = hands.out[: len(data)]
            unchanged, clamped = self._walk.device.add_noise(
                data,
                out,
                self.step.tensor.dtype,
                distribution=self._noise.distribution,
                stream=self._stream,
                first=self._tiles[index][0] // self._size,
                amplitude=self._amplitude,
            )
            data = out
        self._sink.write(self.step.tensor, self._tiles[index][0], data)
        with work.in_turn(index):
            if self._recorded is not None and source is not data:
                self._source_hash.update(source)  # the others were hashed when they were measured
            self._hash.update(data)
            self._unchanged += unchanged
            self._clamped += clamped
        self._walk.progress(len(data))

    def _own_std(self, hands: Hands) -> tuple[float, bool]:
        """Return std32 of this tensor alone, and whether all its values are equal."""
        std = round_std(self.moments)
        if std is not None:
            return std, all_equal(self.moments)
        sums = new_exact_sums()
        self.add_exact_sums(sums, hands)
        count = self.step.tensor.elements
        return exact_std(sums, count), exactly_equal(sums, count)

    def add_exact_sums(self, sums: NDArray[np.int64], hands: Hands) -> None:
        """Add the tensor's values to exact sums."""
        for index in range(len(self._tiles)):
            self._walk.device.add_exact_sums(self._data(hands, index), self.step.tensor.dtype, sums)

    def _data(self, hands: Hands, index: int) -> memoryview:
        """Return a tile's bytes, from the slab once they are there."""
        return self._slab_tile(index) if self._slab is not None else self._read(hands, index)

    def _slab_tile(self, index: int) -> memoryview:
        assert self._slab is not None
        at, length = self._tiles[index]
        return self._slab[at : at + length]

    def _read(self, hands: Hands, index: int) -> memoryview:
        """Return a tile's bytes, aligned to its elements."""
        at, length = self._tiles[index]
        room = self._slab_tile(index) if self._slab is not None else hands.tile[:length]
        data = self._source.read(self.step.tensor, at, room)
        if data is not room and (self._slab is not None or self.step.tensor.offset % self._size):
            room[:] = data
            return room
        return data

    def _do(self, work: Pass, hands: Hands) -> None:
        """Do a pass; with the slab alone (its tiles fit one thread's cache), else with whoever is idle."""
        if self._slab is not None:
            work.help(hands)
        else:
            hands.crew.share(work, hands)
