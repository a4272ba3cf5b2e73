"""The walk over a checkpoint: every tensor from its source to all outputs, and its receipts.

Several outputs may be made at once; they differ in their noise, and share tensors, reads and sums. Each
tensor is one task of a pool of threads, so that all its stages run in one core's cache; idle threads help
with a tensor's tiles. One of up to 64 MiB is read once and kept between measuring and adding, however many
threads there are, which share the memory for that; a larger one is read twice, tile by tile, whatever the
number of outputs. Digests need the tiles in order, so each tile is hashed in its turn. Memory is the same for
any checkpoint and any number of outputs: what is kept, and two tiles for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from blake3 import blake3

from noisytune_cli.checkpoint.formats import Sink, Source
from noisytune_cli.dtypes import FLOAT_DTYPES, LARGEST
from noisytune_cli.engine import tiles
from noisytune_cli.engine.matrix import (
    EXACT_AT_ONCE,
    UNMEASURED,
    Counts,
    Matrices,
    Outcomes,
    Spread,
    faint_below,
)
from noisytune_cli.engine.threads import Pool, Task, TileLoop, Worker
from noisytune_cli.errors import InputInvalid
from noisytune_cli.noise.devices import Device
from noisytune_cli.noise.std import exact_std, new_exact_sums, round_std
from noisytune_cli.records import Plan, Receipt, Step, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Bytes of a tile: long enough that Python's part of the work is small, short enough for the caches.
TILE_BYTES = 1 << 20

#: Bytes of the tensors that are kept at a time, and of the largest of them.
_ALL_KEPT, _LARGEST_KEPT = 128 << 20, 64 << 20


def _no_progress(nbytes: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Output:
    """One output of a walk: its plan and, by the source's file names, the sinks of its weight files.

    `targets` are, by tensor name, the tensors that lie elsewhere in the output's file than in the source's.
    `recorded` are an earlier run's receipts by tensor name: the tensors are not measured for this output, but
    get the std and the amplitude that stand there. They are all or none. `std` is that of all values in scope
    global, where it is known.
    """

    plan: Plan
    sinks: Mapping[str, Sink]
    targets: Mapping[str, TensorSpec] = field(default_factory=dict)
    recorded: Mapping[str, Receipt] = field(default_factory=dict)
    std: float | None = None

    def target(self, step: Step) -> TensorSpec:
        """Return a step's tensor as it is in the output."""
        return self.targets.get(step.tensor.name, step.tensor)

    def measures(self, index: int) -> bool:
        """Say whether the std of the `index`-th tensor is needed."""
        if self.recorded or not self.plan.noise.needs_std:
            return False
        # What is only shrunk has to be finite for it, as what gets noise.
        return self.plan.steps[index].action != "copy"


