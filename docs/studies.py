"""Tables and figures of docs/results.md, from the journals of the published studies (docs/studies).

python docs/studies.py              draw the figures; the tables are made by `make docs`
python docs/studies.py --take OUT   take over the journals that lie in OUT, as `make study` leaves them

A journal is a study's folder as `noisytune study` keeps it, without what is made from it and without the
labels of the dev rows, which are GLUE's: whoever goes on with a copy of the folder has them again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from noisytune_cli.study.report import wording
from noisytune_cli.study.report.appendix import drift_table
from noisytune_cli.study.report.markdown import table
from noisytune_cli.study.report.plots import PLOTS, over_tasks
from noisytune_cli.study.report.report import unlearnt
from noisytune_cli.study.report.results import Results, judge, paired, summarise
from noisytune_cli.study.report.statistics import moments
from noisytune_cli.study.report.tasks import summarise_tasks
from noisytune_cli.study.report.write import draw

DOCS = Path(__file__).parent
STUDIES = DOCS / "studies"

#: GLUE's order, as far as it has been run.
TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "wnli")
NAMES = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "wnli": "WNLI"}

PAIR = ("plain", "noisytune")
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
LAMBDAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
METHODS = (*PAIR, "r3f", "r4f", "mixout", "recadam", "neftune", "swa", "weightnoise")
COMBINED = ("mixout", "noisytune+mixout", "recadam", "noisytune+recadam")


def take(out: Path) -> None:
    """Copy every journal below a folder to its place here."""
    for found in sorted(out.rglob("study.json")):
        if not found.with_name("runs.jsonl").stat().st_size:
            continue
        place = STUDIES / found.parent.relative_to(out)
        place.mkdir(parents=True, exist_ok=True)
        study = {key: value for key, value in json.loads(found.read_bytes()).items() if key != "dev_labels"}
        # The package that brings MiniLM has it in a folder of this name.
        if study["model"]["id"] == "model":
            study["model"]["id"] = "all-MiniLM-L6-v2"
        (place / "study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(found.with_name("runs.jsonl"), place / "runs.jsonl")


def results(
    folder: str,
    *methods: str,
    shares: Sequence[float] = (1.0,),
    lambdas: Sequence[float] = (0.15,),
    every_kind: bool = False,
) -> dict[str, Any]:
    """Return a study's results as if it were of these methods, shares and λ alone.

    noisytune's noise is uniform with a std for each matrix, or of `every_kind`.
    """
    study = json.loads((STUDIES / folder / "study.json").read_bytes())
    lines = (STUDIES / folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    usual = {(None, None), ("uniform", "matrix")}
    runs = [
        run
        for run in map(json.loads, lines)
        if run["method"] in methods
        and run["share"] in shares
        and run["lambda"] in (None, *lambdas)
        and (every_kind or (run["noise"], run["scope"]) in usual)
    ]
    return summarise({**study, "design": runs}, runs)


def pairs(model: str = "") -> list[dict[str, Any]]:
    """Return the results of plain and noisytune on each task, of the model whose name has this in it.

    A task of which one pair alone is finished has nothing to compare yet.
    """
    places = [f"{folder}{task}" for folder in ("pairs/", "mpnet-") for task in TASKS]
    found = [results(place, *PAIR) for place in places if (STUDIES / place).is_dir()]
    compared = [one for one in found if any(len(entry["values"]) > 1 for entry in one["comparisons"])]
    return [one for one in compared if model in one["study"]["model"]["id"]]


def tables() -> dict[str, str]:
    """Return the page's tables by the names that its marks have."""
    made: dict[str, Callable[[], str]] = {
        "pairs": lambda: _compared(
            ("model", "task", "plain", "noisytune"),
            [
                ((_model(one), _task(one), *_sides(one, entry)), entry)
                for one in pairs()
                for entry in one["comparisons"]
            ],
        ),
        "tasks": _over_tasks,
        "deni": lambda: _each(results("pairs/cola", "plain", "deni"), "method", "plain", "with it"),
        "adapters": lambda: _each(results("lora/sst2", "plain", "deni"), "method", "plain", "with it"),
        "probe": lambda: _probe(results("probe/cola", "plain", "r3f", "noisytune")),
        "kinds": lambda: _each(results("pairs/cola", *PAIR, every_kind=True), "noise", "plain", "with it"),
        "combinations": lambda: _combinations(results("pairs/cola", "plain", *COMBINED)),
        "shares": lambda: _shares(results("pairs/cola", *PAIR, shares=SHARES)),
        "lambda": _lambdas,
        "methods of MPNet": lambda: _methods(results("mpnet-cola", *METHODS)),
        "methods": lambda: _methods(results("pairs/cola", *METHODS)),
        "methods on SST-2": lambda: _methods(results("pairs/sst2", *METHODS)),
        "methods over tasks": lambda: _methods_over("cola", "sst2"),
        "change of norms": lambda: drift_table(results("pairs/cola", *METHODS), "norm_change"),
        "norms of the change": lambda: drift_table(results("pairs/cola", *METHODS), "change_norm"),
    }
    return {f"studies: {name}": make() + "\n" for name, make in made.items()}


