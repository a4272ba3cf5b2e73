"""Weight noise: when it comes, how large it is, and on what."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from noisytune_cli.errors import UsageError
from noisytune_cli.study.combination import combine
from noisytune_cli.study.methods.weightnoise import add_gaussian

from .runs import new_member, tiny_bert, training_of


def additions(steps: int, **settings: Any) -> dict[int, Tensor]:
    """Return what each step that adds noise adds to the head, by the number of steps taken."""
    model = tiny_bert()
    training = training_of(model, steps=steps)
    training.members = [new_member(model)]
    method = combine("weightnoise", {f"weightnoise.{key}": value for key, value in settings.items()})
    method.prepare(training)
    found = {}
    for step in range(steps):
        before = model.classifier.weight.detach().clone()
        method.after_step(training, step)
        change = model.classifier.weight.detach() - before
        if change.any():
            found[step + 1] = change / before.std()
    return found


def test_it_comes_every_25_steps_of_the_papers_schedule() -> None:
    assert list(additions(1250)) == list(range(375, 1125, 25))


def test_a_short_run_has_the_same_shares() -> None:
    assert list(additions(315)) == list(range(94, 284, 6))
    assert list(additions(10)) == [3, 4, 5, 6, 7, 8]
    assert list(additions(10, begin=0.0, end=1.0, every=0.5)) == [1, 6]


def test_it_is_scaled_by_the_current_std_and_decays_with_the_steps() -> None:
    found = additions(1250)
    for taken, change in found.items():
        # 24 numbers of std √(v / step); their own std is within 4 standard errors of it.
        assert float(change.std()) == pytest.approx(math.sqrt(0.15 / taken), rel=4 / math.sqrt(2 * 23))
    scaled = torch.stack([change * math.sqrt(taken / 0.15) for taken, change in found.items()])
    assert float(scaled.std()) == pytest.approx(1.0, abs=0.1)
    assert float(scaled.mean()) == pytest.approx(0.0, abs=0.15)


def changed_by(model: Any, **settings: Any) -> set[str]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_gaussian(training_of(model, **settings), model, 0.5)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_full_finetuning_gets_it_on_the_head_only() -> None:
    assert changed_by(tiny_bert(initializer_range=0.5)) == {"classifier.weight"}
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.0, 2.0, 4.0]))
    assert changed_by(model) == {"classifier.weight", "classifier.bias"}, "a constant has std 0"


def test_a_head_that_came_with_the_checkpoint_is_told_by_its_name() -> None:
    assert changed_by(tiny_bert(), fresh=frozenset()) == {"classifier.weight"}


def test_a_bias_of_one_number_has_no_std_and_stays() -> None:
    model = tiny_bert(labels=1)
    assert changed_by(model) == {"classifier.weight"}
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_under_lora_all_that_is_trained_gets_it() -> None:
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False
    )
    wrapped: Any = peft.get_peft_model(tiny_bert(), config)
    matrices = ((name, p) for name, p in wrapped.named_parameters() if p.ndim > 1)
    trained = {name for name, p in matrices if p.requires_grad}
    assert changed_by(wrapped, peft=True) == trained
    assert sum("lora_A" in name for name in trained) == 2


def test_a_model_without_a_head_is_refused() -> None:
    model = tiny_bert()
    model.classifier.requires_grad_(False)
    for name in ("weightnoise", "deni"):
        with pytest.raises(UsageError, match=f"{name} has nothing to add noise to"):
            combine(name).prepare(training_of(model))
