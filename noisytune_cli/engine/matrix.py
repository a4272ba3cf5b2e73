"""The matrices of a tensor on its walk: what a matrix's std makes of it, and what is done to each alone.

A tensor is one matrix, or has several (`Step.matrices`): values that share one std. A matrix is measured
once, whatever the number of outputs (`Sums`), and `outcome_of` is the one rule from its spread to an
amplitude, or to the reason why there is none. `Matrices` measures all of a tensor, tile by tile; `Outcomes`
are what one output makes of them: it adds to each its own noise, and leaves the tensor's receipt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from noisytune_cli.engine import tiles
from noisytune_cli.escape import enumerate_some
from noisytune_cli.noise import distributions
from noisytune_cli.noise.amplitudes import amplitudes, noise_of, overall
from noisytune_cli.noise.devices import Device
from noisytune_cli.noise.std import Moments, exact_std, exactly_equal, std_and_equality
from noisytune_cli.records import (
    Action,
    NoiseSpec,
    Outcome,
    Part,
    PartReceipt,
    Receipt,
    Step,
    TensorSpec,
    copied,
    outcome_fields,
    summed,
    whole,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: A value of less than this part of its matrix's std is drowned by the noise.
_FAINT = 1 / 30

#: The most parts that exact sums are kept of at a time: those of one are 128 KiB.
EXACT_AT_ONCE = 64


class Spread(NamedTuple):
    """The std32 to scale noise with, if any is needed, and whether it is 0 because all values are equal."""

    std: float | None
    constant: bool = False


#: What is known of a matrix that is not measured: its values are taken for finite until noise meets others.
UNMEASURED = Spread(None)


class Sums:
    """The sums of a part's values, tile by tile."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self._moments: dict[int, Moments] = {}

    def add(self, tile: int, moments: Moments) -> None:
        """Take the sums of what a tile has of the part."""
        self._moments[tile] = moments

    @property
    def moments(self) -> list[Moments]:
        """The sums of every tile that has some of the part, once measured."""
        return list(self._moments.values())

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite, once measured."""
        return all(m.finite for m in self._moments.values())

    @property
    def has_std(self) -> bool:
        """Whether the part has a standard deviation of its own, once measured."""
        return self.finite and self.elements > 1

    def spread(self) -> Spread | None:
        """Return the spread of the part alone, or None where float64 cannot decide it."""
        found = std_and_equality(self.moments)
        return None if found is None else Spread(*found)

    def exact_spread(self, sums: NDArray[np.int64]) -> Spread:
        """Return the spread from the exact sums of all values."""
        return Spread(exact_std(sums, self.elements), exactly_equal(sums, self.elements))


def outcome_of(noise: NoiseSpec, step: Step, matrix: Part, spread: Spread | None) -> Outcome:
    """Return what comes of a step's matrix from the spread of its values, None if these are not all finite.

    A matrix that the plan copies needs none.
    """
    if step.action == "copy":
        return copied(step.reason)
    action: Action = "copy" if noise.kept == 1.0 else "shrink"
    if matrix.elements == 1 and noise.scope == "matrix" and (spread is not None or action == "copy"):
        return replace(copied("one-element"), action=action)
    if spread is None:
        return copied("non-finite")
    if step.reason is not None:
        return replace(copied(step.reason), action=action)
    if spread.constant:
        return replace(copied("constant", spread.std), action=action)
    amplitude = overall(noise, amplitudes(noise, step.lam, spread.std))
    if not 0.0 < abs(amplitude) < float("inf"):
        return replace(copied("unrepresentable", spread.std), action=action)
    bounds = distributions.load(noise.distribution).noise_range(amplitude).get
    return Outcome(
        "perturb",
        None,
        step.lam,
        spread.std,
        amplitude,
        bounds("low"),
        bounds("high"),
        bounds("noise_std"),
        unchanged=0,
        clamped=0,
    )


def receipt_of(step: Step, outcomes: Sequence[Outcome], source_digest: str = "", digest: str = "") -> Receipt:
    """Return the receipt of a tensor from what came of each of its matrices."""
    if len(outcomes) == 1:
        return Receipt(*outcome_fields(outcomes[0]), step, source_digest, digest)
    parts = zip(outcomes, step.parts, strict=True)
    receipts = tuple([PartReceipt(*outcome_fields(outcome), part) for outcome, part in parts])
    return summed(step, receipts, source_digest, digest)


class Counts(NamedTuple):
    """How many elements of a part were left as they would be without noise, and were clamped."""

    part: int
    unchanged: int
    clamped: int


class Matrices:
    """The sums of each matrix of a tensor."""

    def __init__(self, device: Device, tensor: TensorSpec, parts: Sequence[Part]) -> None:
        self._device, self._dtype = device, tensor.dtype
        self._places = tiles.Places(parts)
        self.sums = [Sums(part.elements) for part in parts]

    def measure(self, index: int, first: int, data: memoryview) -> None:
        """Take the sums of tile `index`, whose first element is `first`."""
        for part, values in self._places.values(first, data, self._dtype):
            self.sums[part].add(index, self._device.moments(values, self._dtype))

    def add_exact_sums(self, sums: Mapping[int, NDArray[np.int64]], first: int, data: memoryview) -> None:
        """Add a tile's values to the exact sums of their part, for those parts that have some in `sums`."""
        for part, values in self._places.values(first, data, self._dtype, sums):
            self._device.add_exact_sums(values, self._dtype, sums[part])


