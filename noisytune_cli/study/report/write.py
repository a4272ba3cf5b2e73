"""What a study leaves beside its runs: results.json, the figures, and report.md, made from the runs alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from noisytune_cli.study.journal import write_durably
from noisytune_cli.study.report import figures, report
from noisytune_cli.study.report.results import encode, summarise


def write_outputs(
    folder: Path, study: Mapping[str, Any], runs: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write results.json, figures/ and report.md into a study's folder; return the results.

    Files that are there are replaced, each whole. Raises ResourceExhausted where they cannot be written.
    """
    results = summarise(study, runs)
    write_durably(folder / "results.json", encode(results))
    drawn = figures.draw(results, folder / figures.FOLDER)
    write_durably(folder / "report.md", report.render(results, drawn))
    return results
