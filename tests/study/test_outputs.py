"""The files that a study leaves: there, agreeing with each other, and replaced by a later run of it."""

from __future__ import annotations

import json
from pathlib import Path

from noisytune_cli.study.report.write import write_outputs

from .records import runs, study


def test_results_figures_and_report_agree(tmp_path: Path) -> None:
    made = [*runs("plain", [0.40, 0.42]), *runs("noisytune", [0.45, 0.43])]
    results = write_outputs(tmp_path, study(made), made)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    report = (tmp_path / "report.md").read_text()
    assert "noisytune (λ 0.15) against plain: +3.00" in report
    for path in ("figures/methods.png", "figures/methods.svg"):
        assert (tmp_path / path).stat().st_size > 1000
    assert "](figures/methods.png)" in report


def test_they_are_replaced_when_more_runs_are_done(tmp_path: Path) -> None:
    made = [*runs("plain", [0.40, 0.42]), *runs("noisytune", [0.45, 0.43])]
    write_outputs(tmp_path, study(made), made[:3])
    assert "not finished" in (tmp_path / "report.md").read_text()
    write_outputs(tmp_path, study(made), made)
    assert "not finished" not in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.md", "results.json"]
