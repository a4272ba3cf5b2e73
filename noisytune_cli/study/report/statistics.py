"""What a handful of paired seeds can say, and what they cannot.

Methods are compared seed by seed: the difference of two runs that share the seeds of initialisation, data
order and noise. Its mean has a percentile bootstrap interval; its p-value is that of the sign-flip
permutation test, which assumes only that a difference would be as likely with the other sign if the methods
were equal. Few seeds bound both: n seeds have 2ⁿ flips, so no two-sided p lies below 2/2ⁿ, and the interval
of few differences is too narrow (`docs/results-format.md` has its measured coverage). Several comparisons
are adjusted after Holm (1979).

The plain runs of several seeds, by majority vote, are the ensemble that costs nothing more: every run keeps
its predictions on the dev rows. It is one number; how far it hangs on single members is told by leaving each
of them out in turn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: An adjusted p-value below this is called evidence.
SIGNIFICANCE = 0.05

#: The confidence of every interval.
CONFIDENCE = 0.95

#: Scores lie in [-1, 1], so a difference or a spread below this is their rounding, and none.
ROUNDING = 1e-12

#: Resamples of a bootstrap, and the most sign flips that are all enumerated (2¹⁶ of them for 16 seeds).
RESAMPLES = 9999
_MOST_FLIPS = 2**16

_SEED = 0


class Search(NamedTuple):
    """Differences at each of K values that were tried with the same n seeds, and scores to choose one by.

    `others` are sums of the scores of seeds that have chosen, too, but are not compared.
    """

    differences: Sequence[Sequence[float]]  # [n, K]
    scores: Sequence[Sequence[float]]  # [n, K]
    others: Sequence[float] = (0.0,)  # [K] or [1]


def best(means: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the place of the best of K mean scores [..., K], the first of those equal but for rounding."""
    highest = means.max(axis=-1, keepdims=True)
    return np.asarray((means > highest - ROUNDING).argmax(axis=-1))


def moments(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and unbiased std of [n] values; a single value has no std."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean of [n] values (Efron 1979), None for one."""
    from scipy import stats

    if len(values) == 1:
        return None
    interval = stats.bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def excluded_beyond(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the bounds outside of which the mean of [n] values does not lie, at 95 %.

    By Student's t, which few values do not make too narrow, as a bootstrap would: what is excluded is not to
    be excluded too soon. None where there is one value, or all are equal: then their spread is not known.
    """
    from scipy import stats

    mean, std = moments(values)
    if std is None or std < ROUNDING:
        return None
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return mean - reach, mean + reach


def permutation_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the sign-flip test on the mean of [n] paired differences.

    Exact up to 16 differences, else from 65,536 random flips.
    """
    return searched_p([Search([[value] for value in differences], [[0.0]] * len(differences))])


def searched_p(searches: Sequence[Search]) -> float:
    """Return the two-sided p-value of the mean difference at what the best mean scores choose.

    Of several searches with the same seeds the mean is tested. A flip is of all that a seed has, differences
    and scores, and each search chooses anew in it: so the test counts in what luck has chosen. It assumes
    that, if nothing that was tried changed anything, all of a seed's differences, on the rows that choose as
    on those that are reported, would be as likely with the other sign. Exact up to 16 seeds.

    It is twice the share of flips with such a mean or one further on its side of 0. Luck raises the means of
    all flips, so that one below most of them may still be above 0: that is no evidence for it.
    """
    from scipy import stats

    seeds = len(searches[0].differences)
    if seeds == 1:
        return 1.0
    tried = [_rounded(search.differences) for search in searches]
    choosing = [np.asarray(search.scores, dtype=np.float64) / seeds for search in searches]
    fixed = [np.asarray(search.others, dtype=np.float64) / seeds for search in searches]
    # Differences of scores carry their rounding, by which means that are equal would not tie: so they are
    # compared as multiples of a billionth of the largest, which no difference worth telling is below.
    unit = max(np.abs(differences).max() for differences in tried) or 1.0

    def mean(signs: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        flips = np.moveaxis(signs, axis, -1)
        chosen = [
            np.take_along_axis(flips @ differences, best(flips @ scores + others)[..., None], axis=-1)
            for differences, scores, others in zip(tried, choosing, fixed, strict=True)
        ]
        return np.asarray((np.mean(chosen, axis=0)[..., 0] / (unit * seeds)).round(9))

    observed = float(mean(np.ones(seeds), -1))
    if observed == 0.0:
        return 1.0
    tail = stats.permutation_test(
        (np.ones(seeds),),
        mean,
        permutation_type="samples",
        n_resamples=_MOST_FLIPS,
        alternative="greater" if observed > 0 else "less",
        random_state=np.random.default_rng(_SEED),
    ).pvalue
    return min(1.0, 2 * float(tail))


def smallest_p(pairs: int) -> float:
    """Return the smallest two-sided p that the sign-flip test can give with `pairs` differences."""
    return 2.0 / min(2.0**pairs, _MOST_FLIPS + 1)  # of random flips the observed one is counted too


def pairs_needed(comparisons: int) -> int:
    """Return how many pairs it takes before one of `comparisons` could come out as evidence."""
    pairs = 1
    while comparisons * 2.0 ** (1 - pairs) >= SIGNIFICANCE:
        pairs += 1
    return pairs


def holm(p_values: Sequence[float]) -> list[float]:
    """Return [m] p-values adjusted for m comparisons after Holm (1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def vote(predictions: Sequence[Sequence[float]], *, regression: bool) -> list[float]:
    """Return [n] predictions from those of M members, [M, n]: the majority's class, or the mean number.

    Where classes have equally many votes, the first of the members that voted for one of them decides.
    """
    if regression:
        return [sum(row) / len(row) for row in zip(*predictions, strict=True)]
    return [_majority(row) for row in zip(*predictions, strict=True)]


def leave_one_out(predictions: Sequence[Sequence[float]]) -> list[Sequence[Sequence[float]]]:
    """Return the M ensembles of M - 1 members, [M - 1, n] each."""
    return [[*predictions[:out], *predictions[out + 1 :]] for out in range(len(predictions))]


def _rounded(differences: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    array = np.asarray(differences, dtype=np.float64)
    return np.where(np.abs(array) < ROUNDING, 0.0, array)


def _majority(votes: Sequence[float]) -> float:
    # Counter lists what is equally common in the order in which it was met first.
    return Counter(votes).most_common(1)[0][0]