@dataclass(frozen=True)
class Walk:
    """How to carry out plans; none of it changes a byte of the result.

    `tile_bytes` is a multiple of 32. `direct` says whether outputs are written past the page cache (None: if
    they are large). `progress` is called, from any thread, with the bytes just finished;
    over a run they add up to `work_bytes`.
    """

    device: Device
    threads: int = 1
    tile_bytes: int = TILE_BYTES
    progress: Callable[[int], None] = _no_progress
    direct: bool | None = None

    def carry_out(
        self, outputs: Sequence[Output], sources: Mapping[str, Source]
    ) -> tuple[tuple[Receipt, ...], ...]:
        """Carry out every step; return each output's receipts in its plan's order.

        The plans have the same tensors in the same order, and noise that differs in seed and λ alone. The
        sinks are left unfinished.
        """
        tensors = [step.tensor for step in outputs[0].plan.steps]
        receipts: list[tuple[Receipt, ...]] = [()] * len(tensors)

        def walk_alone(index: int, worker: Worker) -> None:
            tensor = TensorWalk(self, outputs, index, sources[tensors[index].file])
            tensor.measure_and_write(worker)
            receipts[index] = tensor.receipts

        if _measures_apart(outputs):
            walks = self._measured(outputs, sources)
            self._settle_together(outputs, walks)
            self._run(walk.write for walk in walks)
            receipts = [walk.receipts for walk in walks]
        else:
            self._run(partial(walk_alone, index) for index in range(len(tensors)))
        return tuple(tuple(one[i] for one in receipts) for i in range(len(outputs)))

    def add_up(
        self, outputs: Sequence[Output], sources: Mapping[str, Source], repeated: Collection[str]
    ) -> list[tuple[int, NDArray[np.int64]]]:
        """Return for each output how many finite values it perturbs, and their exact sums.

        That is what all tensors of its plan add to the std of a model of which they are a part. `repeated`
        are names whose values are counted under another one.
        """
        walks = self._measured(outputs, sources)
        found: dict[tuple[int, ...], tuple[int, NDArray[np.int64]]] = {}
        totals = []
        for output in outputs:
            chosen = tuple(
                index
                for index, step in enumerate(output.plan.steps)
                if step.action == "perturb" and step.tensor.name not in repeated
            )
            if chosen not in found:
                finite = [sums for index in chosen for sums in walks[index].matrices.sums if sums.finite]
                count = sum(sums.elements for sums in finite)
                found[chosen] = count, self._exact_sums([walks[index] for index in chosen])
            totals.append(found[chosen])
        return totals

    def _measured(self, outputs: Sequence[Output], sources: Mapping[str, Source]) -> list[TensorWalk]:
        """Return the walks of all tensors, each measured where an output needs its std."""
        walks = [
            TensorWalk(self, outputs, index, sources[step.tensor.file])
            for index, step in enumerate(outputs[0].plan.steps)
        ]
        self._run(walk.measure for walk in walks if walk.is_measured)
        return walks

    def _settle_together(self, outputs: Sequence[Output], walks: Sequence[TensorWalk]) -> None:
        """Give all matrices that an output perturbs the std of the concatenation of their finite values.

        A tie is one parameter under several names, so its values count once.
        """
        stds: dict[tuple[int, ...], float] = {}
        spreads = []
        for output in outputs:
            # λ rules can leave outputs with different tensors, but most have the same.
            steps = output.plan.steps
            by_stream = {step.stream: i for i, step in enumerate(steps) if step.action == "perturb"}
            chosen = tuple(by_stream.values())
            if chosen not in stds:
                stds[chosen] = self._std_together([walks[index] for index in chosen])
            spreads.append(Spread(stds[chosen]))
        for walk in walks:
            finite = [sums.finite for sums in walk.matrices.sums]
            walk.spreads = [[spread if known else None for known in finite] for spread in spreads]

    def _std_together(self, walks: Sequence[TensorWalk]) -> float:
        finite = [sums for walk in walks for sums in walk.matrices.sums if sums.finite]
        count = sum(sums.elements for sums in finite)
        if count < 2:
            return 0.0  # of fewer than two values there is none, and nothing to scale noise with
        std = round_std(m for sums in finite for m in sums.moments)
        return exact_std(self._exact_sums(walks), count) if std is None else std

    def _exact_sums(self, walks: Sequence[TensorWalk]) -> NDArray[np.int64]:
        """Return the exact sums of all finite matrices of some tensors."""
        exact = new_exact_sums()
        tasks = (
            partial(walk.add_exact_sums, {i: exact for i, s in enumerate(walk.matrices.sums) if s.finite})
            for walk in walks
            if any(sums.finite for sums in walk.matrices.sums)
        )
        self._run(tasks, threads=1)
        return exact

    def _run(self, tasks: Iterable[Task], threads: int | None = None) -> None:
        # As many as there are threads, and an arena has whole cache lines.
        kept = min(_ALL_KEPT, self.threads * (_LARGEST_KEPT + 64))
        Pool(tasks, tile_bytes=self.tile_bytes, buffer_bytes=0, kept_bytes=kept).run(threads or self.threads)


