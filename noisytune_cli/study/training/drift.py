"""How far finetuning moves each kind of parameter (the paper's figure 5, and what it might have shown).

For the parameters of a kind, with w₀ the weights finetuning started from (noised ones where there was noise)
and w₁ the finetuned ones, over all of the kind together:

    norm_change  | ‖w₁‖₁ - ‖w₀‖₁ | / ‖w₀‖₁      the paper's: the change of the norm
    change_norm    ‖w₁ - w₀‖₁ / ‖w₀‖₁           the norm of the change

A parameter counts for the first kind that it belongs to in the order of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from noisytune_cli.plan.patterns import match_names

if TYPE_CHECKING:
    from torch import Tensor, nn

#: The kinds, from the special to the general: an attention's bias is a bias.
KINDS = ("head", "embeddings", "norm", "bias", "attention", "mlp")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def measure_drift(start: Mapping[str, Tensor], model: nn.Module) -> dict[str, dict[str, float]]:
    """Return both measures for each kind of parameter that a model has and `start` had."""
    import torch

    ended = {name: p.detach() for name, p in model.named_parameters() if name in start}
    names = list(ended)
    measured: dict[str, dict[str, float]] = {}
    counted: set[str] = set()
    with torch.no_grad():
        for kind, members in zip(KINDS, match_names([f"@{k}" for k in KINDS], names), strict=True):
            own = [name for name in names if name in members and name not in counted]
            counted.update(own)
            before = sum(float(start[name].abs().sum(dtype=torch.float64)) for name in own)
            after = sum(float(ended[name].abs().sum(dtype=torch.float64)) for name in own)
            moved = sum(float((ended[name] - start[name]).abs().sum(dtype=torch.float64)) for name in own)
            if before:
                measured[kind] = {"norm_change": abs(after - before) / before, "change_norm": moved / before}
    return measured
