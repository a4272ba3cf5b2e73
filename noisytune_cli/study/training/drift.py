"""How far finetuning moves each kind of parameter (the paper's figure 5, and what it might have shown).

For the parameters of a kind, with w₀ the weights finetuning started from (noised ones where there was noise)
and w₁ the finetuned ones, over all of the kind together:

    norm_change  | ‖w₁‖₁ - ‖w₀‖₁ | / ‖w₀‖₁      the paper's: the change of the norm
    change_norm    ‖w₁ - w₀‖₁ / ‖w₀‖₁           the norm of the change

A parameter counts for the first kind that it belongs to in the order of `groups.KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from noisytune_cli.plan.groups import KINDS, kinds_of
from noisytune_cli.study.methods import plain_name

if TYPE_CHECKING:
    from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters by name, under a parametrization as it computes with them.

    So they are what is left when r4f takes its norm out.
    """
    import torch

    found = {plain_name(name): parameter.detach().clone() for name, parameter in model.named_parameters()}
    for prefix, module in model.named_modules():
        for own, bound in getattr(module, "parametrizations", {}).items():
            training = bound.training
            bound.eval()  # in training a look at the weight would be a step of the power iteration
            with torch.no_grad():
                found[f"{prefix}.{own}"] = bound().clone()
            bound.train(training)
    return found


def measure_drift(start: Mapping[str, Tensor], model: nn.Module) -> dict[str, dict[str, float]]:
    """Return both measures for each kind of parameter that a model has and `start` had.

    A kind whose values are not finite at the end, of a run that diverged, has none.
    """
    import torch

    ended = {name: p.detach() for name, p in model.named_parameters() if name in start}
    kinds = kinds_of(list(ended))
    measured: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for kind in KINDS:
            own = [name for name in ended if kinds[name] == kind]
            before = sum(float(start[name].abs().sum(dtype=torch.float64)) for name in own)
            after = sum(float(ended[name].abs().sum(dtype=torch.float64)) for name in own)
            moved = sum(float((ended[name] - start[name]).abs().sum(dtype=torch.float64)) for name in own)
            if before and math.isfinite(after):
                measured[kind] = {"norm_change": abs(after - before) / before, "change_norm": moved / before}
    return measured