def work_bytes(outputs: Sequence[Output]) -> int:
    """Return how many bytes of progress carrying out `outputs` reports."""
    apart = _measures_apart(outputs)
    total = 0
    for index, step in enumerate(outputs[0].plan.steps):
        measured = apart and any(output.measures(index) for output in outputs)
        total += step.tensor.nbytes * (len(outputs) + measured)
    return total


def _measures_apart(outputs: Sequence[Output]) -> bool:
    """Say whether every tensor is measured before the first is written."""
    is_known = all(output.recorded or output.std is not None for output in outputs)
    return outputs[0].plan.noise.scope == "global" and not is_known


class TensorWalk:
    """One tensor, the `index`-th of every output's plan: what is known of it, and the passes over its tiles.

    `spreads` are, for each output, what it scales the noise of each matrix with: to be set between `measure`
    and `write`.
    """

    def __init__(self, walk: Walk, outputs: Sequence[Output], index: int, source: Source) -> None:
        steps = [output.plan.steps[index] for output in outputs]
        self.tensor = steps[0].tensor
        #: Whether an output needs its std.
        self.is_measured = any(output.measures(index) for output in outputs)
        self.spreads: Sequence[Sequence[Spread | None]] = [()] * len(outputs)
        self._walk, self._outputs, self._index, self._source = walk, outputs, index, source
        self._size = _unit(self.tensor)
        self._tiles = self._divide(outputs[0].target(steps[0]).offset, [_out_unit(step) for step in steps])
        self.matrices = Matrices(walk.device, self.tensor, steps[0].matrices)
        self._buffer: memoryview | None = None
        self._source_hash = blake3()
        self._faint = [0] * len(self._tiles)
        # Of what is only done again nobody is warned.
        is_new = not outputs[0].recorded and any(step.action == "perturb" for step in steps)
        self._counts_faint = is_new and len(self.tensor.shape) > 1
        self.receipts: tuple[Receipt, ...] = ()

    def measure_and_write(self, worker: Worker) -> None:
        """Do the whole walk of a tensor whose std is its own."""
        with ExitStack() as kept:
            if self.is_measured:
                if self.tensor.nbytes <= _LARGEST_KEPT:
                    self._buffer = kept.enter_context(worker.pool.keep(self.tensor.nbytes, worker))
                self.measure(worker, report=False)
                self.spreads = self._find_spreads(worker)
            self.write(worker)
            self._buffer = None

    def measure(self, worker: Worker, report: bool = True) -> None:
        """Read the tensor for its moments and its source digest."""

        def tile(worker: Worker, index: int) -> None:
            data = self._read(worker, index)
            self.matrices.measure(index, self._tiles[index][0], data)
            self._look_at(work, index, data)
            if report:
                self._walk.progress(len(data))

        work = TileLoop(len(self._tiles), tile)
        self._do(work, worker)

    def write(self, worker: Worker) -> None:
        """Write every output's tensor with its noise, or as it is, and leave the receipts."""
        written = self._write(worker)
        if wild := set[int]().union(*(one.outcomes.wild for one in written)):
            # Only now it is known which matrices are to be left as they are: write the tensor again.
            found = [None if i in wild else UNMEASURED for i in range(len(self.matrices.sums))]
            self.spreads = [found] * len(self._outputs)
            written = self._write(worker, again=True)
        for one in written:
            one.check_range(self._source)
        source_digest = f"blake3:{self._source_hash.hexdigest()}"
        receipts = (one.receipt(source_digest) for one in written)
        faint = sum(self._faint)
        self.receipts = tuple(replace(one, faint=faint) if faint else one for one in receipts)

    def _write(self, worker: Worker, again: bool = False) -> list[_Written]:
        written = [
            _Written(output, self._index, spreads)
            for output, spreads in zip(self._outputs, self.spreads, strict=True)
        ]
        stds = [spread.std for spread in self.spreads[0] if spread is not None]
        limit = faint_below(self._outputs[0].plan.noise, stds) if self._counts_faint else None

        def tile(worker: Worker, index: int) -> None:
            self._write_tile(worker, work, index, written, limit, again)

        work = TileLoop(len(self._tiles), tile)
        self._do(work, worker)
        return written

    def add_exact_sums(self, sums: Mapping[int, NDArray[np.int64]], worker: Worker) -> None:
        """Add the values of each matrix that `sums` has exact sums for to these."""
        for index, (first, _) in enumerate(self._tiles):
            worker.pool.check()
            data = self._buffer_tile(index) if self._buffer is not None else self._read(worker, index)
            self.matrices.add_exact_sums(sums, first, data)

    def _find_spreads(self, worker: Worker) -> Sequence[Sequence[Spread | None]]:
        """Return what each output scales the noise of each matrix with."""
        if self._outputs[0].std is None:
            return [self._own_spreads(worker)] * len(self._outputs)
        finite = [sums.finite for sums in self.matrices.sums]
        return [[Spread(output.std) if known else None for known in finite] for output in self._outputs]

    def _own_spreads(self, worker: Worker) -> list[Spread | None]:
        """Return the spread of each matrix alone, None for one that has none."""
        sums = self.matrices.sums
        spreads = [one.spread() if one.has_std else UNMEASURED if one.finite else None for one in sums]
        undecided = [i for i, spread in enumerate(spreads) if spread is None and sums[i].has_std]
        for at in range(0, len(undecided), EXACT_AT_ONCE):
            exact = {i: new_exact_sums() for i in undecided[at : at + EXACT_AT_ONCE]}
            self.add_exact_sums(exact, worker)
            for i, found in exact.items():
                spreads[i] = sums[i].exact_spread(found)
        return spreads

    def _write_tile(
        self,
        worker: Worker,
        work: TileLoop,
        index: int,
        written: Sequence[_Written],
        limit: float | None,
        again: bool,
    ) -> None:
        """Write a tile to every output; each has a turn of its own, so that threads follow one another.

        Values within ±`limit` are counted before they get noise.
        """
        data = self._buffer_tile(index) if self._buffer is not None else self._read(worker, index)
        first, _ = self._tiles[index]
        if limit is not None:
            self._faint[index] = tiles.faint(data, self.tensor.dtype, limit)
        if not (self.is_measured or again):  # otherwise it was looked at already
            self._look_at(work, index, data)
        for lane, one in enumerate(written, start=1):
            if one.is_plain_copy:
                one.write(first, data)
            else:
                out, counts, overflowed = one.make(self._walk, worker, data, first)
                with work.in_turn(index, lane):
                    one.hash.update(out)
                    one.outcomes.count(counts)
                    one.overflowed += overflowed
                one.write(first, out)
            if not again:
                self._walk.progress(len(data))

    def _look_at(self, work: TileLoop, index: int, data: memoryview) -> None:
        """Take a tile of the source into its digest."""
        with work.in_turn(index):
            self._source_hash.update(data)

    def _divide(self, offset: int, units: Sequence[int]) -> list[tuple[int, int]]:
        """Return (first element, elements) of each tile; `units` are the bytes of an element in each output.

        Of several, the first is shorter where all others then begin at multiples of their size in the first
        output's file, in which the tensor lies at `offset`: as they are written best.
        """
        count = self.tensor.nbytes // self._size
        most = self._walk.tile_bytes // max(self._size, *units)
        before, rest = divmod(-offset % (most * units[0]), units[0])
        if rest or before == 0 or count <= most:
            before = min(most, count)
        firsts = [0, *range(before, count, most)] if count else []
        return [(first, min(count, after) - first) for first, after in pairwise([*firsts, count])]

    def _buffer_tile(self, index: int) -> memoryview:
        assert self._buffer is not None
        first, count = self._tiles[index]
        return self._buffer[first * self._size : (first + count) * self._size]

    def _read(self, worker: Worker, index: int) -> memoryview:
        """Return a tile's bytes, aligned to its elements."""
        first, count = self._tiles[index]
        room = self._buffer_tile(index) if self._buffer is not None else worker.tile[: count * self._size]
        data = self._source.read(self.tensor, first * self._size, room)
        if data is not room and (self._buffer is not None or self.tensor.offset % self._size):
            room[:] = data
            return room
        return data

    def _do(self, work: TileLoop, worker: Worker) -> None:
        """Do a pass; alone where every thread may keep as much, else with whoever is idle or waits for it."""
        if self._buffer is not None and len(self._buffer) * self._walk.threads <= _ALL_KEPT:
            work.help(worker)
        else:
            worker.pool.share(work, worker)


