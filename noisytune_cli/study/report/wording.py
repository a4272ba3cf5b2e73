"""A study's numbers and findings as people read them: the same words in table, report and figures.

Scores are shown times 100, as GLUE's are; `results.json` has them as they are. A difference has its sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from noisytune_cli.escape import escape
from noisytune_cli.study.report import statistics

#: What metrics are called.
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro-F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}

#: What a comparison comes to whenever the adjusted p-value is not small, whatever the mean.
NO_EVIDENCE = "no evidence of a difference"

_MINUS = "−"


def score(value: float) -> str:
    """Return a score times 100: 41.23."""
    return f"{100 * value:.2f}".replace("-", _MINUS)


def spread(sample: Mapping[str, Any]) -> str:
    """Return mean and std of scores: 41.23 ± 1.20, or the mean alone where there is one value."""
    return score(sample["mean"]) + ("" if sample["std"] is None else f" ± {score(sample['std'])}")


def change(value: float) -> str:
    """Return a difference of scores, times 100, with its sign: +0.41."""
    # Adding 0 takes the sign from what rounding made -0.
    return f"{round(100 * value, 2) + 0.0:+.2f}".replace("-", _MINUS)


def interval(bounds: Sequence[float] | None) -> str:
    """Return the interval of a difference: [−0.40, +1.20], or nothing where there is one value."""
    return "" if bounds is None else "[{}, {}]".format(*map(change, bounds))


def difference(comparison: Mapping[str, Any]) -> str:
    """Return a mean difference and its interval: +0.41 [−0.40, +1.20]."""
    return f"{change(comparison['mean'])} {interval(comparison['interval'])}".rstrip()


def probability(p: float) -> str:
    """Return a p-value: 0.0625, 0.312, < 0.0001."""
    return "< 0.0001" if p < 0.0001 else f"{p:.3g}"


def strength(lam: float | None) -> str:
    """Return λ, blank where noisytune takes no part."""
    return "" if lam is None else f"{lam:g}"


def times(factor: float | None) -> str:
    """Return a cost relative to plain: ×2.00."""
    return "" if factor is None else f"×{factor:.2f}"


def duration(seconds: float) -> str:
    """Return a span of time: 43 s, 2 min 5 s, 3 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 seed, 5 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def finding(comparison: Mapping[str, Any]) -> str:
    """Return one sentence for a comparison, which begins with its name."""
    lam = f" (λ {strength(comparison['lambda'])})" if comparison["lambda"] is not None else ""
    seeds = len(comparison["values"])
    pairs = comparison.get("pairs", seeds)
    shared = f" (of {count(pairs, 'pair')}, some of which share a run)" * (pairs > seeds)
    end = "." if comparison["verdict"] != NO_EVIDENCE else excluded(comparison)
    return (
        f"{comparison['name']}{lam} against {comparison['against']}: {difference(comparison)} over "
        f"{count(seeds, 'paired seed')}{shared}, higher in {comparison['higher']} of them, "
        f"p = {probability(comparison['p'])} ({probability(comparison['p_holm'])} adjusted): "
        f"{comparison['verdict']}{end}"
    ).replace("= <", "<")


def excluded(comparison: Mapping[str, Any]) -> str:
    """Return the end of a sentence that finds no difference: how large one can still be.

    Student's t may leave out 0 where the test above, adjusted and without its assumption, finds nothing.
    """
    bounds = comparison["excluded_beyond"]
    if bounds is None:
        return "."
    low, high = map(change, bounds)
    beyond = f"a mean difference below {low} or above {high} is excluded at 95 %"
    if bounds[0] <= 0 <= bounds[1]:
        return f"; {beyond}."
    given = " and its λ given" if comparison.get("search") else ""
    return f"; if differences are normal and this were the only comparison{given}, {beyond}, and 0 with it."


