"""From runs to results: everything that the table, the report and the figures say, as one JSON document.

`summarise` is a pure function of study.json and the lines of runs.jsonl, so results can be made again from
them at any time, also of a study that is not finished. `docs/results-format.md` explains every field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from noisytune_cli.manifest.write import lay_out
from noisytune_cli.study.report import statistics
from noisytune_cli.study.report.conditions import (
    Condition,
    ConditionKind,
    Family,
    Pair,
    Run,
    common_pairs,
    families,
    gather,
    kind_of,
    name_kinds,
    separate_pairs,
)
from noisytune_cli.study.report.statistics import Search
from noisytune_cli.study.report.wording import NO_EVIDENCE
from noisytune_cli.study.training import metrics

#: The document, and an entry of one of its lists.
Results = Mapping[str, Any]
Entry = Mapping[str, Any]

#: The version of the document's layout.
SCHEMA = 1

#: What a comparison comes to where it is not NO_EVIDENCE.
BETTER = "evidence that it is better"
WORSE = "evidence that it is worse"

#: What study.json holds that is of no use beside the results.
_LEFT_OUT = ("schema", "design", "dev_labels")


def summarise(study: Mapping[str, Any], runs: Iterable[Run]) -> dict[str, Any]:
    """Return the results of a study's finished runs; `study` and `runs` are as its files hold them.

    Without the labels of the dev rows there is no vote to be scored.
    """
    finished = {run["key"]: run for run in runs}
    conditions = gather(finished.values())
    planned = [run for run in study["design"] if run["key"] not in finished]
    names = name_kinds([*(c.kind for c in conditions), *map(kind_of, planned)])
    primary = str(study["primary"])
    found = families(conditions, primary)
    plain = {f.chosen.share: f.chosen for f in found if f.chosen.kind.method == "plain"}
    return {
        "schema": SCHEMA,
        "study": {key: value for key, value in study.items() if key not in _LEFT_OUT},
        "finished": len(finished),
        "planned": len(study["design"]),
        "missing": _missing(planned, names),
        "lambda_chosen_on": _chosen_on(found),
        "conditions": [
            _condition(c, names[c.kind], family, plain.get(c.share), study)
            for family in found
            for c in family.conditions
        ],
        "comparisons": _compare(
            [
                (family, plain[family.chosen.share])
                for family in found
                if family.chosen.share in plain and family.chosen.kind.method != "plain"
            ],
            names,
            study,
        ),
        "combinations": _compare(_noise_added(found), names, study),
        "ensembles": [
            _ensemble(distinct, condition.share, study)
            for condition in plain.values()
            if len(distinct := _distinct(condition, study)) > 1 and "dev_labels" in study
        ],
    }


def foresee(design: Iterable[Run]) -> tuple[int, int, bool] | None:
    """Return the most seeds and the number of the comparisons with plain that planned runs will make.

    They are those of the largest share of the training rows; None where there are none. λ is not chosen yet,
    so a kind has the seeds of the λ that has most. Last, whether there are more pairs, of which some share a
    run.
    """
    conditions = gather(design)
    conditions = [condition for condition in conditions if condition.share == conditions[0].share]
    plain = next((condition for condition in conditions if condition.kind.method == "plain"), None)
    seeds: dict[ConditionKind, int] = {}
    shared = False
    for condition in conditions:
        if plain is None or condition is plain:
            continue
        # plain has one run for all seeds of noise, whatever the task.
        if groups := separate_pairs((condition, plain), regression=False):
            seeds[condition.kind] = max(len(groups), seeds.get(condition.kind, 0))
            shared = shared or any(len(group) > 1 for group in groups)
    return (max(seeds.values()), len(seeds), shared) if seeds else None


def encode(results: Results) -> str:
    """Return the results as JSON in ASCII, laid out as a manifest is; floats round-trip."""
    return b"".join(lay_out(results.items())).decode()


def whole(results: Results, key: str = "conditions") -> list[Any]:
    """Return the entries of a list of the results that belong to the largest share of the training rows."""
    largest = max((entry["share"] for entry in results["conditions"]), default=1.0)
    return [entry for entry in results[key] if entry["share"] == largest]


def _missing(planned: Iterable[Run], names: Mapping[ConditionKind, str]) -> list[dict[str, Any]]:
    """Return the planned runs that are not finished, by condition."""
    found: dict[tuple[str, float | None, float], list[int]] = {}
    for run in planned:
        found.setdefault((names[kind_of(run)], run["lambda"], run["share"]), []).append(run["seed"])
    return [
        {"name": name, "lambda": lam, "share": share, "seeds": seeds}
        for (name, lam, share), seeds in found.items()
    ]


def _chosen_on(found: Sequence[Family]) -> str:
    """Tell where λ was chosen: `dev` if it was so for any family, `given` if there was nothing to choose."""
    ways = {family.chosen_on for family in found}
    return next((way for way in ("dev", "held_out") if way in ways), "given")


def _condition(
    condition: Condition, name: str, family: Family, plain: Condition | None, study: Mapping[str, Any]
) -> dict[str, Any]:
    every = list(condition.runs.values())
    distinct = _distinct(condition, study)
    runs = list(distinct.values())
    kind = condition.kind
    dev = _scores(runs, "dev")
    assert dev is not None  # every run is scored on it
    return {
        "name": name,
        "method": kind.method,
        "lambda": condition.lam,
        "noise": kind.noise,
        "scope": kind.scope,
        "options": dict(kind.options),
        "share": condition.share,
        "train_rows": runs[0]["train_rows"],
        "reported": condition is family.chosen,
        "lambda_chosen_on": family.chosen_on,
        "runs": sum("same_as" not in run for run in every),
        "diverged": sum(run.get("loss", 0.0) is None for run in runs),
        "seeds": [list(pair) for pair in distinct],
        "dev": dev,
        "above_constant": _above_constant(dev[study["primary"]]["values"], study.get("constant_score")),
        "held_out": _scores(runs, "held_out"),
        "drift": _drift(runs),
        "probe": _probe(runs),
        "cost": _cost(every, list(plain.runs.values()) if plain is not None else []),
    }


def _distinct(condition: Condition, study: Mapping[str, Any]) -> dict[Pair, Run]:
    """Return a condition's runs by their seeds; of those that are one and the same the first."""
    groups = separate_pairs((condition,), regression=study["regression"])
    return {group[0]: condition.runs[group[0]] for group in groups}