class _Written:
    """One output's tensor while it is written."""

    def __init__(self, output: Output, index: int, spreads: Sequence[Spread | None]) -> None:
        self._step = step = output.plan.steps[index]
        recorded = output.recorded.get(step.tensor.name)
        self.outcomes = Outcomes(output.plan.noise, step, recorded, spreads)
        self.hash = blake3()
        #: How many of the source's finite values the output's dtype cannot hold.
        self.overflowed = 0
        self._unit = _out_unit(step)
        self._target = output.target(step)
        self._sink: Sink = output.sinks[step.tensor.file]

    @property
    def is_plain_copy(self) -> bool:
        """Whether the output has the source's bytes."""
        return not self.outcomes.changes and self._step.out_dtype is None

    def make(
        self, walk: Walk, worker: Worker, data: memoryview, first: int
    ) -> tuple[memoryview, list[Counts], int]:
        """Return the elements from `first` as the output has them, their counts, and how many overflowed."""
        dtype, out_dtype = self._step.tensor.dtype, self._step.out_dtype
        nbytes = len(data) // _unit(self._step.tensor) * self._unit
        out = self._sink.space(self._target, first * self._unit, nbytes)
        if out is None:
            out = worker.out[:nbytes]
        overflowed = 0
        if out_dtype is not None and (not self.outcomes.changes or _narrows(dtype, out_dtype)):
            overflowed = walk.device.convert(data, out, dtype, out_dtype)
        if not self.outcomes.changes:
            return out, [], overflowed
        return out, self.outcomes.add(walk.device, data, out, first), overflowed

    def write(self, first: int, data: memoryview) -> None:
        """Write elements from `first` to their place."""
        self._sink.write(self._target, first * self._unit, data)

    def check_range(self, source: Source) -> None:
        """Raise InputInvalid if the source has a value that overflows by itself, noise or none."""
        if not self.overflowed:
            return
        tensor, dtype = self._step.tensor, self._step.out_dtype or ""
        raise InputInvalid(
            f"cannot convert to {dtype}",
            path=source.path,
            tensor=tensor.name,
            why=f"{self.overflowed:,} of its {tensor.elements:,} values are beyond {LARGEST[dtype]:g}, "
            "the largest of that dtype",
            next_step="Choose a --dtype of a larger range, such as bfloat16 or float32",
        )

    def receipt(self, source_digest: str) -> Receipt:
        """Return what was done; a plain copy has the source's digest."""
        digest = source_digest if self.is_plain_copy else f"blake3:{self.hash.hexdigest()}"
        return self.outcomes.receipt(source_digest, digest)


def _unit(tensor: TensorSpec) -> int:
    """Return the bytes of an element; of what takes no noise, bytes are the elements."""
    return FLOAT_DTYPES.get(tensor.dtype, 1)


def _out_unit(step: Step) -> int:
    """Return the bytes of an element in the output."""
    return _unit(step.tensor) if step.out_dtype is None else FLOAT_DTYPES[step.out_dtype]


def _narrows(dtype: str, out_dtype: str) -> bool:
    return LARGEST[dtype] > LARGEST[out_dtype]
