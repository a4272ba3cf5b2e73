"""RecAdam (Chen et al., EMNLP 2020): Adam that recalls the pretrained weights, and lets them go by and by.

The loss is `λ(t) · L_task + (1-λ(t)) · γ/2 · Σ(θ-θ*)²` with `λ(t) = 1 / (1 + exp(-k(t-t₀)))`, t from 1. The
penalty is kept out of Adam's moments and of its denominator, as weight decay is in AdamW:

    m, v from the gradient of L_task
    θ -= lr · √(1-β₂ᵗ) / (1-β₁ᵗ) · λ(t) · m / (√v + ε)
    θ -= lr · (1-λ(t)) · γ · (θ-θ*)
    θ -= lr · weight decay · θ

Fresh parameters have no anchor: plain Adam, λ = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from noisytune_cli.errors import UsageError
from noisytune_cli.study.methods import Method, Training, Value, plain_name


class Recall(Method):
    """`gamma` is γ (5000), `k` how fast the pretrained weights are let go, `t0` when.

    `t0` is in steps, or where it is below 1 a share of the run's: the paper's 250, 500 and 1000 would never
    come in a short run. β and ε are of the authors' code.
    """

    name = "recadam"
    defaults: ClassVar[Mapping[str, Value]] = {
        "gamma": 5000.0,
        "k": 0.5,
        "t0": 0.2,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-6,
    }
    one_model = True

    def __init__(self, **options: Value) -> None:
        super().__init__(**options)
        self.gamma, self.k, self.t0 = (self.number(key) for key in ("gamma", "k", "t0"))
        self.betas = (self.number("beta1", 0.0, 0.9999999), self.number("beta2", 0.0, 0.9999999))
        self.epsilon = self.number("epsilon")

    def check(self, learning_rate: float) -> None:
        """Raise UsageError where a step back to the anchor would overshoot it twice over, and diverge."""
        pull = learning_rate * self.gamma
        if pull >= 2:
            raise UsageError(
                f"recadam.gamma={self.gamma:g} at learning rate {learning_rate:g}",
                why=f"each step would go {pull:g} times the way back to the pretrained weights, and diverge",
                next_step=f"Take a gamma of {1 / learning_rate:g} or less",
            )

    def make_optimizer(self, training: Training) -> Optimizer:
        """Return RecAdam over what is trained; weight decay is on matrices only.

        Raises UsageError where nothing that is trained has an anchor.
        """
        trained = {plain_name(name): p for name, p in training.model.named_parameters() if p.requires_grad}
        if not trained.keys() & training.anchor.keys():
            raise UsageError(
                "recadam has nothing to recall",
                why="no pretrained weight is trained",
                next_step="Train all weights (without --lora), or leave recadam out",
            )
        groups = [
            {
                "params": [p for p, _ in members],
                "anchors": [anchor for _, anchor in members],
                "weight_decay": training.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
            if (
                members := [
                    (p, _beside(p, training.anchor.get(name)))
                    for name, p in trained.items()
                    if (p.ndim > 1) == decays
                ]
            )
        ]
        return RecAdam(
            groups,
            lr=training.learning_rate,
            gamma=self.gamma,
            k=self.k,
            t0=self.t0 * training.steps if self.t0 < 1 else self.t0,
            betas=self.betas,
            eps=self.epsilon,
        )


class RecAdam(Optimizer):
    """The optimizer; a group's `anchors` are beside its `params`, None for a parameter without one."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        gamma: float,
        k: float,
        t0: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "t": 0})
        self.gamma, self.k, self.t0, self.betas, self.eps = gamma, k, t0, betas, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; a parameter without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["t"] += 1
            held = [
                (p, anchor)
                for p, anchor in zip(group["params"], group["anchors"], strict=True)
                if p.grad is not None
            ]
            share = task_share(group["t"], self.k, self.t0)
            pull = group["lr"] * (1 - share) * self.gamma
            self._adam([p for p, anchor in held if anchor is not None], group["lr"] * share, group["t"])
            self._adam([p for p, anchor in held if anchor is None], group["lr"], group["t"])
            for p, anchor in held:
                if anchor is not None:
                    p.lerp_(anchor, pull)
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
        return loss

    def _adam(self, parameters: list[Tensor], lr: float, t: int) -> None:
        """Take Adam's step number t. torch adds its ε to √(v / (1-β₂ᵗ)), the paper's stands beside √v."""
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = self.betas
        adam(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["m"] for state in states],
            [state["v"] for state in states],
            [],
            list(torch.full((len(parameters),), t - 1.0, device=parameters[0].device).unbind()),
            fused=True,  # one pass over the memory, in place of nine
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0,
            eps=self.eps / math.sqrt(1 - beta2**t),
            maximize=False,
        )


def task_share(t: float, k: float, t0: float) -> float:
    """Return λ(t) = 1 / (1 + exp(-k(t-t₀))), without overflow far before t₀."""
    return 0.5 * (1 + math.tanh(0.5 * k * (t - t0)))


def _beside(parameter: Tensor, anchor: Tensor | None) -> Tensor | None:
    return None if anchor is None else anchor.to(parameter.device)


METHOD = Recall
