"""The parts of a report that lie beside the scores: change of the parameters, probe, cost, and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from noisytune_cli.study.report import wording
from noisytune_cli.study.report.markdown import image, table, text
from noisytune_cli.study.report.results import Results, whole


def drift(results: Results, figure: str | None) -> list[str]:
    """Return how far finetuning moved each kind of parameter, both ways of measuring it."""
    if not _measured(results):
        return []
    caption = "Relative L1 change of each kind of parameter, with and without noise (lines: std over seeds)"
    return [
        "## Change of the parameters",
        "With w₀ the weights that finetuning started from (the noised ones where there was noise) and w₁ the "
        "finetuned ones, in percent, means over seeds. The change of the L1 norm, "
        "abs(‖w₁‖₁ - ‖w₀‖₁) / ‖w₀‖₁, is what the NoisyTune paper shows; steps in opposite directions cancel "
        "in it:",
        drift_table(results, "norm_change"),
        "The L1 norm of the change, ‖w₁ - w₀‖₁ / ‖w₀‖₁, is how far the weights went:",
        drift_table(results, "change_norm"),
        *([image(figure, caption)] if figure else []),
    ]


def drift_table(results: Results, measure: Literal["norm_change", "change_norm"]) -> str:
    """Return how far finetuning moved each kind of parameter, in percent, measured in one way."""
    entries = _measured(results)
    kinds = list(dict.fromkeys(kind for entry in entries for kind in entry["drift"]))

    def cells(found: Mapping[str, Any]) -> list[str]:
        # Parameters that are all 0 at the start, as biases can be, have no relative change.
        return [f"{100 * found[kind][measure]['mean']:.3f}" if kind in found else "" for kind in kinds]

    return table(["method", *kinds], [[text(e["name"]), *cells(e["drift"])] for e in entries])


def _measured(results: Results) -> list[dict[str, Any]]:
    return [entry for entry in whole(results) if entry["reported"] and entry["drift"]]


def probe(results: Results) -> list[str]:
    """Return what a frozen encoder still knows of another task."""
    entries = [entry for entry in whole(results) if entry["reported"] and entry["probe"]]
    if not entries:
        return []
    first = entries[0]["probe"]
    metrics = [metric for metric in first if metric != "task"]
    rows = [
        [
            text(entry["name"]),
            str(len(entry["probe"][metrics[0]]["values"])),
            *(wording.spread(entry["probe"][metric]) for metric in metrics),
        ]
        for entry in entries
    ]
    return [
        "## Representational collapse",
        f"The finetuned encoder is frozen, and a linear model learns {text(first['task'])} from it: the "
        "lower the score, the less the encoder still knows of what its own task had no use for.",
        table(["method", "seeds", *(wording.METRICS[metric] for metric in metrics)], rows),
    ]


def cost(results: Results) -> list[str]:
    """Return what a run costs, also relative to plain, and what the ensemble costs in all."""
    entries = [entry for entry in whole(results) if entry["reported"]]
    if not entries:
        return []
    rows = [_cost_row(text(entry["name"]), entry["cost"]) for entry in entries]
    rows += [
        _cost_row(f"ensemble of {entry['members']} plain runs", entry["cost"])
        for entry in whole(results, "ensembles")
    ]
    header = ["method", "member steps", "forward passes", "seconds", "steps", "passes", "time"]
    return [
        "## Cost of a run",
        "Means over the runs; with a ×, relative to the mean plain run. A member step is one optimizer step "
        "of one model.",
        table(header, rows),
    ]


def settings(results: Results) -> list[str]:
    """Return how the runs were made: everything that study.json says of it."""
    study = results["study"]
    seconds = sum(entry["cost"]["seconds"] * entry["runs"] for entry in results["conditions"])
    rows = [
        ["runs", f"{results['finished']} of {results['planned']}, {wording.duration(seconds)} in all"],
        *(
            [text(f"{group}: {key}"), text(value if isinstance(value, str) else json.dumps(value))]
            for group in ("model", "settings", "machine", "tool")
            for key, value in study.get(group, {}).items()
            if value is not None
        ),
    ]
    return ["## How it was run", "Machine and tool are those of the first runs.", table(["", ""], rows)]


def _cost_row(name: str, spent: Mapping[str, Any]) -> list[str]:
    relative = spent["relative"] or {}
    return [
        name,
        f"{spent['member_steps']:,.0f}",
        f"{spent['forwards']:,.0f}",
        f"{spent['seconds']:,.1f}",
        *(wording.times(relative.get(measure)) for measure in ("member_steps", "forwards", "seconds")),
    ]