def _compared(header: Sequence[str], rows: Sequence[tuple[Sequence[str], dict[str, Any]]]) -> str:
    """Return a table of comparisons, adjusted for one another: each with its cells."""
    judge([entry for _, entry in rows])
    return table(
        [*header, "difference [95 %]", "excluded beyond, 95 %", "higher in", "p", "p (Holm)"],
        [
            [
                *cells,
                wording.difference(entry),
                wording.interval(entry["excluded_beyond"]),
                f"{entry['higher']} of {len(entry['values'])}",
                wording.probability(entry["p"]),
                wording.probability(entry["p_holm"]),
            ]
            for cells, entry in rows
        ],
    )


def _each(one: Results, *header: str) -> str:
    """Return the table of a study's methods against plain."""
    return _compared(header, [((entry["name"], *_sides(one, entry)), entry) for entry in one["comparisons"]])


def _combinations(one: Results) -> str:
    added = [((entry["against"], *_sides(one, entry)), entry) for entry in one["combinations"]]
    return _compared(("method", "without noise", "with noise"), added)


def _shares(one: Results) -> str:
    ordered = sorted(one["comparisons"], key=lambda entry: entry["share"])
    rows = {entry["share"]: entry["train_rows"] for entry in one["conditions"]}
    return _compared(
        ("training rows", "plain", "noisytune"),
        [((str(rows[entry["share"]]), *_sides(one, entry)), entry) for entry in ordered],
    )


def _lambdas() -> str:
    """Return the table of each λ against plain, with the scores on the held-out rows that choose one."""
    # A study compares the λ that is chosen with plain, and no other: so each is a study of its own, too.
    searched = results("pairs/cola", *PAIR, lambdas=LAMBDAS)
    primary = searched["study"]["primary"]
    rows = []
    for condition in searched["conditions"]:
        if condition["lambda"] is None:
            continue
        one = results("pairs/cola", *PAIR, lambdas=(condition["lambda"],))
        # The p of the one that is chosen counts in what luck has chosen.
        (entry,) = (searched if condition["reported"] else one)["comparisons"]
        held_out = wording.spread(condition["held_out"][primary])
        name = wording.strength(condition["lambda"]) + " (chosen)" * condition["reported"]
        rows.append(((name, held_out, *_sides(one, entry)), entry))
    return _compared(("λ", "held-out rows", "plain", "with it"), rows)


def _methods(one: Results) -> str:
    """Return the table of a study's methods against plain, with what each costs."""
    found = {entry["name"]: entry for entry in one["conditions"]}
    beside = [metric for metric in ("accuracy",) if metric != one["study"]["primary"]]

    def cells(name: str) -> list[str]:
        scores = [wording.spread(found[name]["dev"][metric]) for metric in beside]
        return [name, *scores, wording.times(found[name]["cost"]["relative"]["forwards"])]

    return _compared(
        ("method", *(f"{metric}, %" for metric in beside), "forward passes", "plain", "with it"),
        [((*cells(entry["name"]), *_sides(one, entry)), entry) for entry in one["comparisons"]],
    )


def _methods_over(*tasks: str) -> str:
    """Return the table of the methods that tasks of MiniLM have in common, on each of them and over them."""
    summary = summarise_tasks([results(f"pairs/{task}", *METHODS) for task in tasks])
    rows = [
        ((method["name"], *map(wording.difference, method["tasks"])), method) for method in summary["methods"]
    ]
    return _compared(("method", *(NAMES[task] for task in tasks)), rows)


