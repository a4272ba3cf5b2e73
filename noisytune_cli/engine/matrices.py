"""The matrices of a tensor on its walk: all that is done to each alone, tile by tile.

A tensor is one matrix, or has several (`Step.parts`). `Matrices` measures them, once for all outputs;
`Outcomes` are what one output makes of them: it adds to each its own noise, and leaves the tensor's receipt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from noisytune_cli.engine import tiles
from noisytune_cli.engine.matrix import Outcome, Spread, Sums
from noisytune_cli.noise.devices import Device
from noisytune_cli.noise.stream import stream_words
from noisytune_cli.records import NoiseSpec, Part, PartReceipt, Receipt, Step, TensorSpec, summed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The most parts that exact sums are kept of at a time: those of one are 128 KiB.
EXACT_AT_ONCE = 64


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
