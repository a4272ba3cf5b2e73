"""The plans of several outputs of one checkpoint, made, settled and converted together.

A seed changes nothing in a plan, so outputs of one λ share their steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.manifest.write import check_recordable
from noisytune_cli.plan.evidence.told import Told
from noisytune_cli.plan.plan import check_noise, check_not_empty, convert, make_plan
from noisytune_cli.plan.settle import look_at_values, settle_ties
from noisytune_cli.records import Combination, Conversion, NoiseSpec, Plan


def make_plans(
    source: Checkpoint,
    noise: NoiseSpec,
    wanted: Sequence[Combination],
    told: Told,
    conversion: Conversion | None,
) -> list[Plan]:
    """Return the plan of each combination, whose λ and seed take the place of the noise's.

    Raises what `plan.make_plan` and `plan.check_not_empty` do.
    """
    specs = [replace(noise, lam=one.lam, seed=one.seed) for one in wanted]
    by_lam: dict[float, Plan] = {}
    for spec in specs:
        check_noise(spec)
        if spec.lam not in by_lam:
            plan = plan_checkpoint(source, spec, told)
            check_not_empty(plan, path=source.path)
            check_recordable(plan, path=source.path)
            by_lam[spec.lam] = plan if conversion is None else convert(plan, conversion)
    return _spread(by_lam, specs)


def settle_plans(
    plans: Sequence[Plan], source: Checkpoint, told: Told, conversion: Conversion | None
) -> list[Plan]:
    """Return the plans of `make_plans` with all settled that takes reading: what was computed, and ties."""
    by_lam = {plan.noise.lam: plan for plan in plans}
    files = {file.name: file for file in source.sources}
    if (known := look_at_values(together(plans), told, files)) != told:
        by_lam = {lam: plan_checkpoint(source, plan.noise, known) for lam, plan in by_lam.items()}
    settled = settle_ties(list(by_lam.values()), files)
    for lam, plan in zip(list(by_lam), settled, strict=True):
        check_not_empty(plan, path=source.path)
        by_lam[lam] = plan if conversion is None else convert(plan, conversion)
    return _spread(by_lam, [plan.noise for plan in plans])


def together(plans: Sequence[Plan]) -> Plan:
    """Return what plans of one checkpoint change: of each tensor a step that changes it, if one does."""
    each = list({plan.noise.lam: plan.steps for plan in plans}.values())
    steps = (next((step for step in of if step.action != "copy"), of[0]) for of in zip(*each, strict=True))
    return replace(plans[0], steps=tuple(steps))


def plan_checkpoint(source: Checkpoint, noise: NoiseSpec, told: Told) -> Plan:
    """Return the plan of an open checkpoint (see `plan.make_plan`)."""
    return make_plan(
        source.tensors,
        noise,
        config=source.config,
        configs=source.configs,
        metadata=source.metadata,
        stored_as_one=source.stored_as_one,
        told=told,
    )


def _spread(by_lam: Mapping[float, Plan], specs: Sequence[NoiseSpec]) -> list[Plan]:
    return [replace(by_lam[spec.lam], noise=spec) for spec in specs]
