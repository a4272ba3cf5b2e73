"""What a study tells: how far it is, and a table of the methods or JSON, with the findings' limits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from noisytune_cli.cli.show import is_terminal, note, warn, write_out
from noisytune_cli.cli.table import lay_out
from noisytune_cli.escape import escape
from noisytune_cli.study.report import wording
from noisytune_cli.study.report.results import NO_EVIDENCE, encode, whole

#: The columns, and those that a narrow terminal does without, the first to go first.
_COLUMNS = ("method", "λ", "seeds", "mean ± std", "difference from plain [95 %]", "p", "p (Holm)", "verdict")
_DISPENSABLE = ("p", "seeds", "p (Holm)", "λ")
_LEFT = {"method", "verdict"}


def show_studied(results: Mapping[str, Any], folder: Path, *, as_json: bool, quiet: bool) -> None:
    """Print the results; on stderr, unless `quiet`, where the rest lies and what the seeds cannot show."""
    write_out(encode(results) if as_json else _table(results))
    if results["missing"]:
        warn(f"the study is not finished: {results['finished']} of {results['planned']} runs are done")
    if results["lambda_chosen_on"] == "dev":
        warn(wording.choice("dev"))
    if quiet:
        return
    compared = whole(results, "comparisons")
    if compared and (weak := wording.power(compared)):
        note(weak)
    note(f"report, results and figures: {folder}")


def _table(results: Mapping[str, Any]) -> Iterator[str]:
    metric = wording.METRICS[results["study"]["primary"]]
    yield f"{escape(results['study']['task'])}: {metric} × 100 on the dev rows\n"
    rows = [(row, "green" if row["verdict"] not in ("", NO_EVIDENCE) else "") for row in _rows(results)]
    yield from lay_out(_COLUMNS, rows, left=_LEFT, dispensable=_DISPENSABLE, all_in="--json")


def _rows(results: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield a row for each method at its λ; for each share of the training rows where there are several."""
    primary = results["study"]["primary"]
    compared = {(c["name"], c["share"]): c for c in results["comparisons"]}
    several = len({entry["share"] for entry in results["conditions"]}) > 1
    for entry in results["conditions"]:
        if entry["reported"]:
            where = f", {entry['train_rows']:,} rows" if several else ""
            yield _row(
                f"{escape(entry['name'], None)}{where}",
                entry["lambda"],
                str(len(entry["seeds"])),
                wording.spread(entry["dev"][primary]),
                compared.get((entry["name"], entry["share"])),
            )
    for entry in whole(results, "ensembles"):
        name = f"ensemble of {entry['members']} plain runs"
        yield _row(name, None, "", wording.score(entry["dev"][primary]), None)
    for comparison in whole(results, "combinations"):
        name = f"{escape(comparison['name'], None)} against {escape(comparison['against'], None)}"
        yield _row(name, comparison["lambda"], str(len(comparison["seeds"])), "", comparison)


def _row(
    method: str, lam: float | None, seeds: str, score: str, comparison: Mapping[str, Any] | None
) -> dict[str, str]:
    told = [""] * 4
    if comparison is not None:
        told = [
            wording.difference(comparison),
            wording.probability(comparison["p"]),
            wording.probability(comparison["p_holm"]),
            comparison["verdict"],
        ]
    return dict(zip(_COLUMNS, [method, wording.strength(lam), seeds, score, *told], strict=True))


@contextmanager
def progress(total_steps: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar of steps with the time left on stderr; yield what to call with the steps just done.

    Without a terminal, or where not `enabled`, nothing is shown.
    """
    if not (enabled and total_steps and is_terminal(sys.stderr)):
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("study"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        # A run's first steps say little about those of the other methods, so look far back.
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        speed_estimate_period=600.0,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task("study", total=total_steps)
        yield lambda steps: bar.advance(task, steps)
