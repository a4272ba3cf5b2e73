"""The plan: which tensors get noise, which do not, and why. Made from headers alone.

One `Step` for each tensor, in file order. Safety rules come first (what is no float, is empty or has one
element cannot take noise), then buffers, then the user's filters, then λ. What only the values can tell
(constant, non-finite, a tie by equal bytes) is marked on the step, and `confirm_ties` settles the ties.

All names of a tie share one decision: one excluded name excludes all, one included name includes all,
the last `--lambda-for` rule that matches any of them gives λ, and the first that is divided into matrices
divides all.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.escape import enumerate_some, escape
from noisytune_cli.plan.evidence.told import Told, tell
from noisytune_cli.plan.patterns import check_matched, is_kind, match_names
from noisytune_cli.plan.split import Division, check_splits, divide
from noisytune_cli.plan.ties import find_ties
from noisytune_cli.records import (
    MAX_SEED,
    SHRUNK,
    Action,
    Conversion,
    NoiseSpec,
    Plan,
    Reason,
    Step,
    TensorSpec,
    Tie,
    out_dtype_of,
)

#: What to do where nothing would be perturbed: where the options leave nothing, and where nothing is there.
WHERE_NOTHING_IS_PERTURBED = (
    "Widen --include or drop an --exclude; --dry-run shows the reason for each tensor",
    "Check that this is the file with the weights; inspect shows the reason for each tensor",
)

#: The division of a tensor that is one matrix.
_UNDIVIDED = Division()

#: How FSDP's flattened parameters are called, and the dtypes of complex numbers.
_FLAT, _COMPLEX = re.compile(r"(?:^|[._])flat_param(?:_\d+)?$"), frozenset(("C32", "C64", "C128"))

#: Reasons that hold whatever the user asks for.
_SAFETY = frozenset({"not-float", "empty", "one-element"})


def check_noise(noise: NoiseSpec) -> None:
    """Raise UsageError unless every strength is finite, the seed a u64, and the splits can be read."""
    option = "--lambda" if noise.needs_std else "--sigma"
    for given, lam in [(option, noise.lam), *((f"{option}-for={p}", lam) for p, lam in noise.rules)]:
        if not math.isfinite(lam):
            raise UsageError(
                f"{given}: {lam} is no noise strength",
                why="it is not a finite number",
                next_step="Give a number such as 0.15; 0 adds no noise, and one below 0 the negative noise",
            )
    if not 0.0 <= noise.kept <= 1.0:
        raise UsageError(
            f"--shrink: {noise.kept} is no share",
            why="it is the share of each weight that is kept",
            next_step="Give a number from 0 to 1, such as 0.5",
        )
    if not 0 <= noise.seed <= MAX_SEED:
        raise UsageError(
            f"--seed: {noise.seed} is out of range",
            why="a seed is a whole number from 0 to 2^64-1",
            next_step="Give a seed in that range, such as 0",
        )
    check_splits(noise.splits, noise.granularity)


def too_strong(noises: Iterable[NoiseSpec]) -> list[str]:
    """Warn of noise that is larger than what it is added to: most often λ was meant as a percentage."""
    scaled = [noise for noise in noises if noise.needs_std]
    lam = max((abs(lam) for noise in scaled for lam in (noise.lam, *dict(noise.rules).values())), default=0.0)
    if lam <= math.sqrt(12):  # the width of uniform noise of std 1
        return []
    times = f"{lam / math.sqrt(12):.3g}"
    return [f"λ {lam:g} gives noise with {times} times the weights' std; the paper's λ is 0.15"]


def no_matrices(plan: Plan) -> list[str]:
    """Warn of flattened parameters, and of complex ones where no pattern chose: neither are matrices."""
    noisy = [step.tensor.name for step in plan.steps if step.action == "perturb"]
    flat = [name for name in noisy if _FLAT.search(name)]
    chosen = plan.noise.include or plan.noise.exclude
    left = [step.tensor.name for step in plan.steps if step.tensor.dtype in _COMPLEX and not chosen]
    said = []
    if flat:
        said.append(
            f"{enumerate_some(flat, 3)}: all parameters of a module in one vector (FSDP), which get noise as "
            "if they were one matrix; save the full state dict, and perturb that"
        )
    if left:
        said.append(f"{enumerate_some(left, 3)}: complex numbers, which get no noise")
    return said


class _Wish(NamedTuple):
    """What is known of a parameter beside its tensor: all its names count. `rule` is a λ rule's index.

    `named` says that a pattern which is no kind includes it: then it is a parameter, whatever else tells.
    """

    stream: str
    excluded: bool
    included: bool
    named: bool
    rule: int | None
    is_buffer: bool
    division: Division


class _Filters(NamedTuple):
    """Names the patterns exclude and include (None: all), and for each name the index of its λ rule.

    `named` are those included by more than a kind.
    """

    excluded: frozenset[str]
    included: frozenset[str] | None
    named: frozenset[str]
    rule_of: Mapping[str, int]

    def wish(
        self, names: Sequence[str], stream: str, buffers: Collection[str], divisions: Mapping[str, Division]
    ) -> _Wish:
        """Return what names of one parameter ask for."""
        found = [divisions[name] for name in names if name in divisions]
        return _Wish(
            stream,
            excluded=not self.excluded.isdisjoint(names),
            included=self.included is not None and not self.included.isdisjoint(names),
            named=not self.named.isdisjoint(names),
            rule=max([self.rule_of[name] for name in names if name in self.rule_of], default=None),
            is_buffer=any(name in buffers for name in names),
            division=next((d for d in found if d.parts), found[0] if found else _UNDIVIDED),
        )


def _patterns(noise: NoiseSpec) -> list[str]:
    return [*noise.exclude, *noise.include, *(pattern for pattern, _ in (*noise.rules, *noise.splits))]


def _filters(noise: NoiseSpec, matched: Sequence[frozenset[str]]) -> _Filters:
    """Sort what each of `_patterns` matches by what it is for."""
    excludes, includes = len(noise.exclude), len(noise.include)
    including = matched[excludes : excludes + includes]
    by_name = [found for text, found in zip(noise.include, including, strict=True) if not is_kind(text)]
    rules = matched[excludes + includes :][: len(noise.rules)]
    return _Filters(
        excluded=frozenset().union(*matched[:excludes]),
        included=frozenset().union(*including) if includes else None,
        named=frozenset().union(*by_name),
        rule_of={name: rule for rule, found in enumerate(rules) for name in found},
    )


def make_plan(
    tensors: Sequence[TensorSpec],
    noise: NoiseSpec,
    *,
    config: Mapping[str, Any] | None = None,
    configs: Mapping[str, Mapping[str, Any] | None] | None = None,
    metadata: Mapping[str, str] | None = None,
    stored_as_one: Iterable[Sequence[str]] = (),
    told: Told | None = None,
) -> Plan:
    """Decide for each of `tensors` whether it gets noise.

    `configs` are those of a composition's components, by folder.
    `told` says which are buffers; without it that is told from the tensors and the config alone.
    Ties by equal bytes are candidates: their names stand alone, marked `tied`, until `confirm_ties`.
    Raises UsageError for a bad λ or seed, for a pattern that is wrong or matches nothing, and for a split
    that does not fit a tensor.
    """
    check_noise(noise)
    if told is None:
        told = tell(tensors, config=config, decider="names")
    ties = find_ties(
        tensors,
        config=config,
        configs=configs,
        metadata=metadata,
        stored_as_one=stored_as_one,
        declared=told.pairs,
    )
    names = [*(tensor.name for tensor in tensors), *(name for tie in ties for name, _ in tie.dropped)]
    # A kind holds no buffer, but what the values told it may have held before they were known.
    buffers = [name for name in told.buffers if told.by.get(name) != "values"]
    matched = match_with_paths(_patterns(noise), names, paths_of(tensors), buffers, shapes_of(tensors))
    check_matched(_patterns(noise), matched, names)
    filters = _filters(noise, matched)
    certain = [tie for tie in ties if tie.evidence != "equal-bytes"]
    candidates = {name for tie in ties if tie.evidence == "equal-bytes" for name in tie.names}
    divisions: dict[str, Division] = {}
    if noise.granularity == "matrix":
        divisions = divide(
            tensors, noise.splits, matched[len(matched) - len(noise.splits) :], config, configs
        )
    wishes = _wishes(certain, filters, told.buffers, divisions)
    open_to_values = told.open_to_values(tensors) - filters.named
    steps = []
    for tensor in tensors:
        name = tensor.name
        wish = wishes.get(name) or filters.wish((name,), name, told.buffers, divisions)
        step = _decide(tensor, wish, noise, filters)
        by = told.by.get(name, "names")
        step = replace(step, told_by=by, doubt=_is_doubt(step, wish, name in told.doubts))
        if name in open_to_values and step.action != "copy":
            step = replace(step, unsure=(*step.unsure, "computed"))
        if name in candidates and step.reason not in _SAFETY:
            step = replace(step, unsure=(*step.unsure, "tied"))
        steps.append(step)
    return Plan(noise, tuple(steps), ties)


def confirm_ties(plan: Plan, confirmed: Collection[Tie]) -> Plan:
    """Return the plan without candidates: `confirmed` are the ties that the values bear out.

    They are what `ties.split_tie` leaves of the candidates in `plan.ties`; the streams, exclusions and λ of
    all candidates' names follow. Ties that needed no confirmation stay.
    """
    certain = tuple(tie for tie in plan.ties if tie.evidence != "equal-bytes")
    if len(certain) == len(plan.ties) and not confirmed:
        return plan
    names = [name for tie in plan.ties if tie.evidence == "equal-bytes" for name in tie.all_names]
    settled = frozenset(names)
    paths = paths_of(step.tensor for step in plan.steps if step.tensor.name in settled)
    shapes = shapes_of(step.tensor for step in plan.steps)
    filters = _filters(plan.noise, match_with_paths(_patterns(plan.noise), names, paths, shapes=shapes))
    divisions = {step.tensor.name: Division(step.parts, step.undivided) for step in plan.steps}
    buffers = {step.tensor.name for step in plan.steps if step.reason == "buffer"}
    wishes = _wishes(confirmed, filters, buffers, divisions)
    steps = []
    for step in plan.steps:
        name = step.tensor.name
        if name in settled:
            wish = wishes.get(name) or filters.wish((name,), name, buffers, divisions)
            decided = _decide(step.tensor, wish, plan.noise, filters)
            step = replace(decided, told_by=step.told_by, doubt=_is_doubt(decided, wish, step.doubt))
        steps.append(step)
    return Plan(plan.noise, tuple(steps), certain + tuple(tie for tie in confirmed if tie not in certain))


def _is_doubt(step: Step, wish: _Wish, in_doubt: bool) -> bool:
    """Say whether a tensor in doubt stays so: what the user names, and what stays as it is, is none."""
    return in_doubt and step.action != "copy" and not wish.named


def idle_rules(plan: Plan) -> list[str]:
    """Return a warning for each pattern of a rule or a split of which all that it matches is left out."""
    patterns = [pattern for pattern, _ in (*plan.noise.rules, *plan.noise.splits)]
    if not patterns:
        return []
    reasons = {step.tensor.name: step.reason or "" for step in plan.steps}
    tensors = [step.tensor for step in plan.steps]
    matched = match_with_paths(patterns, list(reasons), paths_of(tensors), shapes=shapes_of(tensors))
    warnings = []
    for text, found in zip(patterns, matched, strict=True):
        why = {reasons[name] for name in found}
        if why == {"buffer"}:
            told = "matches buffers alone, which get no noise (--include names what is none)"
        elif why and why.isdisjoint(("", "lambda-zero")):
            told = f"changes nothing: all that it matches is left out ({', '.join(sorted(why))})"
        else:
            continue
        warnings.append(f"{escape(text)} {told}")
    return warnings


def names_included(noise: NoiseSpec, tensors: Sequence[TensorSpec]) -> frozenset[str]:
    """Return the names that the user includes by more than a kind: parameters, whatever their values."""
    included = [text for text in noise.include if not is_kind(text)]
    if not included:
        return frozenset()  # without a look at a hundred thousand names
    names = [tensor.name for tensor in tensors]
    return frozenset().union(*match_with_paths(included, names, paths_of(tensors)))


def paths_of(tensors: Iterable[TensorSpec]) -> dict[str, str]:
    """Return the names of tensors whose path says more, by path: a pattern may match either."""
    return {tensor.path: tensor.name for tensor in tensors if tensor.path}


def shapes_of(tensors: Iterable[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name."""
    return {tensor.name: tensor.shape for tensor in tensors}