def power(comparisons: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what so few seeds cannot show in comparisons adjusted together, None where any could show it."""
    if not comparisons:
        return None
    shared = any(one["pairs"] > len(one["values"]) for one in comparisons)
    return too_few(max(len(one["values"]) for one in comparisons), comparisons[0]["comparisons"], shared)


def too_few(seeds: int, number: int, shared: bool = False) -> str | None:
    """Return what so many paired seeds cannot show in a number of comparisons, None where they can.

    `shared` says that there are more pairs, of which some share a run.
    """
    smallest = statistics.smallest_p(seeds)
    if number * smallest < statistics.SIGNIFICANCE:
        return None
    alone = f"{count(seeds, 'paired seed')} cannot give a two-sided p below {probability(smallest)}" + (
        f", which {count(number, 'comparison')} adjust to {probability(min(1.0, number * smallest))}"
        * (number > 1)
    )
    return (
        f"{alone}: no difference, however large, can count as evidence at {statistics.SIGNIFICANCE:g} here. "
        f"It takes {count(statistics.pairs_needed(number), 'seed')}"
        + " of initialisation or data order: pairs that share a run are one" * shared
        + "."
    )


def unlearnt(metric: str, sample: Mapping[str, Any], constant: float) -> str:
    """Return what it means where plain's score is not above that of one answer to every row."""
    how = "not clearly" if sample["mean"] > constant else "not"
    return (
        f"plain's {METRICS[metric]}, {spread(sample)}, is {how} above that of one answer to every row, "
        f"{score(constant)}: where nothing is learnt, no difference is no evidence"
    )


def diverged(entry: Mapping[str, Any]) -> str:
    """Return that runs of a condition ended without a finite loss."""
    lam = f" (λ {strength(entry['lambda'])})" if entry["lambda"] is not None else ""
    return (
        f"{entry['name']}{lam}: {entry['diverged']} of {count(len(entry['seeds']), 'run')} diverged (no "
        "finite loss at the end), and are scored none the less"
    )


def earlier(study: Mapping[str, Any]) -> list[str]:
    """Return what a manifest of noisytune says of the model that all runs begin with, in a sentence."""
    what = study["model"].get("earlier")
    return (
        [f"{what}, as a manifest beside its weights tells: all runs begin there, plain's too"] if what else []
    )


def other_order(study: Mapping[str, Any], shown: Callable[[str], str] = escape) -> list[str]:
    """Return that a head of the checkpoint's own has the classes in another order than the rows.

    `shown` makes a name safe where it is to be read.
    """
    theirs, own = (", ".join(map(shown, one.get("label_names", ()))) for one in (study["model"], study))
    return (
        [
            f"config.json has the classes in the order {theirs}, a study in the order {own}: a head that the "
            "checkpoint brings begins with the wrong ones, which labels that are its numbers prevent"
        ]
        if theirs
        else []
    )


def elsewhere(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what runs that are added now are made with where the first had something else, in a sentence.

    Both are a study's record; what an earlier one does not tell is not compared.
    """
    told = []
    for group, key, name in (
        ("machine", "cpu", "CPU"),
        ("machine", "device", "device"),
        ("machine", "threads", "threads"),
        ("machine", "torch", "torch"),
        ("machine", "transformers", "transformers"),
        ("tool", "version", "noisytune"),
    ):
        then, today = (study.get(group, {}).get(key) for study in (first, now))
        if then is not None and then != today:
            told.append(f"{name} {today} (the first runs: {then})")
    return (
        [f"runs are added with {', '.join(told)}: what is compared across them differs by that, too"]
        if told
        else []
    )


def repeated(study: Mapping[str, Any]) -> list[str]:
    """Return which rows that are scored have the text of a row that is trained on, a sentence a kind."""
    found = study.get("repeated", {})
    means = {
        "dev": "scores are in part of what was seen in training",
        "held_out": "a λ that is chosen on them is in part chosen by what was seen in training",
    }
    rows = {"dev": "dev row", "held_out": "held-out row"}
    return [
        f"{count(number, rows[kind])} {'has' if number == 1 else 'have'} the text of a row that is trained "
        f"on: {means[kind]}"
        for kind in rows
        if (number := found.get(kind, 0))
    ]


def choice(chosen_on: str, counted: Sequence[bool] = ()) -> str:
    """Return on which rows λ was chosen, and whether p counts in what luck has chosen, in some sentences.

    `counted` says so of each comparison at a λ that was chosen.
    """
    told = {
        "held_out": "λ was chosen by the mean score on a held-out part of the training rows, "
        "on which nothing is trained and nothing else is reported. It was chosen by the runs that are "
        "compared: of several λ that change nothing it is that of the luckiest runs, so its difference from "
        "plain, with what is excluded, is somewhat too good.",
        "dev": "λ was chosen on the very rows that the scores are reported on (there is no held-out part), "
        "so the score at that λ is too good.",
        "given": "Each method had a single λ or none: there was nothing to choose.",
    }[chosen_on]
    if not counted:
        return told
    if all(counted):
        return f"{told} p counts that in: λ is chosen anew in each of the test's flips."
    return f"{told} p counts that in only where all λ have the seeds that are compared; else it is too small."
