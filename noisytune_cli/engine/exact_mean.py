"""The weighted mean of values, element by element, as if worked out exactly and rounded once.

Σ w x is kept in three float64 numbers for each element, which add up to it exactly: additions by Knuth's
TwoSum, products by Dekker's TwoProduct. So is what their quotient by Σ w leaves over, which is all that
rounding has to know beside it. Where three numbers do not hold a sum, where a product over- or underflows,
and where the error of what is left over could matter, integers of any length decide, for those elements
alone. So the result is a function of the values and their weights, in whatever order they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_Float = TypeVar("_Float", float, "Floats")

#: Products of magnitudes between these are exact in two float64 numbers, and sums of them finite.
_SMALLEST, _LARGEST = 2.0**-900, 2.0**960

#: Weights from here on, relative to the largest, keep products of all but F64 values in that range.
_SMALLEST_WEIGHT = 2.0**-700

#: A bound on the relative error of a remainder's quotient: a few units of 2^-53.
_ERROR = 2.0**-50

#: Splits 53 bits into 26 and 27 (Veltkamp).
_SPLITTER = 2.0**27 + 1

#: Every finite float64 is a multiple of 2^-1074.
_LOWEST = 1074


class Weights:
    """How much each value counts; only ratios matter, so they are scaled, by a power of two, to [1, 2)."""

    def __init__(self, given: Sequence[float]) -> None:
        if len(set(given)) == 1:
            given = [1.0] * len(given)
        exponent = math.frexp(max(given))[1] - 1
        self.exact = [Fraction(weight) / Fraction(2) ** exponent for weight in given]
        self.values = [float(weight) for weight in self.exact]
        total = sum(self.exact)
        #: The bits that a sum by them needs more than its values: after the point, and before that of Σ w.
        denominator = max(weight.denominator for weight in self.exact)
        self.bits = denominator.bit_length() - 1 + (math.ceil(total) - 1).bit_length()
        self.total: list[float] = []  # Σ w, from its first 53 bits on
        while total and len(self.total) < 4:
            self.total.append(float(total))
            total -= Fraction(self.total[-1])
        self.fit = not total and min(self.exact) >= _SMALLEST_WEIGHT
        self.divides_exactly = len(self.total) == 1 and math.frexp(self.total[0])[0] == 0.5


class Mean:
    """The mean of several tiles: `add` each, with its weight's index, then `round`."""

    def __init__(self, weights: Weights, count: int, *, wide: bool) -> None:
        self._weights, self._wide = weights, wide
        self._sums = [np.zeros(count) for _ in range(3)]
        self._others = np.zeros(count)
        self._doubtful = np.full(count, not weights.fit)

    @np.errstate(all="ignore")
    def add(self, x: Floats, index: int) -> None:
        """Add a tile's values."""
        weight = self._weights.values[index]
        if not math.isfinite(x.sum()):  # what is NaN or infinite is the mean, whatever the rest is
            finite = np.isfinite(x)
            self._others += np.where(finite, 0.0, x)
            x = np.where(finite, x, 0.0)
        if self._wide:
            self._doubtful |= np.abs(x) > _LARGEST
        if weight == 1.0:
            _grow(self._sums, x, self._doubtful)
        else:
            if self._wide:
                self._doubtful |= (np.abs(x) < _SMALLEST / _SMALLEST_WEIGHT) & (x != 0)
            for word in _product(x, weight):
                _grow(self._sums, word, self._doubtful)

    @np.errstate(all="ignore")
    def round(self, values: Callable[[int], Floats]) -> Floats:
        """Return the means: rounded to nearest where the values are F64 (`wide`), else to odd.

        Rounded to odd, a float64 can be rounded again, to any shorter dtype, as if that were the only time.
        `values` returns a tile's values again, by its index.
        """
        sums, total = _settled(self._sums), self._weights.total
        quotient = sums[0] / total[0]
        left = _remainder(sums, quotient, total, self._doubtful)
        result, rest = _two_sum(quotient, left[0] / total[0])
        exact = (left[0] == 0) | (self._weights.divides_exactly & (left[1] == 0))
        error = np.where(exact, 0.0, _ERROR * np.abs(left[0] / total[0]))
        if self._wide:
            self._doubtful |= (np.abs(sums[0]) < _SMALLEST) & (sums[0] != 0)
            self._doubtful |= result + (rest - error) != result + (rest + error)
        else:
            self._doubtful |= (np.abs(rest) <= error) & ~exact
            result = _to_odd(result, rest)
        doubtful = np.flatnonzero(self._doubtful)
        if len(doubtful):
            result[doubtful] = self._decide(doubtful, values)
        return np.where(self._others == 0, result, self._others)

    def _decide(self, where: NDArray[np.int64], values: Callable[[int], Floats]) -> Floats:
        """Return the means of some elements by integer arithmetic."""
        unit = math.lcm(*(weight.denominator for weight in self._weights.exact))
        shares = [int(weight * unit) for weight in self._weights.exact]
        sums = [0] * len(where)
        for index, share in enumerate(shares):
            x = values(index)[where]
            for i, value in enumerate(np.where(np.isfinite(x), x, 0.0).tolist()):
                numerator, denominator = value.as_integer_ratio()
                sums[i] += share * numerator << (_LOWEST - denominator.bit_length() + 1)
        total = sum(shares) << _LOWEST
        # Python divides integers exactly, and rounds once.
        result = np.array([exact / total for exact in sums])
        if not self._wide:
            ratios = [value.as_integer_ratio() for value in result.tolist()]
            left = [exact * d - n * total for exact, (n, d) in zip(sums, ratios, strict=True)]
            result = _to_odd(result, np.array([(one > 0) - (one < 0) for one in left], np.float64))
        return result


