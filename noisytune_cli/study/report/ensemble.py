"""The ensemble that costs nothing more: the plain runs of several seeds, by majority vote.

Every run keeps its predictions on the dev rows, so an ensemble of the seeds is made without training. It is
one number; how far it hangs on single members is told by leaving each of them out in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


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


def _majority(votes: Sequence[float]) -> float:
    # Counter lists what is equally common in the order in which it was met first.
    return Counter(votes).most_common(1)[0][0]
