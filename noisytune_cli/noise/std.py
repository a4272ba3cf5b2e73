"""The standard deviation, rounded to float32 exactly.

std32 is the float32 nearest to the exact unbiased (n-1) standard deviation of the stored values. A device
sums d = x - pivot and d² over a tile in float64, which is fast and nearly always enough: the sums come with
an error bound, and where both ends of the resulting interval round to the same float32, that is the answer
whatever the tiles, the threads or the device. Where they do not, integer sums over the values' mantissas,
binned by exponent, give the variance as an exact fraction, and comparing it with the square of the midpoint
between two float32 numbers decides. (Double-double would narrow the interval but could never settle a tie.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Elements a device may add up in plain float64 in any order before it must use a compensated sum.
BLOCK = 1024

#: Bound on the relative error of Σd² and (relative to Σ|d|) of Σd: a block's chain of BLOCK additions, one
#: rounding for d, which d² has twice, one for d², with each sum of blocks compensated: (BLOCK + 16) units of
#: 2^-53 = 1.2e-13. It holds for tiles of up to 2^35 values.
RELATIVE_ERROR = (BLOCK + 16) * 2.0**-53

#: Beyond these, float64 sums of squares may have over- or underflowed (only F64 values can reach them).
_SMALLEST_SQUARES, _LARGEST_SQUARES = 1e-250, 1e250

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

#: Exponent bins of the exact sums, and the eight integer sums that each bin holds.
EXACT_BINS, EXACT_SUMS = 2048, 8


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over one tile's values about a pivot: s1 = Σ(x - pivot), s2 = Σ(x - pivot)² in float64.

    Each sum is the unevaluated pair (high, low) of a compensated sum. `finite` is False where a value is
    NaN or infinite; the sums then mean nothing. `wide` says that the values are F64, whose squares can
    leave float64's range.
    """

    count: int
    pivot: float
    s1: tuple[float, float]
    s2: tuple[float, float]
    finite: bool
    wide: bool


def mean(parts: Sequence[Moments]) -> float | None:
    """Return the mean of all values, at least one, in float64; None where the sums overflowed."""
    count, total = 0, Fraction(0)
    for p in parts:
        if not math.isfinite(p.pivot + p.s1[0] + p.s1[1]):
            return None
        count += p.count
        total += Fraction(p.s1[0]) + Fraction(p.s1[1]) + p.count * Fraction(p.pivot)
    return float(total / count)


def norm(parts: Sequence[Moments]) -> float | None:
    """Return the L2 norm of all values, in float64; None where squares over- or underflowed."""
    if any(not _trustworthy(p) for p in parts):
        return None
    squares = Fraction(0)
    for p in parts:
        pivot, s1 = Fraction(p.pivot), Fraction(p.s1[0]) + Fraction(p.s1[1])
        squares += Fraction(p.s2[0]) + Fraction(p.s2[1]) + 2 * pivot * s1 + p.count * pivot * pivot
    return _sqrt(max(squares, Fraction(0)))


def round_std(parts: Iterable[Moments]) -> float | None:
    """Return std32 from the float64 sums, or None where their error bound cannot decide the rounding.

    The parts are those of one matrix or, for noise of global scope, of all of them; at least two values
    in all. The answer is exact, 0.0 for a constant included.
    """
    parts = list(parts)
    if any(not _trustworthy(p) for p in parts):
        return None
    count = sum(p.count for p in parts)
    std = _round_quickly(parts, count)
    return _round_exactly(parts, count) if std is None else std


def _round_quickly(parts: Sequence[Moments], count: int) -> float | None:
    """Merge the sums in float64, which decides for nearly every matrix and is many times quicker."""
    centre = math.fsum(p.count * p.pivot + p.s1[0] for p in parts) / count
    first: list[float] = []
    second: list[float] = []
    first_error: list[float] = []
    magnitude: list[float] = []
    for p in parts:
        (s1, low1), (s2, low2) = p.s1, p.s2
        shift = p.pivot - centre
        moved = p.count * shift
        first += (s1, low1, moved)
        second += (s2, low2, 2 * shift * s1, 2 * shift * low1, moved * shift)
        first_error.append(math.sqrt(p.count * s2) + abs(s1) + abs(moved))
        magnitude.append(s2 + 2 * abs(shift) * (abs(s1) + math.sqrt(p.count * s2)) + moved * shift)
    # What the device's sums are off by, and a few roundings here, of what was added up: twice RELATIVE_ERROR
    # covers both, since a rounding is a thousandth of it.
    error = 2 * RELATIVE_ERROR * math.fsum(first_error)
    total = math.fsum(first)
    spread = math.fsum(second) - total * total / count
    bound = 2 * RELATIVE_ERROR * math.fsum(magnitude) + (2 * abs(total) + error) * error / count
    if not (spread > bound and spread + bound < _LARGEST_SQUARES):
        return None
    low = math.sqrt((spread - bound) / (count - 1)) * (1 - 2.0**-50)
    high = math.sqrt((spread + bound) / (count - 1)) * (1 + 2.0**-50)
    if high > _LARGEST_FLOAT32:
        return None
    nearest = np.float32(low)
    return float(nearest) if nearest == np.float32(high) else None


