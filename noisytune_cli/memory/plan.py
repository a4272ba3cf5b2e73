"""What happens to each parameter in memory: planned as for a file, or taken from a manifest."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.matrix import warnings_of
from noisytune_cli.errors import InputInvalid, Mismatch
from noisytune_cli.memory.sharded import LocalTensor
from noisytune_cli.memory.tensors import LiveTensor, first_bytes, same_bytes
from noisytune_cli.plan.arguments import in_python, make_spec
from noisytune_cli.plan.evidence.doubts import warning_of, warning_of_averages
from noisytune_cli.plan.evidence.told import Told, tell, with_values
from noisytune_cli.plan.evidence.values import Values
from noisytune_cli.plan.patterns import check_matched, match_names
from noisytune_cli.plan.plan import check_not_empty, confirm_ties, make_plan, no_matrices, too_strong
from noisytune_cli.plan.settle import find_computed
from noisytune_cli.plan.ties import split_tie
from noisytune_cli.records import (
    Action,
    Manifest,
    NoiseSpec,
    Outcome,
    Part,
    Plan,
    Reason,
    Receipt,
    Step,
    TensorSpec,
    Tie,
    copied,
    whole,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What to do where nothing would be perturbed, as `plan.WHERE_NOTHING_IS_PERTURBED` has it for files.
WHERE_NOTHING_IS_PERTURBED = (
    "Widen include= or drop an exclude=; frozen= and fresh_names= leave parameters out too",
    "Give the model that has the weights, with these loaded",
)


@dataclass(slots=True)
class Matrix:
    """One matrix of a parameter, and what comes of it: None until its std is known."""

    part: Part
    outcome: Outcome | None = None


@dataclass(slots=True)
class Parameter:
    """One parameter: a step for each of its names, and its matrices.

    `target` is where it is written with its noise, None where it lies. `faint` is how many of its values
    were 0 before the noise, or next to it beside their std, if a good part of them was; else 0.
    """

    live: LiveTensor
    steps: tuple[Step, ...]
    matrices: list[Matrix] = field(default_factory=list)
    target: LocalTensor | None = None
    faint: int = 0

    @property
    def is_divided(self) -> bool:
        """Whether it has several matrices with a std each."""
        return len(self.matrices) > 1

    def outcome(self) -> tuple[Action, Reason | None]:
        """Return what becomes of it as far as is known: it is perturbed if one of its matrices is."""
        known = [matrix.outcome for matrix in self.matrices]
        actions = {self.steps[0].action if outcome is None else outcome.action for outcome in known}
        if actions == {"copy"}:
            return "copy", known[0].reason if known[0] else None
        return "perturb" if "perturb" in actions else "shrink", None


def plan_parameters(
    live_tensors: Sequence[LiveTensor],
    noise: NoiseSpec,
    *,
    is_module: bool,
    config: Mapping[str, Any] | None,
    source: str,
) -> tuple[list[Parameter], tuple[str, ...]]:
    """Plan the noise, and return what to warn of; a module knows its buffers and ties itself.

    `source` is what to call it in errors.
    """
    specs = [spec for live in live_tensors for spec in live.specs()]
    live_of = {name: live for live in live_tensors for name in live.names}
    ties = [r.names for r in live_tensors if len(r.names) > 1]
    told = Told({}, {}) if is_module else tell(specs, config=config, decider="names")
    plan = make_plan(specs, noise, config=config, stored_as_one=ties, told=told)
    if not is_module:
        told = with_values(told, *_find_computed(plan, told, live_of))
        plan = make_plan(specs, noise, config=config, stored_as_one=ties, told=told)
    confirmed: list[Tie] = []
    for tie in plan.ties:
        if tie.evidence == "equal-bytes":
            confirmed += split_tie(tie, _contents(tie, live_of, compare=not is_module))
    plan = confirm_ties(plan, confirmed)
    check_not_empty(plan, path=source, advice=WHERE_NOTHING_IS_PERTURBED)
    doubts = (*warning_of(plan), *warning_of_averages(plan, told.buffers), *no_matrices(plan))
    steps = {step.tensor.name: step for step in plan.steps}
    return [_planned(r, tuple([steps[name] for name in r.names])) for r in live_tensors], doubts


def _find_computed(
    plan: Plan, told: Told, live_of: Mapping[str, LiveTensor]
) -> tuple[dict[str, str], set[str]]:
    """Return what the values tell of the tensors that are whole here (see `settle.find_computed`)."""

    def values_of(tensor: TensorSpec) -> Values:
        rows = live_of[tensor.name].held.values.detach().view(tensor.shape or (1,))

        def read(first: int, count: int) -> NDArray[Any]:
            # By rows, as what is not contiguous would be copied whole.
            width = max(1, tensor.elements // len(rows))
            begin = first // width
            some = rows[begin : -(-(first + count) // width)].flatten()
            found: NDArray[Any] = some[first - begin * width :][:count].double().cpu().numpy()
            return found

        return read

    here = tuple(step for step in plan.steps if not live_of[step.tensor.name].held.shards)
    return find_computed(replace(plan, steps=here), told, values_of)


def _planned(live: LiveTensor, steps: tuple[Step, ...]) -> Parameter:
    step = steps[0]
    if step.action == "copy":
        return Parameter(live, steps, [Matrix(whole(step.tensor), copied(step.reason))])
    if step.parts:
        _refuse_sharded(live)
    return Parameter(live, steps, [Matrix(part) for part in step.matrices])


def _refuse_sharded(live: LiveTensor) -> None:
    if live.held.mesh is not None:
        raise InputInvalid(
            "cannot add noise by matrix in memory",
            tensor=live.own[0],
            why="it is sharded, and holds several matrices",
            next_step="Perturb the checkpoint on disk, or keep it whole with splits={NAME: '0:/1'}",
        )


def _contents(tie: Tie, live_of: Mapping[str, LiveTensor], *, compare: bool) -> dict[str, int]:
    """Return for each name of a candidate a number, equal where they are one, or `compare` equal."""
    kinds: dict[Hashable, list[tuple[int, LiveTensor]]] = {}
    contents: dict[str, int] = {}
    for number, name in enumerate(tie.names):
        live = live_of[name]
        # Of many tables each would be compared with each, but for a look at how they begin.
        known = kinds.setdefault(first_bytes(live) if compare else id(live), [])
        alike = (n for n, kind in known if kind is live or (compare and same_bytes(kind, live)))
        contents[name] = next(alike, number)
        if contents[name] == number:
            known.append((number, live))
    return contents


def recorded_parameters(live_tensors: Sequence[LiveTensor], manifest: Manifest) -> list[Parameter]:
    """Give each parameter what a manifest records of one of its names; those it does not name are left out.

    Raises Mismatch where it names none, or a recorded tensor has another shape or takes no noise in memory.
    """
    by_name = {receipt.step.tensor.name: receipt for receipt in manifest.receipts}
    if live_tensors and not any(name in by_name for live in live_tensors for name in live.names):
        raise Mismatch(
            "the manifest is of another model",
            why=f"it names none of the parameters; its first is {next(iter(by_name), None)}, and here "
            f"{live_tensors[0].names[0]}",
            next_step="Give names= so that the model's names become those, such as names='bert'",
        )
    return [_recorded(r, next((by_name[n] for n in r.names if n in by_name), None)) for r in live_tensors]


def _recorded(live: LiveTensor, receipt: Receipt | None) -> Parameter:
    specs = list(live.specs())
    if receipt is None:
        steps = tuple(Step(spec, "copy", "excluded", 0.0, spec.name) for spec in specs)
        matrices = [Matrix(whole(specs[0]), copied("excluded"))]
        return Parameter(live, steps, matrices)
    recorded = receipt.step.tensor
    if recorded.shape != specs[0].shape or (recorded.dtype in FLOAT_DTYPES) != (
        specs[0].dtype in FLOAT_DTYPES
    ):
        raise Mismatch(
            "the manifest is of another model",
            tensor=recorded.name,
            why=f"it records {recorded.dtype} {list(recorded.shape)}, and here it is "
            f"{specs[0].dtype} {list(specs[0].shape)}",
            next_step="Give the manifest of the checkpoint that the model was loaded from, or other names=",
        )
    step = replace(
        receipt.step, action=receipt.action, reason=receipt.reason, lam=receipt.lam, out_dtype=None
    )
    steps = tuple([replace(step, tensor=spec) for spec in specs])
    matrices = [Matrix(part.part, part) for part in receipt.parts]
    if matrices:
        _refuse_sharded(live)
    else:
        matrices = [Matrix(whole(specs[0]), receipt)]
    return Parameter(live, steps, matrices)


def warnings_for(doubts: Sequence[str], spec: NoiseSpec, receipts: Sequence[Receipt]) -> tuple[str, ...]:
    """Return what to warn of, in Python's words: doubts, and what the noise is or could not reach."""
    told = (*doubts, *too_strong([spec]), *warnings_of(receipts))
    return tuple([in_python(make_spec, text) for text in told])


def leave_out(
    parameters: Sequence[Parameter],
    *,
    frozen: Action,
    fresh: Action,
    fresh_names: Collection[str],
    spared: Sequence[str] = (),
) -> None:
    """Leave frozen or fresh parameters as they are, where asked to.

    `fresh_names` are patterns on the model's own names, and may be of what is `spared` anyway. A tie is fresh
    only if all its names are.
    """
    own = [*(name for parameter in parameters for name in parameter.live.own), *spared]
    patterns = list(fresh_names)
    matched = match_names(patterns, own)
    check_matched(patterns, matched, own)
    are_fresh = frozenset[str]().union(*matched)
    for parameter in parameters:
        live = parameter.live
        if parameter.outcome()[0] != "copy" and (
            (frozen == "copy" and not live.tensor.requires_grad)
            or (fresh == "copy" and are_fresh.issuperset(live.own))
        ):
            parameter.matrices = [Matrix(whole(parameter.steps[0].tensor), copied("excluded"))]
