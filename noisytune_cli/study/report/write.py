"""What a study leaves beside its runs: results.json, the figures, and report.md, made from the runs alone.

A figure is a PNG for the report and an SVG for a paper.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisytune_cli.errors import unwritable
from noisytune_cli.study.journal import write_durably
from noisytune_cli.study.report import report
from noisytune_cli.study.report.plots import PLOTS, over_tasks
from noisytune_cli.study.report.results import encode, summarise
from noisytune_cli.study.report.tasks import render_tasks, summarise_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Where the figures lie in a study's folder.
FOLDER = "figures"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    # Names come from users: a dollar sign is no mathematics.
    "text.parse_math": False,
    "svg.hashsalt": "noisytune",
}

#: What would tell when, and by which version, a file was made.
_METADATA: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def write_outputs(
    folder: Path, study: Mapping[str, Any], runs: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write results.json, figures/ and report.md into a study's folder; return the results.

    Files that are there are replaced, each whole. Raises ResourceExhausted where they cannot be written.
    """
    results = summarise(study, runs)
    write_durably(folder / "results.json", encode(results).encode())
    drawn = draw(results, folder / FOLDER)
    write_durably(folder / "report.md", report.render(results, drawn).encode())
    return results


def write_tasks(folder: Path, studies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write what several tasks say, as tasks.json, tasks.md and a figure, beside their studies; return it."""
    summary = summarise_tasks(studies)
    write_durably(folder / "tasks.json", encode(summary).encode())
    drawn = draw(summary, folder / FOLDER, {"tasks": (over_tasks, "")})
    write_durably(folder / "tasks.md", render_tasks(summary, drawn).encode())
    return summary


def draw(
    results: Mapping[str, Any],
    folder: Path,
    plots: Mapping[str, tuple[Callable[[Mapping[str, Any]], Figure | None], str]] = PLOTS,
) -> list[str]:
    """Write every figure that the results have data for, as PNG and SVG; return the figures' names.

    The same results give the same bytes with the same matplotlib: no date, no random identifiers, and the
    font that it brings. Raises ResourceExhausted where they cannot be written.
    """
    import matplotlib

    drawn = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        for name, (plot, _) in plots.items():
            figure = plot(results)
            if figure is None:
                continue
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise unwritable(error, folder) from error
            for kind, metadata in _METADATA.items():
                content = io.BytesIO()
                figure.savefig(content, format=kind, dpi=200, metadata=metadata)
                write_durably(folder / f"{name}.{kind}", content.getvalue())
            drawn.append(name)
    return drawn
