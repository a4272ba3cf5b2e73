"""What a study prints: the table on stdout, JSON on request, and on stderr what the seeds cannot show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from noisytune_cli.cli import show_study, table
from noisytune_cli.study.report import results

from .records import run, runs, study


def summarise(made: list[dict[str, Any]], finished: Any = None, **others: Any) -> dict[str, Any]:
    return results.summarise(study(made, **others), made if finished is None else finished)


def show(summary: dict[str, Any], *, as_json: bool = False) -> None:
    show_study.show_study(summary, Path("out"), as_json=as_json)


def test_the_table_has_scores_differences_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    show(summarise([*runs("plain", [0.40, 0.42]), *runs("noisytune", [0.45, 0.43])]))
    out, err = capsys.readouterr()
    title, header, plain, noisy, vote = out.splitlines()
    assert title == "cola: Matthews correlation × 100 on the dev rows"
    assert header.split("  ")[0] == "method"
    assert plain.split() == ["plain", "2", "41.00", "±", "1.41"]
    assert noisy.split() == [
        *("noisytune", "0.15", "2", "44.00", "±", "1.41", "+3.00", "[+1.00,", "+5.00]", "0.5", "0.5"),
        *("no", "evidence", "of", "a", "difference"),
    ]
    assert vote.startswith("ensemble of 2 plain runs")
    assert "2 paired seeds cannot give a two-sided p below 0.5" in err
    assert "report, results and figures: out" in err
    assert "\x1b" not in out


def test_json_is_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarise([*runs("plain", [0.40, 0.42]), *runs("noisytune", [0.45, 0.43])])
    show(summary, as_json=True)
    out, err = capsys.readouterr()
    assert out == results.encode(summary)
    assert json.loads(out)["comparisons"][0]["mean"] == pytest.approx(0.03)
    assert "report, results and figures: out" in err


def test_rows_are_told_apart_by_share_and_combinations_follow(capsys: pytest.CaptureFixture[str]) -> None:
    made = [run("mixout"), run("noisytune+mixout", dev=0.6), run("plain"), run("plain", share=0.2)]
    show(summarise(made))
    out = capsys.readouterr().out
    assert "plain, 1,000 rows" in out
    assert "plain, 200 rows" in out
    (against,) = [line for line in out.splitlines() if "against mixout" in line]
    assert "+10.00" in against


def test_an_unfinished_study_and_a_choice_on_dev_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    made = [run("noisytune", seed, lam=lam, held_out=None) for seed in (0, 1) for lam in (0.1, 0.2)]
    show(summarise(made, finished=made[:3]))
    err = capsys.readouterr().err
    assert "noisytune: warning: the study is not finished: 3 of 4 runs are done" in err
    assert "the very rows that the scores are reported on" in err


def test_a_narrow_terminal_loses_the_less_telling_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    show(summarise([*runs("plain", [0.40, 0.42]), *runs("noisytune", [0.45, 0.43])]))
    out = capsys.readouterr().out
    assert "(too narrow for " in out
    assert "no evidence of a difference" in out
    assert "p (Holm)" not in out.splitlines()[1]


def test_names_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"noisytune.exclude": "[bold]\x1b[31m"}
    made = [run("noisytune", options=hostile), run("noisytune", options={"noisytune.exclude": ""})]
    show(summarise(made, task="t\nask"))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "noisytune (exclude [bold]\\x1b[31m)" in out
    assert "t\\nask" in out or "t\\x0aask" in out


def test_a_task_on_which_nothing_is_learnt_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    made = [*runs("plain", [0.01, 0.0, -0.02]), *runs("noisytune", [0.0, 0.0, -0.01])]
    show(summarise(made, constant_score=0.0))
    assert (
        "noisytune: warning: cola: plain's Matthews correlation, −0.33 ± 1.53, is not above that of "
        "one answer to every row, 0.00: where nothing is learnt, no difference is no evidence\n"
    ) in capsys.readouterr().err
