"""Scores of predictions: accuracy, F1, macro-F1, Matthews; Pearson and Spearman for regression.

scikit-learn and scipy compute them. A score that is undefined, such as a correlation with a constant, is 0,
as GLUE's own evaluation has it. All lie in [-1, 1].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

#: The metrics of a class index, and those of a number.
CLASSIFICATION = ("accuracy", "f1", "macro_f1", "matthews")
REGRESSION = ("pearson", "spearman")


def score(
    names: Sequence[str], predictions: Sequence[float], labels: Sequence[float], classes: int
) -> dict[str, float]:
    """Return each named metric of [n] predictions against [n] labels: indices of `classes`, or numbers."""
    return {name: _score(name, predictions, labels, classes) for name in names}


def constant_score(name: str, labels: Sequence[float], classes: int) -> float:
    """Return the best score that one and the same answer to every row has: of a correlation 0."""
    answers = sorted(set(labels)) if name in CLASSIFICATION else labels[:1]
    return max(_score(name, [answer] * len(labels), labels, classes) for answer in answers)


def _score(name: str, predictions: Sequence[float], labels: Sequence[float], classes: int) -> float:
    from scipy import stats
    from sklearn import metrics

    # Of the classes that the rows have, so that runs on the same rows are scored alike whatever they predict.
    macro = {"average": "macro", "labels": sorted(set(labels)), "zero_division": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an undefined score, which is 0 here
        match name:
            case "accuracy":
                value = metrics.accuracy_score(labels, predictions)
            case "f1":
                # Of the second class where there are two (GLUE's positive one), else the mean of all.
                how = {"average": "binary", "zero_division": 0.0} if classes == 2 else macro
                value = metrics.f1_score(labels, predictions, **how)
            case "macro_f1":
                value = metrics.f1_score(labels, predictions, **macro)
            case "matthews":
                value = metrics.matthews_corrcoef(labels, predictions)
            case "pearson":
                value = stats.pearsonr(labels, predictions).statistic if len(labels) > 1 else 0.0
            case "spearman":
                value = stats.spearmanr(labels, predictions).statistic if len(labels) > 1 else 0.0
            case _:
                raise ValueError(name)
    return float(value) if math.isfinite(value) else 0.0
