"""What a study tells: a table of the methods with the findings' limits, and one of several tasks together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from noisytune_cli.cli.show import note, warn, write_out
from noisytune_cli.cli.table import lay_out
from noisytune_cli.escape import escape
from noisytune_cli.study.report import wording
from noisytune_cli.study.report.report import caveats
from noisytune_cli.study.report.results import encode, whole

#: The columns, and those that a narrow terminal does without, the first to go first.
COLUMNS = ("method", "λ", "seeds", "mean ± std", "difference from plain [95 %]", "p", "p (Holm)", "verdict")
_DISPENSABLE = ("p", "seeds", "p (Holm)", "λ")
_LEFT = {"method", "verdict"}

#: The columns of the table over tasks.
_TOGETHER = (
    "method",
    "tasks",
    "seeds",
    "mean difference [95 %]",
    "excluded beyond",
    "p",
    "p (Holm)",
    "verdict",
)


def show_study(results: Mapping[str, Any], folder: Path, *, as_json: bool, is_printed: bool = False) -> None:
    """Print the results, unless they are printed already.

    On stderr follows what takes from the scores' worth, what the seeds cannot show and where the rest lies.
    """
    if not is_printed:
        write_out(encode(results) if as_json else _table(results), spelled=not as_json)
    if results["missing"]:
        warn(f"the study is not finished: {results['finished']} of {results['planned']} runs are done")
    if results["lambda_chosen_on"] == "dev":
        warn(wording.choice("dev"))
    for told in caveats(results, escape):
        warn(f"{escape(results['study']['task'])}: {told}")
    if weak := wording.power(whole(results, "comparisons")):
        note(weak)
    note(f"report, results and figures: {folder}")


def show_together(summary: Mapping[str, Any], folder: Path, *, as_json: bool) -> None:
    """Print what several tasks say together."""

    def row(method: Mapping[str, Any]) -> dict[str, str]:
        told = [
            escape(method["name"], None),
            str(len(method["tasks"])),
            str(len(method["values"])),
            wording.difference(method),
            wording.interval(method["excluded_beyond"]),
            wording.probability(method["p"]),
            wording.probability(method["p_holm"]),
            method["verdict"],
        ]
        return dict(zip(_TOGETHER, told, strict=True))

    if as_json:
        write_out(encode(summary), spelled=False)
    else:
        rows = [
            (row(method), "green" * (method["verdict"] != wording.NO_EVIDENCE))
            for method in summary["methods"]
        ]
        dispensable = ("p", "tasks", "seeds", "p (Holm)")
        write_out(
            (
                "\nall tasks: mean paired difference from plain, score × 100\n",
                *lay_out(_TOGETHER, rows, left=_LEFT, dispensable=dispensable, all_in="--json"),
            ),
            spelled=True,
        )
    note(f"all tasks together: {folder / 'tasks.md'}")


def _table(results: Mapping[str, Any]) -> Iterator[str]:
    metric = wording.METRICS[results["study"]["primary"]]
    yield f"{escape(results['study']['task'])}: {metric} × 100 on the dev rows\n"
    rows = [
        (row, "green" if row["verdict"] not in ("", wording.NO_EVIDENCE) else "")
        for row in study_rows(results)
    ]
    yield from lay_out(COLUMNS, rows, left=_LEFT, dispensable=_DISPENSABLE, all_in="--json")


def study_rows(results: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield a row for each method at its λ; for each share of the training rows where there are several."""

    def row(
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
        return dict(zip(COLUMNS, [method, wording.strength(lam), seeds, score, *told], strict=True))

    primary = results["study"]["primary"]
    compared = {(c["name"], c["share"]): c for c in results["comparisons"]}
    several = len({entry["share"] for entry in results["conditions"]}) > 1
    for entry in results["conditions"]:
        if entry["reported"]:
            where = f", {entry['train_rows']:,} rows" if several else ""
            yield row(
                f"{escape(entry['name'], None)}{where}",
                entry["lambda"],
                str(len(entry["seeds"])),
                wording.spread(entry["dev"][primary]),
                compared.get((entry["name"], entry["share"])),
            )
    for entry in whole(results, "ensembles"):
        name = f"ensemble of {entry['members']} plain runs"
        yield row(name, None, "", wording.score(entry["dev"][primary]), None)
    for comparison in whole(results, "combinations"):
        name = f"{escape(comparison['name'], None)} against {escape(comparison['against'], None)}"
        yield row(name, comparison["lambda"], str(len(comparison["seeds"])), "", comparison)
