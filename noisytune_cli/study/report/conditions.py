"""Runs put together: runs that differ in nothing but seeds are a condition, and λ is chosen among conditions.

Conditions that differ in λ alone are a family; its λ is the one with the best mean score on the held-out
rows, the smallest of those that are equal but for rounding, over the seeds that all of the family have. Only
that member of the family is reported on the dev rows. Without held-out rows there is nothing else to choose
on than the dev rows, and whoever reports has to say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from noisytune_cli.study.combination import drawn_seeds, draws
from noisytune_cli.study.report.statistics import best

#: A finished run's record, a line of runs.jsonl.
Run = Mapping[str, Any]

#: What makes two runs a pair: their seeds of initialisation, data order and noise.
Pair = tuple[int, int, int]
_SEEDS = ("init_seed", "order_seed", "noise_seed")

#: Where λ was chosen: on rows that are not reported, on the reported ones, or nowhere since there was one λ.
ChosenOn = Literal["held_out", "dev", "given"]


@dataclass(frozen=True, slots=True)
class ConditionKind:
    """A method with all that is set about it but λ; `options` are sorted, and those of the method alone."""

    method: str
    noise: str | None
    scope: str | None
    options: tuple[tuple[str, Any], ...]

    @property
    def noisy(self) -> bool:
        """Whether noisytune takes part."""
        return "noisytune" in self.method.split("+")

    def without_noise(self) -> ConditionKind:
        """Return what noisytune was added to: plain where it stands alone."""
        method = "+".join(name for name in self.method.split("+") if name != "noisytune")
        options = tuple(item for item in self.options if not item[0].startswith("noisytune."))
        return ConditionKind(method or "plain", None, None, options)


@dataclass(frozen=True, slots=True)
class Condition:
    """The runs of one kind at one λ and one share of the training rows, by their seeds."""

    kind: ConditionKind
    lam: float | None
    share: float
    runs: Mapping[Pair, Run]

    def scores(self, split: Literal["dev", "held_out"], metric: str, pairs: Iterable[Pair]) -> list[float]:
        """Return the runs' scores in the order of `pairs`."""
        return [self.runs[pair][split][metric] for pair in pairs]


@dataclass(frozen=True, slots=True)
class Family:
    """Conditions that differ in λ alone, by λ; `chosen` is one of them."""

    conditions: tuple[Condition, ...]
    chosen: Condition
    chosen_on: ChosenOn


def gather(runs: Iterable[Run]) -> list[Condition]:
    """Return the conditions of some runs: the largest share first, in it plain, then the others by name."""
    found: dict[tuple[ConditionKind, float | None, float], dict[Pair, Run]] = {}
    for run in runs:
        place = (kind_of(run), run["lambda"], float(run["share"]))
        found.setdefault(place, {})[pair_of(run)] = run
    conditions = [
        Condition(kind, lam, share, dict(sorted(members.items())))
        for (kind, lam, share), members in found.items()
    ]
    return sorted(conditions, key=_order)


def kind_of(run: Run) -> ConditionKind:
    """Return a run's kind (also of a run that is only planned)."""
    options = tuple(sorted(run["options"].items()))
    return ConditionKind(run["method"], run["noise"], run["scope"], options)


def pair_of(run: Run) -> Pair:
    """Return what tells a run's partners in other conditions."""
    init, order, noise = (run[seed] for seed in _SEEDS)
    return init, order, noise


def families(conditions: Sequence[Condition], metric: str) -> list[Family]:
    """Return the conditions by family, each with its λ chosen by `metric`."""
    found: dict[tuple[ConditionKind, float], list[Condition]] = {}
    for condition in conditions:
        found.setdefault((condition.kind, condition.share), []).append(condition)
    return [_choose(members, metric) for members in found.values()]


def common_pairs(conditions: Iterable[Condition]) -> list[Pair]:
    """Return the seeds that all of the conditions have, sorted."""
    return sorted(set.intersection(*(set(condition.runs) for condition in conditions)))


def separate_pairs(conditions: Sequence[Condition], *, regression: bool) -> list[list[Pair]]:
    """Return the seeds that all of the conditions have, sorted, those that share a run together.

    A condition has one and the same run for all that differ in nothing that it draws from: whether it draws
    from the seed of noise its method says, from that of initialisation its runs, where they are finished.
    """
    pairs = common_pairs(conditions)
    fresh = all(run.get("fresh", True) for condition in conditions for run in condition.runs.values())

    def grouped(*, noise: bool) -> list[list[Pair]]:
        places = [_SEEDS.index(seed) for seed in drawn_seeds(fresh=fresh, noise=noise)]
        found: dict[tuple[int, ...], list[Pair]] = {}
        for pair in pairs:
            found.setdefault(tuple([pair[place] for place in places]), []).append(pair)
        return list(found.values())

    groups = grouped(noise=False)
    # Methods are imported, and torch with them, only where it matters.
    if len(groups) < len(pairs) and all(draws(c.kind.method, regression=regression) for c in conditions):
        groups = grouped(noise=True)
    return groups


def name_kinds(kinds: Iterable[ConditionKind]) -> dict[ConditionKind, str]:
    """Return a name for each kind: its method, and in brackets what tells it from others of that method."""
    unique = list(dict.fromkeys(kinds))
    names = {}
    for kind in unique:
        rivals = [other for other in unique if other.method == kind.method]
        told = [
            str(getattr(kind, part))
            for part in ("scope", "noise")
            if len({getattr(rival, part) for rival in rivals}) > 1
        ]
        shared = set.intersection(*(set(rival.options) for rival in rivals))
        told += [f"{key.partition('.')[2]} {value}" for key, value in sorted({*kind.options} - shared)]
        names[kind] = f"{kind.method} ({', '.join(told)})" if told else kind.method
    return names


def _order(condition: Condition) -> tuple[Any, ...]:
    kind = condition.kind
    return (
        -condition.share,
        kind.method != "plain",
        kind.method != "noisytune",
        kind.method,
        # As the paper's figure 2: matrix before global, uniform before gaussian.
        kind.scope == "global",
        kind.noise == "gaussian",
        repr(kind.options),
        condition.lam or 0.0,
    )


def _choose(members: Sequence[Condition], metric: str) -> Family:
    if len(members) == 1:
        return Family(tuple(members), members[0], "given")
    held_out = all(run["held_out"] is not None for member in members for run in member.runs.values())
    split: Literal["dev", "held_out"] = "held_out" if held_out else "dev"
    pairs = common_pairs(members)
    # Without a seed in common, as in a study just begun, each λ has its own.
    means = [fmean(member.scores(split, metric, pairs or member.runs)) for member in members]
    return Family(tuple(members), members[int(best(np.asarray(means)))], split)