def _grow(words: list[Floats], x: Floats, doubtful: NDArray[np.bool_]) -> None:
    """Add to three words that are a sum; mark where a fourth would be needed."""
    for i, word in enumerate(words):
        if not x.any():
            return
        words[i], x = _two_sum(word, x)
    doubtful |= x != 0


def _settled(words: list[Floats]) -> list[Floats]:
    """Return the same sum as words that do not overlap: the first is it, rounded, and 0 where it is 0."""
    a, b, c = words
    if c.any():
        b, c = _two_sum(b, c)
        a, b = _two_sum(a, b)
        b, c = _two_sum(b, c)
    if b.any():
        a, b = _two_sum(a, b)
    return [a, b, c]


def _remainder(
    sums: list[Floats], quotient: Floats, total: list[float], doubtful: NDArray[np.bool_]
) -> list[Floats]:
    """Return what is left of a sum once quotient · total is taken from it."""
    high, low = _product(quotient, total[0])
    # The remainder of a rounded division is a float64 itself, and so are both differences.
    left = [(sums[0] - high) - low, np.zeros_like(high), np.zeros_like(high)]
    for word in sums[1:]:
        _grow(left, word, doubtful)
    for part in total[1:]:
        for word in _product(quotient, -part):
            _grow(left, word, doubtful)
    return _settled(left)


def _two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Return a + b, rounded, and the rounding's error."""
    total = a + b
    part = total - a
    error = total - part
    np.subtract(a, error, out=error)
    np.subtract(b, part, out=part)
    error += part
    return total, error


def _product(a: Floats, b: float) -> tuple[Floats, Floats]:
    """Return a · b, rounded, and the rounding's error."""
    product = a * b
    if math.frexp(b)[0] in (0.5, -0.5):
        return product, np.zeros_like(product)
    a_high, b_high = _high(a), _high(b)
    a_low, b_low = a - a_high, b - b_high
    error = a_high * b_high - product
    error += a_high * b_low
    error += a_low * b_high
    error += a_low * b_low
    return product, error


def _high(x: _Float) -> _Float:
    """Return the upper half of the bits."""
    wide = _SPLITTER * x
    return wide - (wide - x)


def _to_odd(nearest: Floats, left: Floats) -> Floats:
    """Return numbers rounded to odd: of which these are the nearest, and the sign of what was left over."""
    bits = nearest.view(np.int64)
    outwards = np.where((left > 0) == (nearest > 0), 1, -1)
    return np.where((left != 0) & (bits & 1 == 0), bits + outwards, bits).view(np.float64)
