"""How the values of one tensor are spread: counts in equal bins from its smallest value to its largest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.engine.tile_values import TILE, read_values
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of the values in [edge, next edge), in the last bin with its end; `left_out` are NaN and Inf."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    left_out: int


def count_values(source: Source, tensor: TensorSpec, bins: int) -> Histogram:
    """Return the histogram of a float tensor, which is read twice; without bins where no value is finite."""
    low, high, finite = np.inf, -np.inf, 0
    for values in _finite(source, tensor):
        if len(values):
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            finite += len(values)
    left_out = tensor.elements - finite
    if not finite:
        return Histogram((), (), left_out)
    if low == high:
        return Histogram((low, high), (finite,), left_out)
    edges = low * (1 - (steps := np.linspace(0.0, 1.0, bins + 1))) + high * steps
    # Rounding may take a step back between values that are neighbours.
    edges = np.clip(np.maximum.accumulate(edges), low, high)
    counts = np.zeros(bins, np.int64)
    for values in _finite(source, tensor):
        counts += np.histogram(values, edges)[0]
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), left_out)


def _finite(source: Source, tensor: TensorSpec) -> Iterator[NDArray[np.float64]]:
    """Yield the finite values of each tile."""
    room = np.empty(TILE * 8, np.uint8).data
    for first in range(0, tensor.elements, TILE):
        values = read_values(source, tensor, first, room)
        yield values[np.isfinite(values)]
