"""The walk over a checkpoint: every tensor from its source to all outputs, and its receipts.

Several outputs may be made at once; they differ in their noise, and share tensors, reads and sums. Each
tensor is one task of a crew of threads, so that all its stages run in one core's cache; idle threads help
with a tensor's tiles. Memory is the same for any checkpoint and any number of outputs: a slab and two tiles
for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from noisytune_cli.checkpoint.formats import Sink, Source
from noisytune_cli.engine.matrix import Spread
from noisytune_cli.engine.tensor_walk import TensorWalk
from noisytune_cli.engine.threads import Crew, Hands, Task
from noisytune_cli.noise.devices import Device
from noisytune_cli.noise.std import exact_std, new_exact_sums, round_std
from noisytune_cli.records import Plan, Receipt, Step, TensorSpec

#: Bytes of a tile: long enough that Python's part of the work is small, short enough for the caches.
TILE_BYTES = 1 << 20

#: Bytes that all slabs together may take, and the most that one is given.
_ALL_SLABS, _LARGEST_SLAB = 128 << 20, 64 << 20


def _no_progress(nbytes: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Variant:
    """One output of a walk: its plan and, by the source's file names, the sinks of its weight files.

    `targets` are, by tensor name, the tensors that lie elsewhere in the output's file than in the source's.
    `recorded` are an earlier run's receipts by tensor name: the tensors are not measured for this output, but
    get the std and the amplitude that stand there. They are all or none.
    """

    plan: Plan
    sinks: Mapping[str, Sink]
    targets: Mapping[str, TensorSpec] = field(default_factory=dict)
    recorded: Mapping[str, Receipt] = field(default_factory=dict)

    def target(self, step: Step) -> TensorSpec:
        """Return a step's tensor as it is in the output."""
        return self.targets.get(step.tensor.name, step.tensor)

    def measures(self, index: int) -> bool:
        """Say whether the std of the `index`-th tensor is needed."""
        return self.plan.steps[index].action == "perturb" and not self.recorded


@dataclass(frozen=True)
class Walk:
    """How to carry out plans; none of it changes a byte of the result.

    `tile_bytes` is a multiple of 32. `progress` is called, from any thread, with the bytes just finished;
    over a run they add up to `work_bytes`.
    """

    device: Device
    threads: int = 1
    tile_bytes: int = TILE_BYTES
    progress: Callable[[int], None] = _no_progress

    def carry_out(
        self, outputs: Sequence[Variant], sources: Mapping[str, Source]
    ) -> tuple[tuple[Receipt, ...], ...]:
        """Carry out every step; return each output's receipts in its plan's order.

        The plans have the same tensors in the same order, and noise that differs in seed and λ alone. The
        sinks are left unfinished.
        """
        tensors = [step.tensor for step in outputs[0].plan.steps]
        receipts: list[tuple[Receipt, ...]] = [()] * len(tensors)

        def prepare(index: int) -> TensorWalk:
            return TensorWalk(self, outputs, index, sources[tensors[index].file])

        def walk_alone(index: int, hands: Hands) -> None:
            tensor = prepare(index)
            tensor.measure_and_write(hands)
            receipts[index] = tensor.receipts

        if _measures_apart(outputs):
            walks = [prepare(index) for index in range(len(tensors))]
            self._run(walk.measure for walk in walks if walk.is_measured)
            self._settle_together(outputs, walks)
            self._run(walk.write for walk in walks)
            receipts = [walk.receipts for walk in walks]
        else:
            self._run(partial(walk_alone, index) for index in range(len(tensors)))
        return tuple(tuple(one[i] for one in receipts) for i in range(len(outputs)))

    def _settle_together(self, outputs: Sequence[Variant], walks: Sequence[TensorWalk]) -> None:
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
        if std is None:
            exact = new_exact_sums()
            tasks = (
                partial(walk.add_exact_sums, {i: exact for i, s in enumerate(walk.matrices.sums) if s.finite})
                for walk in walks
            )
            self._run(tasks, threads=1)
            std = exact_std(exact, count)
        return std

    def _run(self, tasks: Iterable[Task], threads: int | None = None) -> None:
        slab_bytes = min(_LARGEST_SLAB, _ALL_SLABS // self.threads)
        Crew(tasks, tile_bytes=self.tile_bytes, slab_bytes=slab_bytes).run(threads or self.threads)


def work_bytes(outputs: Sequence[Variant]) -> int:
    """Return how many bytes of progress carrying out `outputs` reports."""
    apart = _measures_apart(outputs)
    total = 0
    for index, step in enumerate(outputs[0].plan.steps):
        measured = apart and any(output.measures(index) for output in outputs)
        total += step.tensor.nbytes * (len(outputs) + measured)
    return total


def _measures_apart(outputs: Sequence[Variant]) -> bool:
    """Say whether every tensor is measured before the first is written."""
    return outputs[0].plan.noise.scope == "global" and not all(output.recorded for output in outputs)
