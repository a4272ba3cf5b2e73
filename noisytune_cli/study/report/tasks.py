"""Several tasks together: each method against plain on every task, and its mean over them (papers' table 2).

A seed's difference over tasks is the mean of its differences on each of them, over the seeds that all have:
runs of one seed share their noise across tasks, so the seed, not the run, is what may be flipped and
resampled. That speaks about other seeds on these very tasks. About other tasks speaks the spread between the
tasks' means: with as many seeds of each, Student's t over those means is the mixed model's interval. p-values
are adjusted after Holm: those of single tasks among all of the table, those of means among the means.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from noisytune_cli.study.report import statistics, wording
from noisytune_cli.study.report.conditions import ConditionKind, Pair, kind_of, name_kinds
from noisytune_cli.study.report.markdown import bullets, image, table, text
from noisytune_cli.study.report.results import Results, choice_counted, excluded_beyond, judge, paired, whole
from noisytune_cli.study.report.statistics import Search

#: The version of the document's layout.
SCHEMA = 1


def summarise_tasks(studies: Sequence[Results]) -> dict[str, Any]:
    """Return what the studies of several tasks say of each method together, from their results alone."""
    compared = [_by_kind(results) for results in studies]
    names = name_kinds(kind for entries in compared for kind in entries)
    methods = [
        method
        for kind, name in names.items()
        if (method := _method(kind, name, studies, compared)) is not None
    ]
    judge(methods)
    judge([cell for method in methods for cell in method["tasks"]])
    return {
        "schema": SCHEMA,
        "model": studies[0]["study"]["model"],
        "tasks": [_task(results) for results in studies],
        "methods": methods,
    }


def _task(results: Results) -> dict[str, Any]:
    """Return a task's name, its metric, plain's score and that of one answer to every row."""
    primary = results["study"]["primary"]
    plain = [entry for entry in whole(results) if entry["method"] == "plain"]
    return {
        "task": results["study"]["task"],
        "metric": primary,
        "plain": {**plain[0]["dev"][primary]} if plain else None,
        "constant_score": results["study"].get("constant_score"),
        "above_constant": plain[0]["above_constant"] if plain else None,
        "finished": results["finished"],
        "planned": results["planned"],
        "lambda_chosen_on": results["lambda_chosen_on"],
    }


def _by_kind(results: Results) -> dict[ConditionKind, Mapping[str, Any]]:
    """Return the comparisons with plain by what is compared, whose name depends on what else a study has."""
    kinds = {entry["name"]: kind_of(entry) for entry in whole(results)}
    return {kinds[entry["name"]]: entry for entry in whole(results, "comparisons")}


def _method(
    kind: ConditionKind,
    name: str,
    studies: Sequence[Results],
    compared: Sequence[Mapping[ConditionKind, Mapping[str, Any]]],
) -> dict[str, Any] | None:
    """Return a method's differences on each task and over them; None where a task or a common seed lacks."""
    found = [entries[kind] for entries in compared if kind in entries]
    by_seed = [dict(zip(map(tuple, entry["seeds"]), entry["values"], strict=True)) for entry in found]
    common = sorted(set.intersection(*map(set, by_seed)))
    if len(found) < len(studies) or not common:
        return None
    told = ("lambda", "seeds", "mean", "std", "interval", "excluded_beyond", "values", "p")
    cells = [
        {
            "task": results["study"]["task"],
            **{key: entry[key] for key in told},
            "choice_counted": choice_counted(results, entry),
        }
        for results, entry in zip(studies, found, strict=True)
    ]
    differences = [fmean(values[seed] for values in by_seed) for seed in common]
    means = [fmean(values[seed] for seed in common) for values in by_seed]
    return {
        "name": name,
        "tasks": cells,
        "seeds": [list(seed) for seed in common],
        **paired(differences, [_search(entry, common) for entry in found]),
        "other_tasks": excluded_beyond(means),
    }


