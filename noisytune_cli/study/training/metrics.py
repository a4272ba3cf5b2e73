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


def score(names: Sequence[str], predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return each named metric of [n] predictions against [n] labels (class indices, or numbers)."""
    return {name: _score(name, predictions, labels) for name in names}


def _score(name: str, predictions: Sequence[float], labels: Sequence[float]) -> float:
    from scipy import stats
    from sklearn import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an undefined score, which is 0 here
        match name:
            case "accuracy":
                value = metrics.accuracy_score(labels, predictions)
            case "f1":
                # Of the second class where there are two (GLUE's positive one), else the mean of all.
                average = "binary" if max(*labels, *predictions) <= 1 else "macro"
                value = metrics.f1_score(labels, predictions, average=average, zero_division=0.0)
            case "macro_f1":
                value = metrics.f1_score(labels, predictions, average="macro", zero_division=0.0)
            case "matthews":
                value = metrics.matthews_corrcoef(labels, predictions)
            case "pearson":
                value = stats.pearsonr(labels, predictions).statistic if len(labels) > 1 else 0.0
            case "spearman":
                value = stats.spearmanr(labels, predictions).statistic if len(labels) > 1 else 0.0
            case _:
                raise ValueError(name)
    return float(value) if math.isfinite(value) else 0.0