class Outcomes:
    """What one output makes of each matrix of a tensor."""

    def __init__(
        self, noise: NoiseSpec, step: Step, recorded: Receipt | None, spreads: Sequence[Spread | None]
    ) -> None:
        """Take the amplitudes from the spreads of the matrices, or from what an earlier run recorded.

        A spread is None where a matrix has none; without any, none was measured.
        """
        self._step = step
        #: The matrices that were taken for finite, and are not: what was written of them is wrong.
        self.wild: set[int] = set()
        self._is_measured = recorded is not None or bool(spreads)
        # What the plan copies is never taken apart.
        parts = (whole(step.tensor),) if step.action == "copy" else step.matrices
        self._places = tiles.Places(parts)
        self._outcomes: Sequence[Outcome]
        if recorded is not None:
            self._outcomes = recorded.parts or (recorded,)
        else:
            # Another output may have measured what is copied here.
            found = spreads if spreads and step.action != "copy" else [UNMEASURED] * len(parts)
            self._outcomes = [outcome_of(noise, step, *one) for one in zip(parts, found, strict=True)]
        self._noises = [noise_of(noise, step.stream, one) for one in self._outcomes]
        self._counts = [[0, 0] for _ in parts]
        self.changes = any(self._noises)

    def add(self, device: Device, data: memoryview, out: memoryview, first: int) -> list[Counts]:
        """Write a tile's elements, from `first` of the tensor, to `out`: with noise or as they are."""
        dtype = self._step.tensor.dtype
        out_dtype = self._step.out_dtype or dtype
        present = list(self._places.in_tile(first, tiles.count(data, dtype)))
        if any(self._noises[part] is None for part, _ in present):
            if out_dtype == dtype:
                out[:] = data
            else:
                device.convert(data, out, dtype, out_dtype)
        done = []
        for part, blocks in present:
            if (noise := self._noises[part]) is not None:
                counts = tiles.add_noise(device, data, out, dtype, out_dtype, blocks, noise, first)
                if noise.terms:  # what is only shrunk has no noise that rounding could lose
                    done.append(Counts(part, *counts))
                # Noise on a NaN or an infinity is counted as clamped, but not where sums are float64: none is
                # looked at there, since no noise makes one overflow.
                if (counts[1] or dtype == out_dtype == "F64") and not self._is_measured:
                    values = tiles.gather(data, dtype, blocks)
                    if not device.moments(values, dtype).finite:
                        self.wild.add(part)
        return done

    def count(self, done: Sequence[Counts]) -> None:
        """Add up what `add` returned; one thread at a time."""
        for part, unchanged, clamped in done:
            self._counts[part][0] += unchanged
            self._counts[part][1] += clamped

    def receipt(self, source_digest: str, digest: str) -> Receipt:
        """Return what was done."""
        done = [
            replace(outcome, unchanged=unchanged, clamped=clamped)
            for outcome, (unchanged, clamped) in zip(self._outcomes, self._counts, strict=True)
        ]
        return receipt_of(self._step, done, source_digest, digest)


def faint_below(noise: NoiseSpec, stds: Iterable[float | None]) -> float:
    """Return up to which size values are faint beside noise of these stds; 0 where none is their own.

    At λ 0.15 that is less than the noise's std (λ/√12 of theirs). Of a normal distribution 3 % are so small;
    half are where a few extreme values make the std, such as those that forbid a transition (-10000). Of
    several matrices the smallest std counts, so that none is faint beside another's.
    """
    return 0.0 if noise.scope == "global" else min(filter(None, stds), default=0.0) * _FAINT


def warnings_of(receipts: Sequence[Receipt]) -> list[str]:
    """Say which tensors the noise could not reach, or hardly; a line for each kind, not for each tensor."""
    broken = [r.step.tensor.name for r in receipts if r.reason == "non-finite" and not r.parts]
    broken += [
        f"{r.step.tensor.name}[{p.part.name}]" for r in receipts for p in r.parts if p.reason == "non-finite"
    ]
    faint = [r.step for r in receipts if r.action == "perturb" and r.faint * 2 >= r.step.tensor.elements]
    numb = [r.step for r in receipts if r.unchanged * 2 > r.step.tensor.elements]
    warnings = []
    if broken:
        warnings.append(
            f"{enumerate_some(broken, 3)}: left without noise, because of values that are NaN or infinite"
        )
    if faint:
        names = enumerate_some([step.tensor.name for step in faint], 3)
        warnings.append(
            f"{names}: half of the values or more were 0, or less than a thirtieth of their std, and have "
            "noise now; --exclude keeps pruned weights, and those whose std a few extreme values make"
        )
    if numb:
        dtypes = "/".join(sorted({step.out_dtype or step.tensor.dtype for step in numb}))
        names = enumerate_some([step.tensor.name for step in numb], 3)
        warnings.append(
            f"{names}: rounding to {dtypes} left more than half of the elements without noise "
            "(the manifest has the counts)"
        )
    return warnings
