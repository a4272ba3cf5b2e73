"""A ladder of noise: a row for each strength and seed, the unperturbed model first, and restored."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import noisytune_cli
from noisytune_cli.errors import UsageError


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 2))


def distance(made: Any) -> float:
    """How far a model is from the one without noise."""
    pairs = zip(made.parameters(), model().parameters(), strict=True)
    return sum((a - b).abs().sum().item() for a, b in pairs)


def test_rows_are_in_order_and_the_unperturbed_model_is_the_first() -> None:
    here = model()
    rows = noisytune_cli.ladder(here, distance, sigma=[0.1, 0, 0.2], seeds=[4, 7], include="0.*")
    assert [(row["sigma"], row["seed"]) for row in rows] == [
        (0.0, None),
        (0.1, 4),
        (0.1, 7),
        (0.2, 4),
        (0.2, 7),
    ]
    assert all(row.keys() == {"sigma", "seed", "score"} for row in rows)
    assert rows[0]["score"] == 0.0
    for row in rows[1:]:
        noised = model()
        noisytune_cli.perturb_(noised, sigma=row["sigma"], seed=row["seed"], include="0.*")
        assert row["score"] == distance(noised) > 0
    assert distance(here) == 0.0


def test_several_scores_and_lambdas() -> None:
    rows = noisytune_cli.ladder(
        model(), lambda m: {"far": distance(m), "two": 2}, lam=[0.3], seeds=range(2), noise="gaussian"
    )
    assert [row.keys() for row in rows] == [{"lam", "seed", "far", "two"}] * 3
    noised = model()
    noisytune_cli.perturb_(noised, lam=0.3, seed=1, noise="gaussian")
    assert rows[2]["far"] == distance(noised)


def test_the_model_is_restored_after_an_exception() -> None:
    here = model()

    def evaluate(made: Any) -> float:
        if distance(made):
            raise ZeroDivisionError
        return 1.0

    with pytest.raises(ZeroDivisionError):
        noisytune_cli.ladder(here, evaluate, sigma=[0.1])
    assert distance(here) == 0.0


@pytest.mark.parametrize(
    "options",
    [{}, {"sigma": [0.1], "lam": [0.1]}, {"sigma": 0.1}, {"sigma": "0:1:0.1"}, {"sigma": [0.1], "seeds": 5}],
    ids=str,
)
def test_what_is_no_ladder_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        noisytune_cli.ladder(model(), distance, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": "gauss"}, "noise='gauss'"),
        ({"sigma": [0.1, "strong"]}, "sigma='strong'"),
        ({"seeds": [0, -1]}, "seed=-1"),
        ({"rules": {"head.*": 0.1}}, "matches nothing"),
        ({"seed": 3}, "seed"),
        ({"sigmas": 3}, "sigmas"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_scored(options: dict[str, Any], words: str) -> None:
    def evaluate(_: Any) -> float:
        raise AssertionError("it was scored")

    here = model()
    with pytest.raises((UsageError, TypeError), match=words):
        noisytune_cli.ladder(here, evaluate, **{"sigma": [0.1], **options})
    assert distance(here) == 0.0


def test_every_noise_gets_all_of_an_iterator() -> None:
    def bias(made: Any) -> float:
        return float(made[0].bias.detach().abs().sum())

    rows = noisytune_cli.ladder(model(), bias, sigma=[0.1], seeds=[0, 1], rules=iter([("*.bias", 0.0)]))
    assert len({row["score"] for row in rows}) == 1


def test_an_evaluation_that_returns_nothing_is_told_at_once() -> None:
    calls: list[object] = []
    with pytest.raises(UsageError, match="returned None"):
        noisytune_cli.ladder(model(), calls.append, sigma=[0.1])
    assert len(calls) == 1


def test_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = noisytune_cli.ladder(
        model(), lambda m: {"a": distance(m), "b": 1.0}, sigma=[0.2, 0.1], seeds=[0, 1]
    )
    figure = rows.figure("a", tmp_path / "ladder.png")
    axes = figure.axes[0]
    mean = [sum(r["a"] for r in rows if r["sigma"] == s) / n for s, n in ((0.0, 1), (0.1, 2), (0.2, 2))]
    assert axes.lines[0].get_xdata().tolist() == [0.0, 0.1, 0.2]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(mean)
    assert len(axes.lines[1].get_xdata()) == 5
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("σ", "a")
    assert (tmp_path / "ladder.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="a, b"):
        rows.figure("c")


def test_without_matplotlib_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noisytune_cli.ladder(model(), distance, sigma=[0.1], seeds=[0])
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="matplotlib is not installed"):
        rows.figure()
