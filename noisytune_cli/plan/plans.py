"""The plans of several outputs of one checkpoint, made, settled and converted together.

A seed changes nothing in a plan, so outputs of one λ share their steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.manifest.write import check_recordable
from noisytune_cli.plan.buffers_by_model import Told
from noisytune_cli.plan.plan import check_noise, check_not_empty, convert, make_plan
from noisytune_cli.plan.settle import settle_ties
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
            plan = make_plan(
                source.tensors,
                spec,
                config=source.config,
                metadata=source.metadata,
                stored_as_one=source.stored_as_one,
                buffers=told.buffers,
                by_model=told.by_model,
            )
            check_not_empty(plan, path=source.path)
            check_recordable(plan, path=source.path)
            by_lam[spec.lam] = plan if conversion is None else convert(plan, conversion)
    return _spread(by_lam, specs)


def settle_plans(plans: Sequence[Plan], source: Checkpoint, conversion: Conversion | None) -> list[Plan]:
    """Return the plans of `make_plans` with their ties settled, which takes reading them."""
    by_lam = {plan.noise.lam: plan for plan in plans}
    settled = settle_ties(list(by_lam.values()), {file.name: file for file in source.sources})
    for lam, plan in zip(list(by_lam), settled, strict=True):
        check_not_empty(plan, path=source.path)
        by_lam[lam] = plan if conversion is None else convert(plan, conversion)
    return _spread(by_lam, [plan.noise for plan in plans])


def _spread(by_lam: Mapping[float, Plan], specs: Sequence[NoiseSpec]) -> list[Plan]:
    return [replace(by_lam[spec.lam], noise=spec) for spec in specs]
