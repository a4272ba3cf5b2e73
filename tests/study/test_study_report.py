"""What a study leaves and prints at its end, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from tests.cli.test_json import SCHEMAS

from .conftest import Tiny


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study of two methods, two λ and two seeds, and what it printed."""
    out = tmp_path_factory.mktemp("reported") / "out"
    arguments = [*tiny.arguments, "-o", str(out), "--seed", "0-1", "--lambda", "0.1,0.2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_a_study_prints_a_table_and_leaves_results_report_and_figures(finished: tuple[Path, str]) -> None:
    out, printed = finished
    results = json.loads((out / "results.json").read_text())
    assert (results["finished"], results["planned"], results["missing"]) == (6, 6, [])
    assert results["lambda_chosen_on"] == "held_out"
    noisy = [c for c in results["conditions"] if c["method"] == "noisytune"]
    best = max(noisy, key=lambda c: (c["held_out"]["accuracy"]["mean"], -c["lambda"]))
    assert [c["lambda"] for c in noisy if c["reported"]] == [best["lambda"]]
    assert "no evidence of a difference" in printed
    assert f"{100 * best['dev']['accuracy']['mean']:.2f}" in printed
    report = (out / "report.md").read_text()
    for name in ("methods", "lambda", "drift"):
        assert f"](figures/{name}.png)" in report
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (out / "figures" / f"{name}.svg").stat().st_size > 10_000


def test_json_is_what_results_json_holds_and_a_finished_study_reports_the_same(
    tiny: Tiny, finished: tuple[Path, str]
) -> None:
    out, _ = finished
    before = (out / "results.json").read_bytes()
    page = (out / "report.html").read_bytes()
    arguments = [*tiny.arguments, "-o", str(out), "--seed", "0-1", "--lambda", "0.1,0.2", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.encode() == before == (out / "results.json").read_bytes()
    result = CliRunner().invoke(app, [*arguments[:-1], "--format", "html", "--report-only"])
    assert result.stdout.encode() == page == (out / "report.html").read_bytes()
    Draft202012Validator(SCHEMAS["study"]).validate(json.loads(before))


def test_an_unfinished_study_is_reported_without_carrying_out_more(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun = [*tiny.arguments, "-o", str(out), "--seed", "0", "--method", "plain"]
    assert CliRunner().invoke(app, begun).exit_code == 0
    told = [word for word in tiny.arguments if word != "--quiet"]
    result = CliRunner().invoke(app, [*told, "-o", str(out), "--seed", "0-1", "--report-only"])
    assert result.exit_code == 0, result.output
    assert "the study is not finished: 1 of 4 runs are done" in result.stderr
    assert len((out / "runs.jsonl").read_text().splitlines()) == 1
    assert "**This study is not finished: 1 of 4 runs are done.**" in (out / "report.md").read_text()
