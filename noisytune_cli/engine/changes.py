"""What lies between two tensors of one shape: sums over both and their difference, tile by tile.

Floats of any two dtypes are compared as float64, other dtypes byte by byte. Tiles are added up in order, so
every number is the same for any count of threads. A `Change` is sums alone, so that of several tensors is
theirs added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.threads import Pool, TileLoop, Worker
from noisytune_cli.engine.tile_values import TILE, read_tile
from noisytune_cli.noise.devices.cpu import Cpu
from noisytune_cli.noise.stream import values
from noisytune_cli.records import TensorSpec

#: Bytes of a tile of what is no float.
_TILE_BYTES = 1 << 20


#: The kurtosis of a distribution, and n times the variance of that of n values of it: the delta method on
#: m4 / m2², from μ4, μ6 and μ8. The paper's noise and the Gaussian are told apart by it.
_KURTOSIS = {"uniform": (1.8, 1.317), "gaussian": (3.0, 24.0)}

#: What rounding to a short dtype may add to a kurtosis, and how many standard errors chance may.
_ROUNDED, _ERRORS = 0.05, 5.0

#: Values below which a distribution is not told.
_FEWEST = 64

#: Half the width of an interval of 95 % in standard errors.
_INTERVAL = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Likeness:
    """Noise that a change may be: λ with its interval of 95 %, and the noise's own std."""

    distribution: str
    lam: float
    low: float
    high: float
    std: float


