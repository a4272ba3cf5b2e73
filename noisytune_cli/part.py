"""A part of a tensor: values that share one standard deviation (for now a tensor is one part).

A part is measured once, whatever the number of outputs (`Part`). What each output makes of it, an amplitude
or the reason why there is none, and the counts of what was added, is an `Outcome`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from noisytune_cli import distributions
from noisytune_cli.devices import Device
from noisytune_cli.moments import Moments, all_equal, exact_std, exactly_equal, round_std
from noisytune_cli.records import NoiseSpec, Reason, Receipt, Step
from noisytune_cli.stream import stream_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Spread(NamedTuple):
    """The std32 to scale noise with, and whether it is 0 because all values are equal."""

    std: float
    constant: bool = False


class Part:
    """The sums of a part's values, tile by tile."""

    def __init__(self, device: Device, dtype: str, elements: int, tiles: int) -> None:
        self.elements = elements
        self._device, self._dtype = device, dtype
        self._moments: list[Moments | None] = [None] * tiles

    def measure(self, index: int, data: memoryview) -> None:
        """Take the sums of tile `index`."""
        self._moments[index] = self._device.moments(data, self._dtype)

    @property
    def moments(self) -> list[Moments]:
        """The sums of every tile, once measured."""
        return [m for m in self._moments if m is not None]

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite, once measured."""
        return all(m.finite for m in self.moments)

    def spread(self, exact_sums: Callable[[], NDArray[np.int64]]) -> Spread:
        """Return the spread of the part alone; `exact_sums` adds values up where float64 cannot decide."""
        std = round_std(self.moments)
        if std is not None:
            return Spread(std, all_equal(self.moments))
        sums = exact_sums()
        return Spread(exact_std(sums, self.elements), exactly_equal(sums, self.elements))


class Outcome:
    """What one output makes of a part; `recorded` is an earlier run's receipt, whose numbers then hold."""

    def __init__(self, noise: NoiseSpec, step: Step, recorded: Receipt | None) -> None:
        self._noise, self._step, self._recorded = noise, step, recorded
        self._stream = stream_words(noise.seed, step.stream)
        self.reason: Reason | None = step.reason
        self.std: float | None = None
        self.amplitude: float | None = None
        self.unchanged = self.clamped = 0

    def settle(self, spread: Spread | None) -> None:
        """Take the amplitude from the spread of the part's values, which is None where one is not finite."""
        if self._recorded is not None:
            self.std, self.amplitude = self._recorded.std, self._recorded.amplitude
        elif self._step.action == "copy":
            return
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

    def add(self, device: Device, data: memoryview, out: memoryview, first: int) -> tuple[int, int]:
        """Write elements `first`… of the part with their noise to `out`; return (unchanged, clamped)."""
        assert self.amplitude is not None
        return device.add_noise(
            data,
            out,
            self._step.tensor.dtype,
            self._step.out_dtype,
            distribution=self._noise.distribution,
            stream=self._stream,
            first=first,
            amplitude=self.amplitude,
        )

    def receipt(self, source_digest: str, digest: str) -> Receipt:
        """Return what was done."""
        perturbed = self.amplitude is not None
        noise_range = self._distribution().noise_range(self.amplitude) if self.amplitude is not None else {}
        return Receipt(
            step=self._step,
            action="perturb" if perturbed else "copy",
            reason=self.reason,
            lam=self._step.lam if perturbed else 0.0,
            std=self.std,
            amplitude=self.amplitude,
            low=noise_range.get("low"),
            high=noise_range.get("high"),
            noise_std=noise_range.get("noise_std"),
            unchanged=self.unchanged,
            clamped=self.clamped,
            source_digest=source_digest,
            digest=digest,
        )

    def _distribution(self) -> distributions.Distribution:
        return distributions.load(self._noise.distribution)
