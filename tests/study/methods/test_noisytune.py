"""NoisyTune as a method: the noise of `perturb_`, on what the checkpoint brought."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from noisytune_cli import perturb_
from noisytune_cli.errors import UsageError
from noisytune_cli.study.combination import combine
from noisytune_cli.study.methods import Value
from noisytune_cli.study.methods.noisytune import NoisyTune

from .runs import tiny_bert, training_of


def prepared(model: Any, **settings: Any) -> dict[str, Tensor]:
    """Return a model's parameters after noisytune came before training with the options given."""
    kinds = {k: settings.pop(k) for k in ("anchor_kind", "noise_seed", "peft") if k in settings}
    options: dict[str, Value] = {f"noisytune.{k}": v for k, v in settings.items()}
    combine("noisytune", options).prepare(training_of(model, **kinds))
    return dict(model.named_parameters())


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_the_noise_is_that_of_perturb_without_the_fresh_head(noise: str, scope: Any) -> None:
    expected = tiny_bert()
    perturb_(expected, 0.3, 7, noise=noise, scope=scope, fresh_names="classifier.*")
    got = prepared(tiny_bert(), **{"lambda": 0.3, "noise": noise, "scope": scope, "noise_seed": 7})
    clean = dict(tiny_bert().named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(got[name], parameter), name
    assert torch.equal(got["classifier.weight"], clean["classifier.weight"])
    query = "bert.encoder.layer.0.attention.self.query.weight"
    change, std = (got[query] - clean[query]).detach(), float(clean[query].detach().std())
    if scope == "matrix":
        assert float(change.std()) == pytest.approx(0.3 / math.sqrt(12) * std, rel=0.3)
        if noise == "uniform":
            assert float(change.abs().max()) <= 0.15 * std * (1 + 1e-5)


def test_a_fresh_head_gets_noise_where_asked() -> None:
    expected = tiny_bert()
    perturb_(expected, 0.15, 0)
    got = prepared(tiny_bert(), fresh=True)
    assert all(torch.equal(got[name], parameter) for name, parameter in expected.named_parameters())
    assert not torch.equal(got["classifier.weight"], tiny_bert().classifier.weight)


def test_what_is_excluded_stays() -> None:
    clean = dict(tiny_bert().named_parameters())
    got = prepared(tiny_bert(), exclude="@embeddings,*.intermediate.*")
    same = {name for name, value in clean.items() if torch.equal(got[name], value)}
    assert "bert.embeddings.word_embeddings.weight" in same
    assert "bert.encoder.layer.0.intermediate.dense.weight" in same
    assert "bert.encoder.layer.0.output.dense.weight" not in same
    with pytest.raises(UsageError, match="pattern matches nothing"):
        prepared(tiny_bert(), exclude="*.nothing")


@pytest.mark.parametrize("kind", ["original", "noised"])
def test_the_anchor_is_what_was_asked_for(kind: Any) -> None:
    model = tiny_bert()
    clean = {name: value.detach().clone() for name, value in model.named_parameters()}
    training = training_of(model, anchor_kind=kind)
    shared = dict(training.anchor)
    combine("noisytune").prepare(training)
    expected = clean if kind == "original" else dict(model.named_parameters())
    assert training.anchor.keys() == shared.keys()
    assert all(torch.equal(value, expected[name]) for name, value in training.anchor.items())
    assert all(torch.equal(value, clean[name]) for name, value in shared.items()), "never changed in place"
    assert all(not value.requires_grad for value in training.anchor.values())


def test_no_noise_at_lambda_zero() -> None:
    clean = dict(tiny_bert().named_parameters())
    assert all(
        torch.equal(value, clean[name]) for name, value in prepared(tiny_bert(), **{"lambda": 0}).items()
    )


def with_lora() -> Any:
    """Return a model with adapters, beside which peft trains a copy of the head."""
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return peft.get_peft_model(tiny_bert(), config)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("brought", [True, False])
def test_under_lora_the_head_that_is_trained_gets_the_noise_of_a_full_run(brought: bool) -> None:
    expected = tiny_bert()
    record = perturb_(expected, 0.15, 0)
    wrapped = with_lora()
    fresh = frozenset(n for n, _ in wrapped.named_parameters() if ".classifier." in n and not brought)
    (method,) = combine("noisytune", {"noisytune.fresh": not brought}).methods
    training = training_of(wrapped, fresh=fresh, peft=True, anchor_kind="noised")
    method.prepare(training)
    for own in ("weight", "bias"):
        name = f"base_model.model.classifier.modules_to_save.default.{own}"
        head = wrapped.get_parameter(name)
        assert torch.equal(head, expected.classifier.get_parameter(own))
        assert head.requires_grad
        assert not brought or torch.equal(training.anchor[name], head)
    assert isinstance(method, NoisyTune)
    assert method.manifest is not None
    assert method.manifest.receipts == record.receipts


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_under_lora_the_frozen_weights_get_the_noise_they_get_without() -> None:
    expected = tiny_bert()
    perturb_(expected, 0.15, 0, fresh_names="classifier.*")
    wrapped = with_lora()
    adapters = {n: p.detach().clone() for n, p in wrapped.named_parameters() if "lora" in n}
    fresh = frozenset(n for n, _ in wrapped.named_parameters() if ".classifier." in n)
    combine("noisytune").prepare(training_of(wrapped, fresh=fresh, peft=True))
    got = dict(wrapped.named_parameters())
    assert adapters
    assert all(torch.equal(got[name], value) for name, value in adapters.items())
    stem = "bert.encoder.layer.0.attention.self"
    assert torch.equal(
        got[f"base_model.model.{stem}.query.base_layer.weight"],
        expected.get_parameter(f"{stem}.query.weight"),
    )
    assert torch.equal(
        got["base_model.model.bert.pooler.dense.weight"], expected.get_parameter("bert.pooler.dense.weight")
    )
    assert torch.equal(
        got["base_model.model.classifier.modules_to_save.default.weight"], tiny_bert().classifier.weight
    )
