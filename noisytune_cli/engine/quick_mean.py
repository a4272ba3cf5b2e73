"""The weighted mean of values of a short dtype by float64 alone, and for which of them that is sure to do.

Sure is what is the exact mean rounded once, to nearest even; the rest is left to `exact_mean`. There are two
ways to know, by the weights:

Weights of few bits, such as equal ones. Values are multiples of small powers of two, so their sum s is
exact in float64 unless some lie very far below others, which the exponents tell. Then s / Σw, rounded to
float64 and once more to the dtype, is rounded as if once: else the first rounding would have to reach, from
beside it, a midpoint m of two of the dtype's values. But m · Σw, of few bits both, is a float64 as s is; so
they are at least a unit apart, and their quotients by Σw more than half a unit.

Other weights. The error of the sum and its quotient has a bound, and a mean is sure where both ends of that
interval round to it. Few are not: near a midpoint lies a mean by decimal weights, such as 0.7 and 0.3, once
in some ten or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.exact_mean import Weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[Any]
    Floats = NDArray[np.float64]

#: The dtypes whose means these are, by the bits of their fractions.
FRACTIONS = {"F32": 23, "BF16": 7, "F16": 10}

#: The bits of a float64, and the powers of two by which values may always lie apart in an exact sum.
_PRECISION, _SPARE = 53, 16


class QuickMean:
    """The mean of tiles of a dtype: `add` each, with its weight's index, then `round`."""

    def __init__(self, dtype: str, weights: Weights) -> None:
        bits, self._fraction = 8 * FLOAT_DTYPES[dtype], FRACTIONS[dtype]
        self._magnitude = np.dtype(f"<u{bits // 8}").type((1 << bits - 1) - 1)
        self._infinity = (1 << bits - 1) - (1 << self._fraction)
        self._weights = weights
        self._sums = np.empty(0)
        self._largest, self._smallest = 0, int(self._magnitude)
        self._spare = _PRECISION - self._fraction - 1 - weights.bits
        self._sums_exactly = self._spare >= _SPARE

    def add(self, stored: Bits, values: Floats, index: int) -> None:
        """Add a tile's values, which are overwritten; the first tile's memory is that of the sums."""
        magnitudes = stored & self._magnitude
        self._largest = max(self._largest, int(magnitudes.max()))
        if self._sums_exactly:  # one less, so that the smallest is none of the zeros
            self._smallest = min(self._smallest, int((magnitudes - 1).min()))
        weight = self._weights.values[index]
        with np.errstate(all="ignore"):  # of what is infinite or NaN
            if weight != 1.0:
                values *= weight
            if index == 0:
                self._sums = values
            else:
                self._sums += values

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return self._largest < self._infinity

    def round(
        self, convert: Callable[[Floats], Bits], stored: Callable[[int], Bits]
    ) -> tuple[Bits, NDArray[np.int64]]:
        """Return the means' stored bits, and the indices of those that are not sure.

        `convert` rounds to the dtype; `stored` returns a tile's bits again, by its index.
        """
        means = self._sums
        with np.errstate(all="ignore"):
            means /= self._weights.total[0]
        if not (self.finite and self._weights.fit):
            return convert(means), np.arange(len(means))
        # Subnormal values have the exponent of the smallest normal ones.
        largest = max(self._largest >> self._fraction, 1)
        if self._sums_exactly:
            lowest = (largest - self._spare << self._fraction) - 1
            far = np.zeros(len(means), bool)
            if largest - self._spare > 1 and self._smallest < lowest:
                for index in range(len(self._weights.values)):
                    far |= (stored(index) & self._magnitude) - 1 < lowest
            return convert(means), np.flatnonzero(far)
        # n products, n - 1 sums, Σw and the quotient: each off by 2^-53 of the largest at most. Twice that.
        bias = self._infinity >> self._fraction + 1
        bound = 2.0 ** (largest - bias + 1) * 2.0**-_PRECISION * 2 * (len(self._weights.values) + 4)
        low = convert(means - bound)
        return low, np.flatnonzero(low != convert(means + bound))
