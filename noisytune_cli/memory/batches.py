"""Noise for the parameters of a model in memory, begun a batch at a time, and the receipts for it.

A GPU is given noise to add as soon as a few amplitudes are settled, and adds it while Python settles the next
and writes receipts: for a model of some hundreds of parameters that takes about as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from noisytune_cli.memory import in_place, matrices
from noisytune_cli.memory.ahead import FIRST_BATCH, SumsAhead
from noisytune_cli.memory.plan import Matrix, Parameter
from noisytune_cli.memory.sharded import Dose
from noisytune_cli.noise import distributions
from noisytune_cli.records import NoiseSpec, PartReceipt, Receipt, Step, summed


def batches(parameters: Sequence[Parameter], noise: NoiseSpec, ahead: SumsAhead) -> Iterator[list[Parameter]]:
    """Yield the parameters in batches to settle and to begin one after the other.

    What no device measures ahead is one batch, the last. So is everything where one std is that of all.
    """
    early, rest = [], list(parameters)
    if noise.scope == "matrix":
        early = [p for p in parameters if p.resident.tensor in ahead and not p.parts]
        rest = [p for p in parameters if p.resident.tensor not in ahead or p.parts]
    size = FIRST_BATCH
    while early:
        yield early[:size]
        del early[:size]
        size *= 2
    yield rest


def begin(parameters: Sequence[Parameter], noise: NoiseSpec, threads: int) -> Callable[[], None]:
    """Add noise to settled parameters; return what waits for it where a device adds it, and counts it."""
    noised, doses = [], []
    divided, parted = [], []
    for parameter in parameters:
        amplitudes = tuple([None if m.reason is not None else m.amplitude for m in parameter.matrices])
        if amplitudes.count(None) == len(amplitudes):
            continue
        held, stream, parts = parameter.resident.held, parameter.stream, parameter.parts
        if parts:
            divided.append(parameter)
            parted.append(matrices.PartedDose(held, parts, noise.distribution, stream, amplitudes))
        elif amplitudes[0] is not None:
            noised.append(parameter)
            doses.append(Dose(held, noise.distribution, stream, amplitudes[0]))
    counted = in_place.begin_noise(doses, threads)
    for parameter, by_part in zip(divided, matrices.add_noise(parted, threads), strict=True):
        for matrix, counts in zip(parameter.matrices, by_part, strict=True):
            matrix.unchanged, matrix.clamped = counts

    def finish() -> None:
        for parameter, counts in zip(noised, counted(), strict=True):
            (matrix,) = parameter.matrices
            matrix.unchanged, matrix.clamped = counts

    return finish


def receipts_of(parameter: Parameter, noise: NoiseSpec) -> list[Receipt]:
    """Return what was done, once for each name of a parameter."""
    receipts = []
    for step in parameter.steps:
        done = [_done(matrix, step, noise) for matrix in parameter.matrices]
        if parameter.parts:
            parts = tuple(
                PartReceipt(part=part, **fields) for part, fields in zip(parameter.parts, done, strict=True)
            )
            receipts.append(summed(step, parts, "", ""))
        else:
            receipts.append(Receipt(step=step, source_digest="", digest="", **done[0]))
    return receipts


def _done(matrix: Matrix, step: Step, noise: NoiseSpec) -> dict[str, Any]:
    amplitude = matrix.amplitude
    noise_range = {} if amplitude is None else distributions.load(noise.distribution).noise_range(amplitude)
    return {
        "action": "copy" if amplitude is None else "perturb",
        "reason": matrix.reason,
        "lam": 0.0 if amplitude is None else step.lam,
        "std": matrix.std,
        "amplitude": amplitude,
        "low": noise_range.get("low"),
        "high": noise_range.get("high"),
        "noise_std": noise_range.get("noise_std"),
        "unchanged": matrix.unchanged,
        "clamped": matrix.clamped,
    }
