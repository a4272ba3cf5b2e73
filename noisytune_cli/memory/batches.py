"""Noise for the parameters of a model in memory, begun a batch at a time, and the receipts for it.

A GPU is given noise to add as soon as a few amplitudes are settled, and adds it while Python settles the next
and writes receipts: for a model of some hundreds of parameters that takes about as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from noisytune_cli.engine.matrix import receipt_of
from noisytune_cli.memory import in_place, matrices
from noisytune_cli.memory.ahead import FIRST_BATCH, SumsAhead
from noisytune_cli.memory.plan import Parameter
from noisytune_cli.memory.sharded import Dose
from noisytune_cli.noise.amplitudes import noise_of
from noisytune_cli.records import NoiseSpec, Receipt


def batches(parameters: Sequence[Parameter], noise: NoiseSpec, ahead: SumsAhead) -> Iterator[list[Parameter]]:
    """Yield the parameters in batches to settle and to begin one after the other.

    What no device measures ahead is one batch, the last. So is everything where one std is that of all.
    """
    early, rest = [], list(parameters)
    if noise.scope != "global":
        early = [p for p in parameters if p.live.tensor in ahead and not p.is_divided]
        rest = [p for p in parameters if p.live.tensor not in ahead or p.is_divided]
    size = FIRST_BATCH
    while early:
        yield early[:size]
        del early[:size]
        size *= 2
    yield rest


def begin(parameters: Sequence[Parameter], noise: NoiseSpec, threads: int) -> Callable[[], None]:
    """Add noise to settled parameters; return what waits for it where a device adds it, and counts it.

    A parameter with a target is written there, without noise too.
    """
    noised, doses = [], []
    divided, parted = [], []
    for parameter in parameters:
        noises = tuple(
            [
                noise_of(noise, parameter.steps[0].stream, matrix.outcome)
                for matrix in parameter.matrices
                if matrix.outcome is not None  # as all are, once settled
            ]
        )
        held, base = parameter.live.held, None
        if parameter.target is not None:
            held, base = parameter.target, held.values.view(-1)
            if parameter.is_divided or noises[0] is None:
                in_place.overwrite(held.values, base)
        if parameter.is_divided and any(noises):
            divided.append(parameter)
            parts = tuple([matrix.part for matrix in parameter.matrices])
            parted.append(matrices.PartedDose(held, parts, noises))
        elif noises[0] is not None:
            noised.append(parameter)
            doses.append(Dose(held, noises[0], base))
    counted = in_place.begin_noise(doses, threads)
    for parameter, by_part in zip(divided, matrices.add_noise(parted, threads), strict=True):
        _count(parameter, by_part)

    def finish() -> None:
        for parameter, counts in zip(noised, counted(), strict=True):
            _count(parameter, [counts])

    return finish


def _count(parameter: Parameter, counts: Sequence[tuple[int, int]]) -> None:
    for matrix, (unchanged, clamped) in zip(parameter.matrices, counts, strict=True):
        assert matrix.outcome is not None
        if matrix.outcome.action == "perturb":  # what is only shrunk has no noise that rounding could lose
            matrix.outcome = replace(matrix.outcome, unchanged=unchanged, clamped=clamped)


def receipts_of(parameter: Parameter) -> list[Receipt]:
    """Return what was done, once for each name of a parameter."""
    outcomes = [matrix.outcome for matrix in parameter.matrices if matrix.outcome is not None]
    receipts = [receipt_of(step, outcomes) for step in parameter.steps]
    return [replace(receipt, faint=parameter.faint) for receipt in receipts] if parameter.faint else receipts