def _search(entry: Mapping[str, Any], common: Collection[Pair]) -> Search:
    """Return a task's differences at each λ, of the seeds that all tasks have, and the scores that chose one.

    A λ that was given, or is taken as given, is one that was chosen among one. Where a task has more seeds
    than the others, they have chosen its λ, too.
    """
    seeds = list(map(tuple, entry["seeds"]))
    found = entry["search"]
    if found is None:
        values = dict(zip(seeds, entry["values"], strict=True))
        return Search([[values[seed]] for seed in common], [[0.0] for _ in common])
    differences, scores = (dict(zip(seeds, found[kind], strict=True)) for kind in ("differences", "scores"))
    others = [scores[seed] for seed in seeds if seed not in common]
    return Search(
        [differences[seed] for seed in common],
        [scores[seed] for seed in common],
        [sum(of_one) for of_one in zip(*others, strict=True)] or [0.0],
    )


def render_tasks(summary: Mapping[str, Any], drawn: Iterable[str]) -> str:
    """Return the summary in Markdown; `drawn` names the figures that lie in `figures/`."""
    tasks = summary["tasks"]
    names = [text(task["task"]) for task in tasks]
    parts = [f"# {text(summary['model']['id'])} on {', '.join(names)}"]
    if unfinished := [task for task in tasks if task["finished"] < task["planned"]]:
        told = (f"{text(t['task'])}: {t['finished']} of {t['planned']} runs" for t in unfinished)
        parts.append(f"**Not finished: {'; '.join(told)}.** What follows is about those.")
    if not summary["methods"]:
        return "\n\n".join([*parts, "No method has a seed that it and plain have on every task."]) + "\n"
    parts.append(bullets(map(_finding, summary["methods"])))
    if unlearnt := [task for task in tasks if task["above_constant"] is False]:
        told = (
            f"{text(t['task'])}: {wording.unlearnt(t['metric'], t['plain'], t['constant_score'])}"
            for t in unlearnt
        )
        parts.append(f"**{'. '.join(told)}.** `--task` without such tasks gives the mean over the others.")
    plain = [wording.spread(t["plain"]) if t["plain"] else "" for t in tasks]
    metrics = (f"{name} ({wording.METRICS[t['metric']]})" for name, t in zip(names, tasks, strict=True))
    rows = [["plain", *plain, "", "", "", ""], *map(_row, summary["methods"])]
    parts += [
        table(["method", *metrics, "mean difference", "p", "p (Holm)", "other tasks"], rows),
        "Plain: mean ± std over seeds, × 100. The others: the mean paired difference from plain on each "
        "task with its 95 % bootstrap interval and its number of seeds, starred where p is below 0.05 when "
        f"adjusted after Holm for all {summary['methods'][0]['tasks'][0]['comparisons']} of the table. The "
        "mean difference is that of the seeds that all tasks have, each a mean over the tasks; its p is that "
        "of the two-sided sign-flip test over seeds, adjusted for the methods. It is about these tasks; "
        "`other tasks` is the 95 % interval of the mean over tasks such as these, by Student's t over the "
        "tasks' means.",
        *_choice(summary),
    ]
    parts += [
        image(f"figures/{name}.png", "Paired differences from plain (bars: 95 % intervals)") for name in drawn
    ]
    return "\n\n".join(parts) + "\n"


def _choice(summary: Mapping[str, Any]) -> list[str]:
    """Return where λ was chosen, if it was, and whether p counts that in."""
    cells = [cell for method in summary["methods"] for cell in method["tasks"]]
    counted = [cell["choice_counted"] for cell in cells if cell["choice_counted"] is not None]
    ways = {task["lambda_chosen_on"] for task in summary["tasks"]}
    return [wording.choice("dev" if "dev" in ways else "held_out", counted)] if counted else []


def _finding(method: Mapping[str, Any]) -> str:
    several = wording.count(len(method["tasks"]), "task")
    told = {**method, "name": text(method["name"]), "against": "plain", "lambda": None}
    return wording.finding(told).replace(" over ", f" over {several} and ", 1)


def _row(method: Mapping[str, Any]) -> list[str]:
    def cell(entry: Mapping[str, Any]) -> str:
        star = "*" if entry["p_holm"] < statistics.SIGNIFICANCE else ""
        lam = "" if entry["lambda"] is None else f", λ {wording.strength(entry['lambda'])}"
        return f"{wording.difference(entry)}{text(star)} (n {len(entry['values'])}{lam})"

    return [
        text(method["name"]),
        *map(cell, method["tasks"]),
        f"{wording.difference(method)} (n {len(method['values'])})",
        wording.probability(method["p"]),
        wording.probability(method["p_holm"]),
        wording.interval(method["other_tasks"]),
    ]