def _scores(runs: Sequence[Run], split: Literal["dev", "held_out"]) -> dict[str, Any] | None:
    """Return mean, std, interval and values of each metric; None where a run was not scored on the split."""
    if any(run[split] is None for run in runs):
        return None
    return {metric: _sample([run[split][metric] for run in runs]) for metric in runs[0][split]}


def _above_constant(values: Sequence[float], constant: float | None) -> bool | None:
    """Tell whether scores are above that of one answer to every row; None where that one is not known.

    They are where each of them is, or the whole 95 % interval of their mean: of two or three seeds it is so
    wide that it alone would deny what every run shows.
    """
    if constant is None:
        return None
    bounds = statistics.excluded_beyond(values)
    return min(values) > constant or (bounds is not None and bounds[0] > constant)


def _sample(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, std, interval of the mean (a list of two, or None) and the values themselves."""
    bounds = statistics.bootstrap_interval(values)
    return {**_spread(values), "interval": None if bounds is None else list(bounds), "values": list(values)}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    mean, std = statistics.moments(values)
    return {"mean": mean, "std": std}


def _drift(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return mean and std of both measures for each kind of parameter, of all runs that measured them."""
    measured = [run["drift"] for run in runs if run["drift"]]
    if not measured:
        return None
    return {
        kind: {
            measure: _spread([drift[kind][measure] for drift in measured if kind in drift])
            for measure in ("norm_change", "change_norm")
        }
        for kind in dict.fromkeys(kind for drift in measured for kind in drift)
    }


def _probe(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the scores of the probes, and the name of their task."""
    probes = [run["probe"] for run in runs if run["probe"]]
    if not probes:
        return None
    scores = [metric for metric in probes[0] if metric != "task"]
    return {
        "task": probes[0]["task"],
        **{metric: _sample([probe[metric] for probe in probes]) for metric in scores},
    }


def _cost(runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """Return mean counts and seconds of a run; `relative` to the mean plain run's at the same share."""
    measures = ("member_steps", "forwards", "seconds")
    own = {measure: fmean(run[measure] for run in runs) for measure in measures}
    return {**own, "relative": _relative(own, plain)}


def _relative(own: Mapping[str, float], plain: Sequence[Run]) -> dict[str, float] | None:
    reference = {measure: fmean(run[measure] for run in plain) for measure in own} if plain else {}
    return {m: own[m] / reference[m] for m in own} if all(reference.values()) and reference else None


def _noise_added(found: Sequence[Family]) -> list[tuple[Family, Condition]]:
    """Return each combination with noise beside the method that the noise was added to, where both are there.

    Noise alone is no combination: it is compared with plain anyway.
    """
    reported = [(family, family.chosen) for family in found]
    without = {(c.kind, c.share): c for _, c in reported if not c.kind.noisy and c.kind.method != "plain"}
    places = [(family, (c.kind.without_noise(), c.share)) for family, c in reported if c.kind.noisy]
    return [(family, without[place]) for family, place in places if place in without]


def _compare(
    couples: Iterable[tuple[Family, Condition]],
    names: Mapping[ConditionKind, str],
    study: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the comparisons of couples that have seeds in common, adjusted among those of one share."""
    found = [
        _comparison(family, other, names, study)
        for family, other in couples
        if common_pairs((family.chosen, other))
    ]
    for share in {comparison["share"] for comparison in found}:
        judge([comparison for comparison in found if comparison["share"] == share])
    return found


def judge(together: Sequence[dict[str, Any]]) -> None:
    """Add to comparisons what each comes to, its p-value adjusted for all of them."""
    adjusted = statistics.holm([comparison["p"] for comparison in together])
    for comparison, p in zip(together, adjusted, strict=True):
        comparison["p_holm"] = p
        comparison["comparisons"] = len(together)
        comparison["verdict"] = _verdict(p, comparison["mean"])


def _comparison(
    family: Family, other: Condition, names: Mapping[ConditionKind, str], study: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the runs at the chosen λ and another condition's say; pairs that share a run are one."""
    one = family.chosen
    groups = separate_pairs((one, other), regression=study["regression"])
    pairs = sum(map(len, groups))
    differences = _differences(one, other, groups, study["primary"])
    search = _search(family, other, groups, study["primary"])
    return {
        "name": names[one.kind],
        "against": names[other.kind],
        "lambda": one.lam,
        "share": one.share,
        "seeds": [list(group[0]) for group in groups],
        "pairs": pairs,
        "left_out": len({*one.runs, *other.runs}) - pairs,
        **paired(differences, [] if search is None else [Search(search["differences"], search["scores"])]),
        "smallest_p": statistics.smallest_p(len(differences)),
        "search": search,
    }


def _differences(
    one: Condition, other: Condition, groups: Iterable[Sequence[Pair]], metric: str
) -> list[float]:
    """Return the mean difference of the scores on the dev rows of each group of pairs."""
    return [
        fmean(
            ours - theirs
            for ours, theirs in zip(
                *(side.scores("dev", metric, group) for side in (one, other)), strict=True
            )
        )
        for group in groups
    ]


def _search(
    family: Family, other: Condition, groups: Sequence[Sequence[Pair]], metric: str
) -> dict[str, Any] | None:
    """Return each λ's differences and the scores that chose one, by seed; None where none was chosen.

    Nor is it known what luck has chosen where the seeds that chose are not those compared, as in a study that
    is not finished, or of which one λ has more seeds than the others.
    """
    chosen_by = common_pairs(family.conditions)
    alike = {len(group) for group in groups}
    if family.chosen_on == "given" or chosen_by != common_pairs((family.chosen, other)) or len(alike) > 1:
        return None
    split = family.chosen_on
    differences = [_differences(one, other, groups, metric) for one in family.conditions]
    scores = [[fmean(one.scores(split, metric, group)) for group in groups] for one in family.conditions]
    return {
        "lambdas": [one.lam for one in family.conditions],
        "differences": [list(of_seed) for of_seed in zip(*differences, strict=True)],
        "scores": [list(of_seed) for of_seed in zip(*scores, strict=True)],
    }


def choice_counted(results: Results, comparison: Entry) -> bool | None:
    """Tell whether a comparison's p counts in that its λ was chosen; None where λ was given."""
    given = {(c["name"], c["share"]) for c in results["conditions"] if c["lambda_chosen_on"] == "given"}
    return None if (comparison["name"], comparison["share"]) in given else comparison["search"] is not None


def paired(differences: Sequence[float], searches: Sequence[Search] = ()) -> dict[str, Any]:
    """Return what paired differences say of their mean; those that are mere rounding are none.

    `searches` are those that chose what is compared: p counts them in.
    """
    differences = [0.0 if abs(value) < statistics.ROUNDING else value for value in differences]
    return {
        **_sample(differences),
        "excluded_beyond": excluded_beyond(differences),
        "higher": sum(difference > 0 for difference in differences),
        "p": statistics.searched_p(searches) if searches else statistics.permutation_p(differences),
    }


def excluded_beyond(differences: Sequence[float]) -> list[float] | None:
    """Return the bounds of the mean difference, a list of two, or None of one pair."""
    bounds = statistics.excluded_beyond(differences)
    return None if bounds is None else list(bounds)


def _verdict(p: float, mean: float) -> str:
    """Return what a difference comes to, by its adjusted p-value."""
    if p >= statistics.SIGNIFICANCE:
        return NO_EVIDENCE
    return BETTER if mean > 0 else WORSE


def _ensemble(distinct: Mapping[Pair, Run], share: float, study: Mapping[str, Any]) -> dict[str, Any]:
    """Return the score of the plain runs' vote, and of the votes without one of them."""
    runs = list(distinct.values())
    predictions = [run["predictions"] for run in runs]
    names = list(runs[0]["dev"])
    primary = study["primary"]

    def score(members: Sequence[Sequence[float]], wanted: Sequence[str]) -> dict[str, float]:
        voted = statistics.vote(members, regression=study["regression"])
        return metrics.score(wanted, voted, study["dev_labels"], len(study["label_names"]))

    total = {m: sum(run[m] for run in runs) for m in ("member_steps", "forwards", "seconds")}
    return {
        "share": share,
        "members": len(runs),
        "seeds": [list(pair) for pair in distinct],
        "dev": score(predictions, names),
        "leave_one_out": [score(rest, [primary])[primary] for rest in statistics.leave_one_out(predictions)],
        "cost": {**total, "relative": _relative(total, runs)},
    }
