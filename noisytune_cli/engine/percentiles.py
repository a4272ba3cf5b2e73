"""Exact percentiles of values that are read tile by tile, in memory that does not grow with them.

The bits of a float, once those of negative ones are turned over, are in the order of the values. So an order
statistic is found sixteen bits at a time: a pass over all values counts their highest sixteen bits, the next
the following sixteen of those that share the bits found, until none are left: one pass for F16 and BF16, two
for F32, four for F64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.dtypes import FLOAT_DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGIT = 16
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class Percentiles:
    """The percentiles `wanted` (0 to 100) of `count` values, one at least, of which none is NaN or infinite.

    Until `is_known` all values are to be added, tile by tile, before each `narrow`.
    """

    def __init__(self, wanted: Sequence[float], count: int, dtype: str) -> None:
        """Begin with nothing known."""
        self._dtype = dtype
        self._bits = 8 * FLOAT_DTYPES[dtype]
        self._places = [percent / 100 * (count - 1) for percent in wanted]
        ranks = {rank for place in self._places for rank in (math.floor(place), math.ceil(place))}
        # By rank: the bits found so far, and the rank among the values that share them.
        self._found = {rank: (0, rank) for rank in ranks}
        self._known = 0
        self._counts: dict[int, NDArray[np.int64]] = {}

    @property
    def is_known(self) -> bool:
        """Whether the percentiles are found."""
        return self._known == self._bits

    def add(self, values: memoryview) -> None:
        """Count the values of a tile, as they are stored."""
        keys = _ordered(np.frombuffer(values, f"<u{self._bits // 8}"), self._bits)
        rest = self._bits - self._known
        for begin in {begin for begin, _ in self._found.values()}:
            chosen = keys if rest == self._bits else keys[keys >> keys.dtype.type(rest) == begin]
            digits = (chosen >> chosen.dtype.type(rest - _DIGIT)).astype(np.uint16)
            counts = np.bincount(digits, minlength=1 << _DIGIT)
            self._counts[begin] = self._counts.get(begin, 0) + counts

    def narrow(self) -> None:
        """Take the next sixteen bits from what was counted."""
        for rank, (begin, within) in self._found.items():
            up_to = np.cumsum(self._counts[begin])
            digit = int(np.searchsorted(up_to, within, side="right"))
            before = int(up_to[digit - 1]) if digit else 0
            self._found[rank] = (begin << _DIGIT | digit, within - before)
        self._counts.clear()
        self._known += _DIGIT

    def values(self) -> tuple[float, ...]:
        """Return the percentiles, between two values by linear interpolation in float64, as NumPy does it."""
        stored = {rank: self._value(key) for rank, (key, _) in self._found.items()}
        return tuple(
            _between(stored[math.floor(place)], stored[math.ceil(place)], place % 1) for place in self._places
        )

    def _value(self, key: int) -> float:
        top = 1 << (self._bits - 1)
        bits = key ^ top if key & top else ~key & (2 * top - 1)
        if self._dtype == "BF16":
            return float(np.uint32(bits << 16).view(np.float32))
        return float(np.array(bits, f"<u{self._bits // 8}").view(_NUMPY[self._dtype]))


def _ordered(bits: NDArray[Any], width: int) -> NDArray[Any]:
    """Return keys that are in the order of the values with these bits."""
    top = bits.dtype.type(1 << (width - 1))
    return np.where(bits & top, ~bits, bits | top)


def _between(low: float, high: float, share: float) -> float:
    """Return what lies at a share of the way from `low` to `high`, exact at both ends."""
    if share < 0.5:
        return low + (high - low) * share
    return high - (high - low) * (1 - share)