@dataclass(frozen=True, slots=True)
class Change:
    """Sums over what two tensors, or several pairs of them, have and differ by.

    `l1_a`, `l1_b` and `l1` are Σ|a|, Σ|b|, Σ|b - a|; sums, squares and fourth powers likewise; `product` is
    Σab and `largest` the largest |b - a|. `numbers` counts the elements that they are over: floats, where
    both tensors are finite throughout. `equal` counts elements with one value, NaN and NaN too, or with the
    same bytes.
    """

    elements: int = 0
    numbers: int = 0
    equal: int = 0
    l1_a: float = 0.0
    l1_b: float = 0.0
    l1: float = 0.0
    sum_a: float = 0.0
    sum: float = 0.0
    squares_a: float = 0.0
    squares_b: float = 0.0
    squares: float = 0.0
    fourths: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Change) -> Change:
        """Return that of all elements together."""
        (*own, largest), (*others, other_largest) = _fields(self), _fields(other)
        sums: list[Any] = [a + b for a, b in zip(own, others, strict=True)]
        return Change(*[*sums, max(largest, other_largest)])

    @property
    def norm_change(self) -> float | None:
        """|‖b‖₁ - ‖a‖₁| / ‖a‖₁, the change of the norm: NoisyTune's figure 5."""
        return self._known(abs(self.l1_b - self.l1_a) / self.l1_a if self.l1_a else None)

    @property
    def change_norm(self) -> float | None:
        """‖b - a‖₁ / ‖a‖₁, the norm of the change."""
        return self._known(self.l1 / self.l1_a if self.l1_a else None)

    @property
    def l2(self) -> float | None:
        """‖b - a‖₂."""
        return self._known(math.sqrt(self.squares))

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between a and b; None where one of them is 0, or its norm past float64."""
        norms = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        return self._known(min(1.0, max(-1.0, self.product / norms)) if 0 < norms < math.inf else None)

    @property
    def largest_change(self) -> float | None:
        """The largest |b - a|."""
        return self._known(self.largest)

    @property
    def equal_share(self) -> float | None:
        """The share of elements that are equal, 0 to 1; None of no elements."""
        return self.equal / self.elements if self.elements else None

    @property
    def noise(self) -> Likeness | None:
        """The noise that the change of one tensor looks like, scaled by std(a); None where it is no noise.

        Noise has its distribution's kurtosis, no mean, and does not go with a. λ is √12 std(b - a) / std(a).
        """
        n = self.numbers
        if n < _FEWEST or not math.isfinite(self.fourths) or not 0 < self.squares < math.inf:
            return None
        spread = self.squares_a - self.sum_a * self.sum_a / n
        if not spread > 0 or abs(self.sum) > _ERRORS * math.sqrt(self.squares):
            return None
        together = self.product - self.squares_a - self.sum_a * self.sum / n  # Σ(a - ā)(b - a)
        if abs(together) > _ERRORS * math.sqrt(spread / n) * math.sqrt(self.squares):
            return None
        kurtosis = n * self.fourths / self.squares / self.squares
        fitting: dict[str, float] = {}
        for distribution, (expected, variance) in _KURTOSIS.items():
            away, error = abs(kurtosis - expected), math.sqrt(variance / n)
            if away < _ROUNDED + _ERRORS * error:
                fitting[distribution] = -((away / error) ** 2) / 2 - math.log(error)  # the log-likelihood
        if not fitting:
            return None
        likeliest = max(fitting, key=lambda distribution: fitting[distribution])
        lam = math.sqrt(12.0 * self.squares / spread)
        error = lam * _INTERVAL * math.sqrt((_KURTOSIS[likeliest][0] - 1.0) / (4 * n))
        return Likeness(likeliest, lam, lam - error, lam + error, math.sqrt(self.squares / n))

    def _known(self, value: float | None) -> float | None:
        """Return a number that is one, of values of which all are finite."""
        return value if self.numbers and value is not None and math.isfinite(value) else None


_fields: Callable[[Change], tuple[Any, ...]] = attrgetter(*Change.__slots__)


def measure_changes(
    pairs: Sequence[tuple[TensorSpec, TensorSpec]],
    sources_a: Mapping[str, Source],
    sources_b: Mapping[str, Source],
    *,
    threads: int,
    progress: Callable[[int], None],
) -> list[Change]:
    """Return the change from the first to the second tensor of each pair; sources are keyed by file.

    Two tensors have one shape, and are floats or of one dtype. `progress` is called, from any thread, with
    the bytes just read.
    """
    jobs = [_Job(a, sources_a[a.file], b, sources_b[b.file], progress) for a, b in pairs]
    Pool([job.run for job in jobs], tile_bytes=TILE * 8, buffer_bytes=0).run(threads)
    return [job.change for job in jobs]


class _Job:
    """One pair, and once run its change."""

    def __init__(
        self,
        a: TensorSpec,
        source_a: Source,
        b: TensorSpec,
        source_b: Source,
        progress: Callable[[int], None],
    ) -> None:
        self._a, self._b, self._progress = (a, source_a), (b, source_b), progress
        self._are_numbers = a.dtype in FLOAT_DTYPES and b.dtype in FLOAT_DTYPES
        self.change = Change()

    def run(self, worker: Worker) -> None:
        """Read both tensors."""
        tensor = self._a[0]
        total, size = (tensor.elements, TILE) if self._are_numbers else (tensor.nbytes, _TILE_BYTES)
        starts = range(0, total, size)
        compare = self._compare_numbers if self._are_numbers else self._compare_bytes

        def tile(worker: Worker, index: int) -> None:
            found, nbytes = compare(worker, starts[index])
            with loop.in_turn(index):
                self.change += found
            self._progress(nbytes)

        loop = TileLoop(len(starts), tile)
        worker.pool.share(loop, worker)
        if self._are_numbers and self.change.numbers < tensor.elements:
            self.change = Change(elements=tensor.elements, equal=self.change.equal)
        if not self._are_numbers:
            self.change = self._count_elements(self.change)

    def _compare_numbers(self, worker: Worker, first: int) -> tuple[Change, int]:
        (tensor_a, source_a), (tensor_b, source_b) = self._a, self._b
        a = read_tile(source_a, tensor_a, first, worker.tile)
        b = read_tile(source_b, tensor_b, first, worker.out)
        sums, largest, equal = Cpu().compare(a, b, tensor_a.dtype, tensor_b.dtype)
        count = len(a) // FLOAT_DTYPES[tensor_a.dtype]
        fields: list[Any] = [count, count, equal, *sums, largest]
        found = Change(*fields)
        if not math.isfinite(found.squares):
            x, y = values(a, tensor_a.dtype), values(b, tensor_b.dtype)
            if not (np.isfinite(x).all() and np.isfinite(y).all()):
                same = (x == y) | (np.isnan(x) & np.isnan(y))
                found = Change(elements=count, equal=int(np.count_nonzero(same)))
        return found, len(a) + len(b)

    def _compare_bytes(self, worker: Worker, start: int) -> tuple[Change, int]:
        (tensor_a, source_a), (tensor_b, source_b) = self._a, self._b
        count = min(_TILE_BYTES, tensor_a.nbytes - start)
        a = np.frombuffer(source_a.read(tensor_a, start, worker.tile[:count]), np.uint8)
        b = np.frombuffer(source_b.read(tensor_b, start, worker.out[:count]), np.uint8)
        size = _size(tensor_a)
        equal = np.all((a == b).reshape(-1, size), axis=1)
        return Change(elements=len(equal), equal=int(np.count_nonzero(equal))), 2 * count

    def _count_elements(self, change: Change) -> Change:
        """Return what was counted by elements; of elements smaller than a byte, bytes stand for them."""
        elements = self._a[0].elements
        share = change.equal_share
        equal = elements if share in (None, 1.0) else min(int((share or 0.0) * elements), elements - 1)
        return Change(elements=elements, equal=equal if change.elements != elements else change.equal)


def _size(tensor: TensorSpec) -> int:
    """Return the bytes of an element, 1 where several share one; a power of two, so that it fits a tile."""
    size = tensor.nbytes // tensor.elements if tensor.elements else 1
    return size if size and tensor.nbytes == size * tensor.elements and not _TILE_BYTES % size else 1
