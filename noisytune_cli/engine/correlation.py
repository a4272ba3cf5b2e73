"""How far the values of tensors go with noise: Σ(y - ȳ)c over each, for many noises from one read.

y are the stored values or, where there is a base, what they differ from it by; c is the noise of unit
amplitude, which the CPU's kernels draw by adding it to zeros. A tile's values are made standard about its own
mean before they become float32, so no large mean drowns a small correlation. Tiles are added up in order:
every number is the same for any count of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.threads import Pool, TileLoop, Worker
from noisytune_cli.engine.tile_values import TILE, read_values
from noisytune_cli.noise.devices import Device
from noisytune_cli.noise.stream import Noise, stream_words
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Values at a time, which stay in the cache while many noises go over them.
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Suspect:
    """A tensor that may have noise in it, the file it lies in, and perhaps what it was before."""

    tensor: TensorSpec
    source: Source
    base: tuple[TensorSpec, Source] | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Noise of unit amplitude: of a distribution and a seed, with a stream's name for each tensor."""

    distribution: str
    seed: int
    streams: Sequence[str]

    def noise(self, tensor: int) -> Noise:
        """Return that of a tensor, by its index."""
        return Noise.of(self.distribution, stream_words(self.seed, self.streams[tensor]), 1.0)


@dataclass(frozen=True)
class Correlation:
    """What the values of a tensor say of noises: `dots` are Σ(y - ȳ)c and `squares` Σ(c - c̄)², one for each.

    `std` is that of y and `scale` that of what the noise was scaled by, the base's or the tensor's own. A
    tensor with values that are not finite has none: its std is NaN.
    """

    elements: int
    std: float
    scale: float
    dots: NDArray[np.float64]
    squares: NDArray[np.float64]


def correlate(
    suspects: Sequence[Suspect],
    draws: Sequence[Draw],
    device: Device,
    *,
    threads: int,
    progress: Callable[[int], None],
) -> list[Correlation]:
    """Return how far each tensor goes with each of the `draws`.

    `progress` is called, from any thread, with the bytes just read.
    """
    jobs = [_Job(index, suspect, draws, device, progress) for index, suspect in enumerate(suspects)]
    buffer = 2 * _BLOCK * FLOAT_DTYPES["F32"]
    Pool([job.run for job in jobs], tile_bytes=TILE * 8, buffer_bytes=buffer).run(threads)
    return [job.result() for job in jobs]


class _Spread:
    """Count, mean and Σ(x - mean)² of what was added so far (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self._count = 0
        self.mean = self._squares = 0.0

    def add(self, count: int, mean: float, squares: float) -> None:
        """Add what a tile has."""
        total = self._count + count
        shift = mean - self.mean
        self._squares += squares + shift * shift * (self._count * count / total)
        self.mean += shift * (count / total)
        self._count = total

    @property
    def std(self) -> float:
        """The unbiased standard deviation, 0 of a single value."""
        return math.sqrt(self._squares / (self._count - 1)) if self._count > 1 else 0.0


class _Job:
    """One tensor, and once run what it has in common with its draws."""

    def __init__(
        self,
        index: int,
        suspect: Suspect,
        draws: Sequence[Draw],
        device: Device,
        progress: Callable[[int], None],
    ) -> None:
        self._index, self._suspect, self._draws = index, suspect, draws
        self._device, self._progress = device, progress
        self._spread, self._scale = _Spread(), _Spread()
        self._sums = np.zeros((3, len(draws)))

    def run(self, worker: Worker) -> None:
        """Read the tensor and draw."""
        suspect, noises = self._suspect, [draw.noise(self._index) for draw in self._draws]
        starts = range(0, suspect.tensor.elements, TILE)

        def tile(worker: Worker, index: int) -> None:
            first = starts[index]
            y = read_values(suspect.source, suspect.tensor, first, worker.tile)
            scale = y
            nbytes = len(y) * FLOAT_DTYPES[suspect.tensor.dtype]
            if suspect.base is not None:
                tensor, source = suspect.base
                scale = read_values(source, tensor, first, worker.out)
                y = y - scale
                nbytes += len(y) * FLOAT_DTYPES[tensor.dtype]
            with np.errstate(all="ignore"):
                (mean, squares), own = _centred(y), _centred(scale)
                std = math.sqrt(squares / len(y))
                standard = np.asarray((y - mean) / (std or 1.0), np.float32)
            sums = self._correlate(worker, standard, first, noises)
            with loop.in_turn(index):
                self._spread.add(len(y), mean, squares)
                self._scale.add(len(y), *own)
                sums[0] = std * sums[0] + mean * sums[1]
                self._sums += sums
            self._progress(nbytes)

        loop = TileLoop(len(starts), tile)
        worker.pool.share(loop, worker)

    def _correlate(
        self, worker: Worker, y: NDArray[np.float32], first: int, noises: Sequence[Noise]
    ) -> NDArray[np.float64]:
        """Return Σyc, Σc and Σc² over a tile for each noise, as [3, noises]."""
        sums = np.zeros((3, len(noises)))
        drawn, scratch = np.frombuffer(worker.buffer, np.float32).reshape(2, _BLOCK)
        for at in range(0, len(y), _BLOCK):
            values = y[at : at + _BLOCK]
            c, product = drawn[: len(values)], scratch[: len(values)]
            for index, noise in enumerate(noises):
                c[:] = 0.0
                memory = c.view(np.uint8).data
                self._device.add_noise(memory, memory, "F32", noise=noise, first=first + at)
                with np.errstate(all="ignore"):
                    sums[0, index] += np.multiply(values, c, out=product).sum()
                sums[1, index] += c.sum()
                sums[2, index] += np.multiply(c, c, out=product).sum()
            worker.pool.check()
        return sums

    def result(self) -> Correlation:
        """Return what was found."""
        elements = self._suspect.tensor.elements
        products, sums, squares = self._sums
        with np.errstate(all="ignore"):
            dots = products - self._spread.mean * sums
            squares = squares - sums * sums / elements
        return Correlation(elements, self._spread.std, self._scale.std, dots, squares)


def _centred(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean, and the sum of the squares about it."""
    mean = float(values.mean())
    return mean, float(np.square(values - mean).sum())
