"""The matrices of a tensor on its walk: what a matrix's std makes of it, and all that is done to each alone.

A tensor is one matrix, or has several (`Step.parts`): values that share one standard deviation. A matrix is
measured once, whatever the number of outputs (`Sums`). What each output makes of it, an amplitude or the
reason why there is none, and the counts of what was added, is an `Outcome`. `Matrices` measures all of a
tensor, tile by tile; `Outcomes` are what one output makes of them: it adds to each its own noise, and leaves
the tensor's receipt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from noisytune_cli.engine import tiles
from noisytune_cli.noise import distributions
from noisytune_cli.noise.devices import Device
from noisytune_cli.noise.std import Moments, exact_std, exactly_equal, std_and_equality
from noisytune_cli.noise.stream import stream_words
from noisytune_cli.records import NoiseSpec, Part, PartReceipt, Reason, Receipt, Step, TensorSpec, summed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The most parts that exact sums are kept of at a time: those of one are 128 KiB.
EXACT_AT_ONCE = 64


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


class Counts(NamedTuple):
    """How many elements of a part were left as they would be without noise, and were clamped."""

    part: int
    unchanged: int
    clamped: int


class Matrices:
    """The sums of each matrix of a tensor."""

    def __init__(self, device: Device, tensor: TensorSpec, parts: Sequence[Part]) -> None:
        self._device, self._dtype = device, tensor.dtype
        self._places = tiles.Places(parts) if parts else None
        self.sums = [Sums(size) for size in [part.elements for part in parts] or [tensor.elements]]

    def measure(self, index: int, first: int, data: memoryview) -> None:
        """Take the sums of tile `index`, whose first element is `first`."""
        for part, values in self._values(first, data):
            self.sums[part].add(index, self._device.moments(values, self._dtype))

    def add_exact_sums(self, sums: Mapping[int, NDArray[np.int64]], first: int, data: memoryview) -> None:
        """Add a tile's values to the exact sums of their part, for those parts that have some in `sums`."""
        for part, values in self._values(first, data, sums):
            self._device.add_exact_sums(values, self._dtype, sums[part])

    def _values(
        self, first: int, data: memoryview, wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield each part that a tile has some of, with its elements there, one after the other."""
        if self._places is None:
            if wanted is None or 0 in wanted:
                yield 0, data
            return
        for part, blocks in self._places.in_tile(first, tiles.count(data, self._dtype)):
            if wanted is None or part in wanted:
                yield part, tiles.gather(data, self._dtype, blocks)


class Outcomes:
    """What one output makes of each matrix of a tensor."""

    def __init__(
        self, noise: NoiseSpec, step: Step, recorded: Receipt | None, spreads: Sequence[Spread | None]
    ) -> None:
        """Take the amplitudes from the spreads of the matrices, or from what an earlier run recorded.

        A spread is None where a matrix has none; without any, none was needed.
        """
        self._noise, self._step = noise, step
        self._stream = stream_words(noise.seed, step.stream)
        # What the plan copies is never taken apart.
        parts: Sequence[Part | None] = step.parts if step.action == "perturb" else ()
        self._places = tiles.Places(step.parts) if parts else None
        earlier: Sequence[Receipt | PartReceipt | None] = recorded.parts if parts and recorded else [recorded]
        if parts and recorded is None:
            earlier = [None] * len(parts)
        self._outcomes = [
            Outcome(noise, step, part, once) for part, once in zip(parts or (None,), earlier, strict=True)
        ]
        for i, outcome in enumerate(self._outcomes):
            outcome.settle(spreads[i] if spreads else None)
        self.perturbs = any(outcome.amplitude is not None for outcome in self._outcomes)

    def add(self, device: Device, data: memoryview, out: memoryview, first: int) -> list[Counts]:
        """Write a tile's elements, from `first` of the tensor, to `out`: with noise or as they are."""
        dtype = self._step.tensor.dtype
        out_dtype = self._step.out_dtype or dtype
        if self._places is None:
            (outcome,) = self._outcomes
            assert outcome.amplitude is not None
            counts = device.add_noise(
                data,
                out,
                dtype,
                out_dtype,
                distribution=self._noise.distribution,
                stream=self._stream,
                first=first,
                amplitude=outcome.amplitude,
            )
            return [Counts(0, *counts)]
        done = []
        present = list(self._places.in_tile(first, tiles.count(data, dtype)))
        if any(self._outcomes[part].amplitude is None for part, _ in present):
            if out_dtype == dtype:
                out[:] = data
            else:
                device.convert(data, out, dtype, out_dtype)
        for part, blocks in present:
            amplitude = self._outcomes[part].amplitude
            if amplitude is not None:
                counts = tiles.add_noise(
                    device,
                    data,
                    out,
                    dtype,
                    out_dtype,
                    blocks,
                    distribution=self._noise.distribution,
                    stream=self._stream,
                    first=first,
                    amplitude=amplitude,
                )
                done.append(Counts(part, *counts))
        return done

    def count(self, done: Sequence[Counts]) -> None:
        """Add up what `add` returned; one thread at a time."""
        for part, unchanged, clamped in done:
            self._outcomes[part].unchanged += unchanged
            self._outcomes[part].clamped += clamped

    def receipt(self, source_digest: str, digest: str) -> Receipt:
        """Return what was done."""
        if self._places is None:
            return self._outcomes[0].receipt(source_digest, digest)
        parts = tuple(outcome.part_receipt() for outcome in self._outcomes)
        return summed(self._step, parts, source_digest, digest)
