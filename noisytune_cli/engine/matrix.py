"""A part of a tensor: values that share one standard deviation.

A tensor is one part, or has one for each of its matrices. A part is measured once, whatever the number of
outputs (`Sums`). What each output makes of it, an amplitude or the reason why there is none, and the counts
of what was added, is an `Outcome`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from noisytune_cli.noise import distributions
from noisytune_cli.noise.std import Moments, exact_std, exactly_equal, std_and_equality
from noisytune_cli.records import NoiseSpec, Part, PartReceipt, Reason, Receipt, Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Spread(NamedTuple):
    """The std32 to scale noise with, and whether it is 0 because all values are equal."""

    std: float
    constant: bool = False


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


class Outcome:
    """What one output makes of a part (None: of the whole tensor).

    `recorded` is what an earlier run made of it, whose numbers then hold.
    """

    def __init__(
        self, noise: NoiseSpec, step: Step, part: Part | None, recorded: Receipt | PartReceipt | None
    ) -> None:
        self._noise, self._step, self._part, self._recorded = noise, step, part, recorded
        self.reason: Reason | None = step.reason if recorded is None else recorded.reason
        self.std: float | None = None
        self.amplitude: float | None = None
        self.unchanged = self.clamped = 0

    def settle(self, spread: Spread | None) -> None:
        """Take the amplitude from the spread of the part's values, which is None where there is none."""
        if self._recorded is not None:
            self.std, self.amplitude = self._recorded.std, self._recorded.amplitude
        elif self._step.action == "copy":
            return
        elif self._part is not None and self._part.elements == 1 and self._noise.scope == "matrix":
            self.reason = "one-element"
        elif spread is None:
            self.reason = "non-finite"
        else:
            self.std = spread.std
            amplitude = float(self._distribution().amplitude(self._step.lam, spread.std))
            if spread.constant:
                self.reason = "constant"
            elif amplitude in (0.0, float("inf")):
                self.reason = "unrepresentable"
            else:
                self.amplitude = amplitude

    def receipt(self, source_digest: str, digest: str) -> Receipt:
        """Return what was done to the whole tensor."""
        return Receipt(step=self._step, source_digest=source_digest, digest=digest, **self._done())

    def part_receipt(self) -> PartReceipt:
        """Return what was done to the part."""
        assert self._part is not None
        return PartReceipt(part=self._part, **self._done())

    def _done(self) -> dict[str, Any]:
        perturbed = self.amplitude is not None
        noise_range = {} if self.amplitude is None else self._distribution().noise_range(self.amplitude)
        return {
            "action": "perturb" if perturbed else "copy",
            "reason": self.reason,
            "lam": self._step.lam if perturbed else 0.0,
            "std": self.std,
            "amplitude": self.amplitude,
            "low": noise_range.get("low"),
            "high": noise_range.get("high"),
            "noise_std": noise_range.get("noise_std"),
            "unchanged": self.unchanged,
            "clamped": self.clamped,
        }

    def _distribution(self) -> distributions.Distribution:
        return distributions.load(self._noise.distribution)
