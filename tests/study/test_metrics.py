"""Metrics on predictions whose scores are counted by hand."""

from __future__ import annotations

import math

import pytest

from noisytune_cli.study.training.metrics import constant_score, score


def test_two_classes_by_hand() -> None:
    # true positives 2, false positives 1, false negatives 1, true negatives 4
    labels = [1, 1, 1, 0, 0, 0, 0, 0]
    predictions = [1, 1, 0, 1, 0, 0, 0, 0]
    assert score(["accuracy", "f1", "macro_f1", "matthews"], predictions, labels, 2) == {
        "accuracy": pytest.approx(6 / 8),
        "f1": pytest.approx(2 / 3),
        "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 2),
        "matthews": pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5)),
    }


def test_f1_of_more_classes_is_their_mean() -> None:
    labels, predictions = [0, 1, 2, 2], [0, 2, 2, 2]
    assert score(["f1"], predictions, labels, 3) == {"f1": pytest.approx((1 + 0 + 4 / 5) / 3)}


def test_f1_is_one_metric_whatever_a_run_predicts() -> None:
    labels = [0, 0, 1, 1]  # of three classes, one of which no scored row has
    first, second = (score(["f1", "macro_f1"], p, labels, 3) for p in ([0, 1, 1, 1], [0, 2, 1, 1]))
    assert first == {"f1": pytest.approx((2 / 3 + 4 / 5) / 2), "macro_f1": first["f1"]}
    assert second == {"f1": pytest.approx((2 / 3 + 1) / 2), "macro_f1": second["f1"]}


def test_correlations_by_hand() -> None:
    labels, predictions = [1.0, 2.0, 3.0], [1.0, 4.0, 9.0]
    found = score(["pearson", "spearman"], predictions, labels, 1)
    assert found["pearson"] == pytest.approx(8 / math.sqrt(2 * 98 / 3))
    assert found["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["matthews", "f1", "pearson", "spearman"])
def test_what_is_undefined_is_0(name: str) -> None:
    assert score([name], [0, 0, 0], [0, 1, 1], 2) == {name: 0.0}


def test_one_answer_to_every_row() -> None:
    labels = [1, 0, 1, 1, 2]
    assert constant_score("accuracy", labels, 3) == 0.6
    assert constant_score("f1", [1, 0, 1, 1], 2) == pytest.approx(2 * 0.75 / 1.75)
    assert constant_score("macro_f1", [0, 1], 2) == pytest.approx((2 / 3) / 2)
    assert constant_score("matthews", [1, 0, 1, 1], 2) == 0.0
    assert constant_score("pearson", [0.5, 3.0, 4.5], 0) == 0.0
    assert constant_score("spearman", [0.5], 0) == 0.0