def _over_tasks() -> str:
    """Return what the tasks of MiniLM say together: first those that have most seeds, at last all.

    Where plain has learnt nothing a task is in the last row alone.
    """
    found = pairs("MiniLM")
    learnt = _learnt(found)
    seeds = [len(one["comparisons"][0]["values"]) for one in learnt]
    groups = [
        [one for one, number in zip(learnt, seeds, strict=True) if number >= least]
        for least in sorted(set(seeds), reverse=True)
    ]
    rows = []
    for chosen in [*groups, found] if len(learnt) < len(found) else groups:
        if len(chosen) > 1:
            (mean,) = summarise_tasks(chosen)["methods"]
            rows.append(
                [
                    ", ".join(NAMES[entry["task"]] for entry in mean["tasks"]),
                    str(len(mean["values"])),
                    wording.difference(mean),
                    wording.interval(mean["excluded_beyond"]),
                    f"{mean['higher']} of {len(mean['values'])}",
                    wording.probability(mean["p"]),
                    wording.interval(mean["other_tasks"]),
                ]
            )
    measured = [
        "difference [95 %]",
        "excluded beyond, 95 %",
        "higher in",
        "p",
        "other tasks such as these, 95 %",
    ]
    return table(["mean over", "seeds", *measured], rows)


def _learnt(found: Sequence[Results]) -> list[Results]:
    """Return the results of the tasks on which plain has learnt something."""
    return [one for one in found if not unlearnt(one)]


def _model(one: Results) -> str:
    return {"all-MiniLM-L6-v2": "MiniLM", "all-mpnet-base-v2": "MPNet"}[one["study"]["model"]["id"]]


def _task(one: Results) -> str:
    study = one["study"]
    return f"{NAMES[study['task']]}, {wording.METRICS[study['primary']]}"


def _probe(one: Results) -> str:
    """Return the table of what another task is learnt to from each method's encoder, against plain's."""
    probes = {
        entry["name"]: dict(
            zip(map(tuple, entry["seeds"]), entry["probe"]["accuracy"]["values"], strict=True)
        )
        for entry in one["conditions"]
    }
    plain = probes.pop("plain")
    rows = []
    for name, scores in probes.items():
        seeds = sorted(plain.keys() & scores.keys())
        sides = [_spread([side[seed] for seed in seeds]) for side in (plain, scores)]
        rows.append(((name, *sides), paired([scores[seed] - plain[seed] for seed in seeds])))
    return _compared(("method", "plain", "with it"), rows)


def _sides(one: Results, entry: dict[str, Any]) -> list[str]:
    """Return the scores of both sides of a comparison, over its pairs."""
    return [_score(one, entry, side) for side in ("against", "name")]


def _score(one: Results, entry: dict[str, Any], side: str) -> str:
    (found,) = (c for c in one["conditions"] if (c["name"], c["share"]) == (entry[side], entry["share"]))
    by_seed = dict(
        zip(map(tuple, found["seeds"]), found["dev"][one["study"]["primary"]]["values"], strict=True)
    )
    return _spread([by_seed[tuple(seed)] for seed in entry["seeds"]])


def _spread(scores: Sequence[float]) -> str:
    mean, std = moments(scores)
    return wording.spread({"mean": mean, "std": std})


def draw_figures() -> None:
    """Draw the page's figures anew."""
    of_cola = {
        "methods": ("cola-methods", results("pairs/cola", *METHODS)),
        "noise": ("cola-kinds", results("pairs/cola", *PAIR, every_kind=True)),
        "combinations": ("cola-combinations", results("pairs/cola", "plain", *COMBINED)),
        "share": ("cola-shares", results("pairs/cola", *PAIR, shares=SHARES)),
        "lambda": ("cola-lambda", results("pairs/cola", *PAIR, lambdas=LAMBDAS)),
        "drift": ("cola-drift", results("pairs/cola", *PAIR)),
    }
    wanted = [(name, one, PLOTS[plot][0]) for plot, (name, one) in of_cola.items()]
    wanted.append(("sst2-methods", results("pairs/sst2", *METHODS), PLOTS["methods"][0]))
    wanted.append(("mpnet-cola", results("mpnet-cola", *METHODS), PLOTS["methods"][0]))
    wanted.append(("tasks", summarise_tasks(_learnt(pairs("MiniLM"))), over_tasks))
    with tempfile.TemporaryDirectory() as folder:
        for name, one, plot in wanted:
            draw(one, Path(folder), {name: (plot, "")})
            shutil.copyfile(Path(folder) / f"{name}.png", DOCS / "figures" / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", type=Path, metavar="OUT", help="take over the journals that lie here")
    taken = parser.parse_args().take
    take(taken) if taken else draw_figures()