def _round_exactly(parts: Sequence[Moments], count: int) -> float | None:
    """Merge the sums in fractions, where only the device's own error is left."""
    average = mean(parts)
    if average is None:
        return None
    centre = Fraction(average)
    first, second = Fraction(0), Fraction(0)
    first_error = second_error = 0.0
    for p in parts:
        shift = Fraction(p.pivot) - centre
        s1, s2 = Fraction(p.s1[0]) + Fraction(p.s1[1]), Fraction(p.s2[0]) + Fraction(p.s2[1])
        first += s1 + p.count * shift
        second += s2 + 2 * shift * s1 + p.count * shift * shift
        # Cauchy-Schwarz: Σ|d| <= sqrt(n Σd²).
        error = RELATIVE_ERROR * math.sqrt(p.count * p.s2[0])
        first_error += error
        second_error += RELATIVE_ERROR * p.s2[0] + 2 * abs(float(shift)) * error
    spread = second - first * first / count
    error = second_error + (2 * abs(float(first)) + first_error) * first_error / count
    if not math.isfinite(error):
        return None
    # The bound itself was worked out in float64, hence the slack.
    slack = Fraction(error * (1 + 1e-9))
    low = nearest_sqrt(max(spread - slack, Fraction(0)), count - 1)
    high = nearest_sqrt(spread + slack, count - 1)
    return low if low == high else None


def _trustworthy(part: Moments) -> bool:
    """Say whether no square over- or underflowed; narrower types than F64 cannot make one that does."""
    s2 = part.s2[0]
    return _SMALLEST_SQUARES < s2 < _LARGEST_SQUARES or (s2 == 0.0 and not part.wide)


def nearest_sqrt(numerator: Fraction, denominator: int) -> float:
    """Return the float32 nearest to sqrt(numerator / denominator), ties to even; inf past the largest."""
    value = numerator / denominator
    if value == 0:
        return 0.0
    with np.errstate(over="ignore"):  # past the largest float32 is a case like any other
        return _nearest(value)


def _nearest(value: Fraction) -> float:
    """Return the float32 nearest to the square root of a positive value."""
    # A float64 guess is off by one float32 step at most, and the midpoints around it settle that. It is never
    # off at a tie: the root is then a float64 itself, which its rounding to float32 takes to the even side.
    guess = np.float32(_sqrt(value))
    zero, infinity = np.float32(0), np.float32(np.inf)
    if not np.isinf(guess):
        above = np.nextafter(guess, infinity)
        if value > _midpoint(guess, above) ** 2:
            return float(above)
    below = np.nextafter(guess, zero)
    if guess > 0 and value < _midpoint(below, guess) ** 2:
        return float(below)
    return float(guess)


def _sqrt(value: Fraction) -> float:
    """Return sqrt(value) to float64 accuracy, for values past float64's range too."""
    shift = (value.numerator.bit_length() - value.denominator.bit_length()) // 2
    scaled = value / Fraction(4) ** shift
    return float(np.ldexp(np.float64(math.sqrt(float(scaled))), shift))


def _midpoint(low: np.float32, high: np.float32) -> Fraction:
    """Return the exact midpoint of two neighbouring float32 numbers; infinity counts as 2^128."""
    top = Fraction(2) ** 128 if np.isinf(high) else Fraction(float(high))
    return (Fraction(float(low)) + top) / 2


def new_exact_sums() -> NDArray[np.int64]:
    """Return zeroed exact sums, [EXACT_BINS, EXACT_SUMS] int64, for a device to add tiles to.

    A value is ±(h · 2^27 + l) · 2^(bin - 1075) with h < 2^26, l < 2^27. A bin sums ±h, ±l, and the products
    h², h·l, l², each split at 2^27 into a high and a low part so that 2^35 values cannot overflow an int64.
    """
    return np.zeros((EXACT_BINS, EXACT_SUMS), dtype=np.int64)


def exact_mean(sums: NDArray[np.int64], count: int) -> float:
    """Return the float64 nearest to the mean of `count` values from exact sums."""
    return float(Fraction(_totals(sums)[0], count << 1075))


def exact_norm(sums: NDArray[np.int64]) -> float:
    """Return the L2 norm in float64 from exact sums; inf where float64 cannot hold it."""
    with np.errstate(over="ignore"):
        return _sqrt(Fraction(_totals(sums)[1], 1 << 2150))


def exact_std(sums: NDArray[np.int64], count: int) -> float:
    """Return std32 from exact sums over `count` >= 2 values."""
    total, squares = _totals(sums)
    unit = Fraction(2) ** (2 * 1075)
    return nearest_sqrt(Fraction(count * squares - total * total, count) / unit, count - 1)


def std_and_equality(parts: Sequence[Moments]) -> tuple[float, bool] | None:
    """Return std32 of at least two values and whether all are equal, or None where float64 cannot decide.

    A std32 of 0 may be only tiny, or a constant's whose pivot was rounded, which the exact sums have to tell.
    """
    std, equal = round_std(parts), _all_equal(parts)
    return None if std is None or (std == 0.0 and not equal) else (std, equal)


def _all_equal(parts: Sequence[Moments]) -> bool:
    return len({p.pivot for p in parts if p.count}) == 1 and all(p.s2[0] == 0.0 for p in parts)


def exactly_equal(sums: NDArray[np.int64], count: int) -> bool:
    """Say from exact sums whether all values are equal."""
    total, squares = _totals(sums)
    return count * squares == total * total


def are_of_values(sums: NDArray[np.int64], count: int) -> bool:
    """Say whether `count` values can have exact sums at all: Σx is bounded by Σx²."""
    total, squares = _totals(sums)
    return count * squares >= total * total


def _totals(sums: NDArray[np.int64]) -> tuple[int, int]:
    """Return Σx in units of 2^-1075 and Σx² in units of 2^-2150."""
    total = squares = 0
    for power, row in enumerate(sums.tolist()):
        if any(row):
            h, ell, hh1, hh0, hl1, hl0, ll1, ll0 = row
            total += ((h << 27) + ell) << power
            hh, hl, ll = (hh1 << 27) + hh0, (hl1 << 27) + hl0, (ll1 << 27) + ll0
            squares += ((hh << 54) + (hl << 28) + ll) << (2 * power)
    return total, squares
