"""NEFTune: the size of its noise, with the padded length and with the true one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from noisytune_cli.study.combination import combine

from .runs import batch_of, forward, new_member, run, tiny_bert, training_of

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def noise_of(batch: dict[str, Tensor], **settings: Any) -> Tensor:
    """Return what NEFTune added to the embeddings [B, L, d] of a batch."""
    model, seen = tiny_bert(**STILL), []
    model.bert.embeddings.LayerNorm.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    forward(model, batch)
    method = combine("neftune", {f"neftune.{key}": value for key, value in settings.items()})
    method.loss(training_of(model), new_member(model), batch)
    return seen[1] - seen[0]


def test_the_noise_is_bounded_by_alpha_over_the_root_of_length_and_width() -> None:
    noise = noise_of(batch_of(rows=32, length=9), alpha=10.0)
    bound = 10 / math.sqrt(9 * 8)
    assert 0.99 * bound < float(noise.abs().max()) <= bound * (1 + 1e-5)
    assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert float(noise.mean()) == pytest.approx(0.0, abs=bound / 20)
    # In the common implementation padding gets noise as well.
    assert float(noise[-1, -2:].abs().max()) > bound / 2


def test_the_default_alpha_is_five() -> None:
    assert float(noise_of(batch_of(rows=32)).abs().max()) == pytest.approx(5 / math.sqrt(6 * 8), rel=0.01)


def test_with_the_true_length_each_sentence_has_its_own_scale() -> None:
    batch = batch_of(rows=32, length=9)
    batch["attention_mask"][1:, 5:] = 0
    noise = noise_of(batch, length="true")
    assert float(noise[0].abs().max()) == pytest.approx(5 / math.sqrt(9 * 8), rel=0.1)
    assert float(noise[1:, :5].abs().max()) == pytest.approx(5 / math.sqrt(5 * 8), rel=0.01)
    assert float(noise[1:, 5:].abs().max()) == 0.0


def test_evaluation_and_what_comes_after_are_without_noise() -> None:
    model, batch = tiny_bert(**STILL), batch_of()
    training = training_of(model)
    run(combine("neftune"), training, [batch] * 2)
    state = training.generator.get_state()
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(forward(model, batch), forward(model, batch))
    assert torch.equal(training.generator.get_state(), state)


def test_the_same_seed_trains_the_same_weights() -> None:
    def trained(seed: int) -> Tensor:
        model = tiny_bert(**STILL)
        run(combine("neftune"), training_of(model, noise_seed=seed), [batch_of(seed=i) for i in range(3)])
        return model.classifier.weight.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