def match_with_paths(
    patterns: Sequence[str],
    names: Sequence[str],
    paths: Mapping[str, str],
    buffers: Collection[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[frozenset[str]]:
    """Return the names that each pattern matches (see `match_names`), by themselves or by their paths."""
    matched = match_names(patterns, names, buffers, shapes)
    if paths:
        of_paths = {path: shapes[name] for path, name in paths.items() if name in shapes} if shapes else None
        hidden = {path for path, name in paths.items() if name in buffers}
        by_path = match_names(patterns, list(paths), hidden, of_paths)
        matched = [own | {paths[p] for p in found} for own, found in zip(matched, by_path, strict=True)]
    return matched


def select(
    tensors: Sequence[TensorSpec],
    include: Sequence[str],
    exclude: Sequence[str],
    buffers: Collection[str] = (),
) -> frozenset[str]:
    """Return the names of the tensors that patterns leave; UsageError for a pattern that matches none."""
    patterns = [*include, *exclude]
    names = [tensor.name for tensor in tensors]
    matched = match_with_paths(patterns, names, paths_of(tensors), buffers, shapes_of(tensors))
    check_matched(patterns, matched, names)
    included = frozenset().union(*matched[: len(include)]) if include else frozenset(names)
    return included.difference(*matched[len(include) :])


def _wishes(
    ties: Iterable[Tie], filters: _Filters, buffers: Collection[str], divisions: Mapping[str, Division]
) -> dict[str, _Wish]:
    """Return by stored name what each tie asks for; worked out once a tie, whose names may be many."""
    wishes = {}
    for tie in ties:
        wish = filters.wish(tie.all_names, tie.stream, buffers, divisions)
        wishes.update(dict.fromkeys(tie.names, wish))
    return wishes


def _decide(tensor: TensorSpec, wish: _Wish, noise: NoiseSpec, filters: _Filters) -> Step:
    """Decide one step."""
    lam = noise.lam if wish.rule is None else noise.rules[wish.rule][1]
    parts, undivided = wish.division.parts, wish.division.undivided
    reason = _reason_to_copy(tensor, wish, lam, noise, filters)
    if reason is not None:
        shrinks = noise.kept != 1.0 and reason in SHRUNK
        action: Action = "shrink" if shrinks else "copy"
        return Step(tensor, action, reason, 0.0, wish.stream, parts=parts, undivided=undivided)
    unsure = ("constant", "non-finite") if noise.scope == "matrix" else ("non-finite",)
    return Step(tensor, "perturb", None, lam, wish.stream, unsure, parts=parts, undivided=undivided)


def _reason_to_copy(
    tensor: TensorSpec, wish: _Wish, lam: float, noise: NoiseSpec, filters: _Filters
) -> Reason | None:
    """Return why `tensor` gets no noise, safety first, or None."""
    if tensor.dtype not in FLOAT_DTYPES:
        return "not-float"
    elements = tensor.elements
    if elements == 0:
        return "empty"
    left_out: Reason | None = None
    if wish.is_buffer and (wish.excluded or not wish.named):
        left_out = "buffer"
    elif wish.excluded or (filters.included is not None and not wish.included):
        left_out = "excluded"
    # Its std is undefined; a std of all values exists for it too. Left out, it must not be shrunk either.
    if elements == 1 and noise.scope == "matrix" and (left_out is None or noise.kept == 1.0):
        return "one-element"
    if left_out is not None:
        return left_out
    return "lambda-zero" if lam == 0 else None


def check_not_empty(
    plan: Plan,
    *,
    path: str | os.PathLike[str] | None = None,
    advice: tuple[str, str] = WHERE_NOTHING_IS_PERTURBED,
) -> None:
    """Raise if the plan perturbs nothing (see `check_outcomes`)."""
    check_outcomes(plan.noise, ((s.action, s.reason) for s in plan.steps), path=path, advice=advice)


def check_outcomes(
    noise: NoiseSpec,
    outcomes: Iterable[tuple[Action, Reason | None]],
    *,
    path: str | os.PathLike[str] | None = None,
    advice: tuple[str, str] = WHERE_NOTHING_IS_PERTURBED,
) -> None:
    """Raise if nothing is perturbed: UsageError where the user's filters caused it, else InputInvalid.

    λ = 0 is a request for no noise, not an error. To be asked of the plan, and again of the receipts.
    `advice` is the next step of the first error, and of the second.
    """
    counts: Counter[Reason | None] = Counter()
    for action, reason in outcomes:
        if action != "copy":
            return
        counts[reason] += 1
    if counts["lambda-zero"] or (noise.lam == 0 and not any(lam for _, lam in noise.rules)):
        return
    found = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if counts["excluded"]:
        raise UsageError(
            "nothing would be perturbed",
            path=path,
            why=f"the patterns leave no tensor that can take noise ({found})",
            next_step=advice[0],
        )
    raise InputInvalid(
        "nothing to perturb",
        path=path,
        why=f"no tensor can take noise ({found})" if found else "it has no tensors",
        next_step=advice[1],
    )


def convert(plan: Plan, conversion: Conversion) -> Plan:
    """Return the plan with the dtype that each tensor is to be written in."""
    return replace(
        plan,
        steps=tuple(
            replace(step, out_dtype=out_dtype_of(step.tensor, step.reason, conversion)) for step in plan.steps
        ),
    )
