"""Numbers as people read them."""

from __future__ import annotations

import pytest

from noisytune_cli.study.report import wording


@pytest.mark.parametrize(("value", "shown"), [(0.0041, "+0.41"), (-0.123456, "−12.35"), (-1e-9, "+0.00")])
def test_a_difference_has_its_sign(value: float, shown: str) -> None:
    assert wording.change(value) == shown


def test_a_score_and_its_spread() -> None:
    assert wording.spread({"mean": 0.41234, "std": 0.0121}) == "41.23 ± 1.21"
    assert wording.spread({"mean": -0.05, "std": None}) == "−5.00"


@pytest.mark.parametrize(
    ("p", "shown"), [(0.0625, "0.0625"), (1.0, "1"), (0.625, "0.625"), (0.00003, "< 0.0001")]
)
def test_p_values(p: float, shown: str) -> None:
    assert wording.probability(p) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(43.4, "43 s"), (125.0, "2 min 5 s"), (11_520.0, "3 h 12 min"), (3599.6, "1 h 0 min")],
)
def test_spans_of_time(seconds: float, shown: str) -> None:
    assert wording.duration(seconds) == shown


def test_where_nothing_is_found_it_is_said_what_is_excluded() -> None:
    comparison = {
        "name": "noisytune",
        "against": "plain",
        "lambda": 0.15,
        "mean": 0.001,
        "interval": [-0.002, 0.004],
        "excluded_beyond": [-0.003, 0.005],
        "values": [0.001] * 8,
        "higher": 5,
        "p": 0.5,
        "p_holm": 0.5,
        "verdict": wording.NO_EVIDENCE,
    }
    assert wording.finding(comparison).endswith(
        "no evidence of a difference; a mean difference below −0.30 or above +0.50 is excluded at 95 %."
    )
    assert wording.finding({**comparison, "excluded_beyond": None}).endswith("no evidence of a difference.")
    # Student's t finds what the test does not: both are told, and which assumes more.
    assert wording.finding({**comparison, "excluded_beyond": [0.002, 0.005]}).endswith(
        "no evidence of a difference; if differences are normal and this were the only comparison, "
        "a mean difference below +0.20 or above +0.50 is excluded at 95 %, and 0 with it."
    )
    chosen = {**comparison, "excluded_beyond": [0.002, 0.005], "search": {"lambdas": [0.1, 0.15]}}
    assert "this were the only comparison and its λ given, a mean" in wording.finding(chosen)


def test_a_small_p_is_no_equation() -> None:
    comparison = {
        "name": "r3f",
        "against": "plain",
        "lambda": None,
        "mean": 0.02,
        "interval": [0.01, 0.03],
        "values": [0.02] * 16,
        "higher": 16,
        "p": 0.00003,
        "p_holm": 0.00003,
        "verdict": "evidence that it is better",
    }
    assert wording.finding(comparison) == (
        "r3f against plain: +2.00 [+1.00, +3.00] over 16 paired seeds, higher in 16 of them, "
        "p < 0.0001 (< 0.0001 adjusted): evidence that it is better."
    )
