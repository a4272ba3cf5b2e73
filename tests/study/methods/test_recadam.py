"""RecAdam's update, step by step, against the same arithmetic in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray

from noisytune_cli.errors import UsageError
from noisytune_cli.study.combination import combine
from noisytune_cli.study.methods.recadam import RecAdam, task_share

from .runs import batch_of, run, tiny_bert, training_of

Array = NDArray[np.float64]


def by_hand(
    start: Array,
    anchor: Array | None,
    gradients: list[Array],
    *,
    lr: float,
    gamma: float,
    k: float,
    t0: float,
    decay: float,
) -> list[Array]:
    """Return θ after each step, by the paper's equations."""
    theta, m, v, path = start.copy(), np.zeros_like(start), np.zeros_like(start), []
    for t, gradient in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        lam = 1.0 if anchor is None else 1 / (1 + math.exp(-k * (t - t0)))
        theta = theta - lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * lam * m / (np.sqrt(v) + 1e-6)
        if anchor is not None:
            theta = theta - lr * (1 - lam) * gamma * (theta - anchor)
        theta = theta - lr * decay * theta
        path.append(theta)
    return path


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_step_is_the_papers(anchored: bool, decay: float) -> None:
    random = np.random.default_rng(0)
    start, anchor = random.normal(size=(3, 2)), random.normal(size=(3, 2))
    gradients = [random.normal(size=(3, 2)) * 10.0 ** random.integers(-3, 2) for _ in range(12)]
    settings = {"lr": 1e-3, "gamma": 300.0, "k": 0.7, "t0": 5.0}
    expected = by_hand(start, anchor if anchored else None, gradients, **settings, decay=decay)
    parameter = torch.nn.Parameter(torch.tensor(start))
    group = {
        "params": [parameter],
        "anchors": [torch.tensor(anchor) if anchored else None],
        "weight_decay": decay,
    }
    optimizer = RecAdam([group], **settings)
    for gradient, theta in zip(gradients, expected, strict=True):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-9, atol=1e-12)


def test_without_an_anchor_it_is_adam() -> None:
    left, right = (torch.nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    ours = RecAdam([{"params": [left], "anchors": [None]}], lr=0.01, gamma=5000.0, k=0.5, t0=50.0, eps=0.0)
    adam = torch.optim.Adam([right], lr=0.01, eps=0.0)
    for i in range(10):
        for parameter, optimizer in ((left, ours), (right, adam)):
            parameter.grad = torch.arange(1.0, 5.0, dtype=torch.float64) * (-1) ** i + i
            optimizer.step()
    assert torch.allclose(left, right, rtol=1e-12)


def test_the_share_of_the_task_goes_from_none_to_all() -> None:
    assert task_share(250, 0.5, 250) == 0.5
    assert task_share(254, 0.5, 250) == pytest.approx(1 / (1 + math.exp(-2)))
    assert task_share(1, 1.0, 1e6) == 0.0
    assert task_share(1e6, 1.0, 1) == 1.0


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    RecAdam([{"params": [parameter], "anchors": [torch.zeros(2)]}], lr=0.1, gamma=5.0, k=1.0, t0=9.0).step()
    assert parameter.tolist() == [1.0, 1.0]


def test_long_before_t0_only_the_head_moves() -> None:
    def trained(t0: float) -> dict[str, torch.Tensor]:
        model = tiny_bert()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = {"recadam.t0": t0, "recadam.k": 5.0}
        run(combine("recadam", settings), training_of(model), [batch_of(seed=i) for i in range(6)])
        return {name: (p.detach() - start[name]).abs().max() for name, p in model.named_parameters()}

    held = trained(1000.0)
    assert max(float(d) for name, d in held.items() if not name.startswith("classifier")) < 1e-6
    assert float(held["classifier.weight"]) > 1e-4
    free = trained(0.0)
    assert float(free["bert.pooler.dense.weight"]) > 1e-4


def optimizer_of(model: Any, settings: dict[str, Any] | None = None, **run_settings: Any) -> RecAdam:
    optimizer = combine("recadam", settings).make_optimizer(training_of(model, **run_settings))
    assert isinstance(optimizer, RecAdam)
    return optimizer


def test_the_groups_hold_all_that_is_trained_and_decay_matrices_only() -> None:
    model = tiny_bert()
    optimizer = optimizer_of(model, weight_decay=0.01)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    anchors = {
        id(p): anchor
        for group in optimizer.param_groups
        for p, anchor in zip(group["params"], group["anchors"], strict=True)
    }
    for name, p in model.named_parameters():
        assert (anchors[id(p)] is None) == name.startswith("classifier"), name
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.01) for p in group["params"])
        assert group["lr"] == 1e-4


def test_t0_is_a_share_of_the_run_or_a_step() -> None:
    assert optimizer_of(tiny_bert(), steps=315).t0 == pytest.approx(63.0)
    assert optimizer_of(tiny_bert(), {"recadam.t0": 250.0}, steps=315).t0 == 250.0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UsageError, match="Take a gamma of 1000 or less"):
        combine("noisytune+recadam").check(1e-3)
    combine("recadam", {"recadam.gamma": 1000.0}).check(1e-3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    wrapped: Any = peft.get_peft_model(tiny_bert(), config)
    fresh = frozenset(name for name, _ in wrapped.named_parameters() if ".classifier." in name)
    with pytest.raises(UsageError, match="nothing to recall"):
        optimizer_of(wrapped, fresh=fresh, peft=True)


@pytest.mark.parametrize("kind", ["original", "noised"])
def test_with_noisytune_it_recalls_what_was_asked_for(kind: Any) -> None:
    model, original = tiny_bert(), tiny_bert().bert.pooler.dense.weight.detach()
    training = training_of(model, anchor_kind=kind)
    method = combine("noisytune+recadam")
    method.prepare(training)
    noised = model.bert.pooler.dense.weight.detach()
    optimizer: Any = method.make_optimizer(training)
    held = next(
        anchor
        for group in optimizer.param_groups
        for p, anchor in zip(group["params"], group["anchors"], strict=True)
        if p is model.bert.pooler.dense.weight
    )
    assert not torch.equal(noised, original)
    assert torch.equal(held, original if kind == "original" else noised)
