"""Mixout (Lee et al., ICLR 2020): in each forward pass, part of the weights are the pretrained ones.

`W_eff = [(1-M) ⊙ u + M ⊙ w - p·u] / (1-p) = u + M ⊙ (w-u) / (1-p)`, M ~ Bernoulli(1-p), w the weight and u
its anchor. The mean of W_eff is w, which is what evaluation uses; p = 1 gives u. As in the authors' code it
is on the weights of linear layers, biases left out, with all other dropout 0; fresh layers are left out as in
the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from noisytune_cli.errors import UsageError
from noisytune_cli.study.methods import Method, Training, Value

#: Layers that are mixed, and the dimension of their weights that counts input neurons.
_INPUT = {nn.Linear: 1, Conv1D: 0}


class Mixout(Method):
    """`p` is the share of pretrained weights (0.7: the paper's headline), `mask` what is drawn.

    The authors' code draws one number for each input neuron of a layer (`neuron`), the formula one for each
    weight (`element`).
    """

    name = "mixout"
    draws = "always"
    defaults: ClassVar[Mapping[str, Value]] = {"p": 0.7, "mask": "neuron"}

    def __init__(self, **options: Value) -> None:
        super().__init__(**options)
        self.p = self.number("p", 0.0, 1.0)
        self.mask = self.choice("mask", "neuron", "element")
        self._undo: list[tuple[nn.Module, str, float]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def prepare(self, training: Training) -> None:
        """Hook into the layers that the anchor has; UsageError where none of them is trained."""
        for name, module in training.model.named_modules():
            anchor = training.anchor.get(f"{name}.weight")
            if type(module) in _INPUT and anchor is not None and module.weight.requires_grad:
                self._mix(module, anchor.to(module.weight.device), training)
        if not self._handles:
            raise UsageError(
                "mixout changes nothing here",
                why="no pretrained linear layer is trained, and a frozen one is its own anchor",
                next_step="Train all weights (without --lora), or leave mixout out",
            )
        for module, attribute in dropouts(training.model):
            self._undo.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, 0.0)

    def finish(self, training: Training) -> None:
        """Take the hooks out and give the dropout back."""
        for handle in self._handles:
            handle.remove()
        for module, attribute, value in self._undo:
            setattr(module, attribute, value)

    def _mix(self, module: nn.Module, anchor: Tensor, training: Training) -> None:
        """Mix a layer's weight while its forward pass lasts.

        The hooks are functions, and hold nothing of one module: copies of the model share them.
        """
        weights: dict[nn.Module, nn.Parameter | None] = {}
        shape = [1, 1]
        shape[_INPUT[type(module)]] = anchor.shape[_INPUT[type(module)]]
        if self.mask == "element":
            shape = list(anchor.shape)

        def mix(module: nn.Module, inputs: object) -> None:
            if module.training:
                holder, own = _place(module)
                weight = weights[module] = holder._parameters[own]
                keep = torch.empty(shape, dtype=anchor.dtype, device=anchor.device)
                keep.bernoulli_(1 - self.p, generator=training.generator_on(anchor.device))
                holder._parameters[own] = mixed(weight, anchor, keep, self.p)  # type: ignore[assignment,arg-type]

        def restore(module: nn.Module, inputs: object, output: object) -> None:
            if module in weights:
                holder, own = _place(module)
                holder._parameters[own] = weights.pop(module)

        self._handles += [
            module.register_forward_pre_hook(mix),
            module.register_forward_hook(restore, always_call=True),
        ]


def _place(module: nn.Module) -> tuple[nn.Module, str]:
    """Return where a layer's trained weight is: itself, or what bounds it (r4f), which comes after mixout."""
    if is_parametrized(module, "weight"):
        return cast(Any, module.parametrizations).weight, "original"
    return module, "weight"


def mixed(weight: Tensor, anchor: Tensor, keep: Tensor, p: float) -> Tensor:
    """Return u + M ⊙ (w-u) / (1-p) for the mask `keep` of ones and zeros; u at p = 1."""
    return anchor if p == 1 else anchor + (weight - anchor) * (keep / (1 - p))


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield each module with a dropout rate and the attribute that holds it: a layer's p, or a number."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
        for attribute, value in vars(module).items():
            if "drop" in attribute and isinstance(value, float):
                yield module, attribute


METHOD = Mixout
