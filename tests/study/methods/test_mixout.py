"""Mixout: its mean, its limits, what it covers, and that nothing of it is left."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from noisytune_cli.errors import UsageError
from noisytune_cli.study.combination import combine
from noisytune_cli.study.methods.mixout import dropouts, mixed

from .runs import batch_of, forward, run, tiny_bert, training_of

QUERY = "bert.encoder.layer.0.attention.self.query"


def moved(model: Any) -> dict[str, Tensor]:
    """Move every weight away from its anchor; return the anchor."""
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
    return anchor


def effective(model: Any, layer: str = QUERY) -> Tensor:
    """Return the weight that a layer has while it computes."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda m, _: seen.append(m.weight.detach().clone()))
    module(torch.zeros(2, module.weight.shape[1]))
    handle.remove()
    return seen[0]


def mixing(p: float, mask: str = "neuron", **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a model in training under mixout, its weights away from the anchor, and the anchor."""
    model = tiny_bert(**settings)
    training = training_of(model)
    anchor = moved(model)
    combine("mixout", {"mixout.p": p, "mixout.mask": mask}).prepare(training)
    return model, anchor


def test_the_formula_by_hand() -> None:
    w, u = torch.tensor([[3.0, 5.0, 1.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    keep, p = torch.tensor([[1.0, 0.0, 1.0]]), 0.75
    # kept: (w - p·u) / (1-p); dropped: (u - p·u) / (1-p) = u
    by_hand = [(3 - 0.75 * 1) / 0.25, 2.0, (1 - 0.75 * 4) / 0.25]
    assert mixed(w, u, keep, p).tolist() == [by_hand]
    in_full = ((1 - keep) * u + keep * w - p * u) / (1 - p)
    assert torch.allclose(mixed(w, u, keep, p), in_full)


def test_at_one_the_weights_are_the_anchors_and_at_zero_the_models() -> None:
    model, anchor = mixing(1.0)
    assert torch.equal(effective(model), anchor[f"{QUERY}.weight"])
    model, _ = mixing(0.0)
    assert torch.allclose(effective(model), model.get_parameter(f"{QUERY}.weight"), atol=1e-6)


@pytest.mark.parametrize("mask", ["neuron", "element"])
def test_the_mean_over_masks_is_the_weight(mask: str) -> None:
    model, anchor = mixing(0.7, mask)
    w, u = model.get_parameter(f"{QUERY}.weight").detach(), anchor[f"{QUERY}.weight"]
    draws = torch.stack([effective(model) for _ in range(600)])
    # Each element is u with probability 0.7, else u + (w-u)/0.3: std |w-u| √(0.7/0.3) a draw.
    error = (draws.mean(0) - w).abs() / ((w - u).abs() * (0.7 / 0.3 / 600) ** 0.5)
    assert float(error.max()) < 4.5
    share = torch.isclose(draws, u.expand_as(draws)).float().mean()
    assert float(share) == pytest.approx(0.7, abs=0.03)


def test_the_mask_is_drawn_for_input_neurons_or_for_elements() -> None:
    for mask, whole_columns in (("neuron", True), ("element", False)):
        model, anchor = mixing(0.5, mask)
        dropped = torch.isclose(effective(model), anchor[f"{QUERY}.weight"])
        assert 0 < int(dropped.sum()) < dropped.numel()
        assert bool((dropped == dropped[0]).all()) == whole_columns


def test_a_decoder_of_other_layers_is_mixed_by_input_neurons_too() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 16, "pad_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(**size, num_labels=3)).train()
    training = training_of(model, fresh=frozenset({"score.weight"}))
    anchor = moved(model)
    combine("mixout", {"mixout.p": 0.5}).prepare(training)
    layer = "transformer.h.0.attn.c_attn"
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda m, _: seen.append(m.weight.detach()))
    forward(model, batch_of())
    dropped = torch.isclose(seen[0], anchor[f"{layer}.weight"])
    assert dropped.shape == (8, 24)
    assert bool((dropped == dropped[:, :1]).all())
    assert 0 < int(dropped.sum()) < dropped.numel()


def test_the_gradient_is_the_formulas() -> None:
    model, anchor = mixing(0.5)
    weight = model.get_parameter(f"{QUERY}.weight")
    seen: list[Tensor] = []

    def keep(module: nn.Module, _: object) -> None:
        assert isinstance(module.weight, Tensor)
        module.weight.retain_grad()
        seen.append(module.weight)

    model.get_submodule(QUERY).register_forward_pre_hook(keep)
    forward(model, batch_of()).sum().backward()  # type: ignore[no-untyped-call]
    dropped = torch.isclose(seen[0].detach(), anchor[f"{QUERY}.weight"])
    assert seen[0].grad is not None
    assert torch.allclose(weight.grad, torch.where(dropped, 0.0, seen[0].grad / 0.5), atol=1e-7)
    assert float(weight.grad.abs().sum()) > 0


def test_biases_norms_embeddings_and_the_fresh_head_are_left_alone() -> None:
    model, anchor = mixing(1.0)
    assert torch.equal(effective(model, "classifier"), model.classifier.weight)
    assert not torch.equal(effective(model, "classifier"), anchor["classifier.weight"])
    assert not model.get_input_embeddings()._forward_pre_hooks
    module = model.get_submodule(QUERY)
    assert not torch.equal(module.bias, anchor[f"{QUERY}.bias"])
    assert torch.equal(effective(model, "bert.pooler.dense"), anchor["bert.pooler.dense.weight"])


def test_masks_are_drawn_anew_and_follow_the_seed() -> None:
    left, right = mixing(0.5)[0], mixing(0.5)[0]
    first, second = effective(left), effective(left)
    assert not torch.equal(first, second)
    assert torch.equal(effective(right), first)
    assert torch.equal(effective(right), second)


def test_evaluation_uses_the_weights_themselves() -> None:
    model, _ = mixing(0.9)
    model.eval()
    assert torch.equal(effective(model), model.get_parameter(f"{QUERY}.weight"))
    plain = tiny_bert().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(forward(model, batch_of()), forward(plain, batch_of()))


def test_other_dropout_is_off_while_training_and_back_after() -> None:
    model = tiny_bert()
    before = [getattr(module, attribute) for module, attribute in dropouts(model)]
    assert 0.1 in before
    training = training_of(model)
    method = combine("mixout", {"mixout.p": 0.0})
    method.prepare(training)
    assert all(getattr(module, attribute) == 0 for module, attribute in dropouts(model))
    assert torch.equal(forward(model, batch_of()), forward(model, batch_of()))
    method.finish(training)
    assert [getattr(module, attribute) for module, attribute in dropouts(model)] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_moves_the_weights_and_an_error_leaves_them_in_place() -> None:
    model = tiny_bert()
    before = model.get_parameter(f"{QUERY}.weight")
    start = before.detach().clone()
    run(combine("mixout"), training_of(model), [batch_of(seed=i) for i in range(3)])
    assert model.get_parameter(f"{QUERY}.weight") is before
    assert not torch.equal(before, start)
    training = training_of(model)
    combine("mixout").prepare(training)
    with pytest.raises(RuntimeError, match="shapes"):
        model.get_submodule(QUERY)(torch.zeros(1, 5))
    assert model.get_parameter(f"{QUERY}.weight") is before


def test_copies_of_the_model_are_mixed_each_by_itself() -> None:
    model, anchor = mixing(1.0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter(f"{QUERY}.weight").zero_()
    assert torch.equal(effective(twin), anchor[f"{QUERY}.weight"])
    twin.eval()
    assert float(effective(twin).abs().max()) == 0.0
    assert torch.equal(effective(model), anchor[f"{QUERY}.weight"])


@pytest.mark.parametrize("kind", ["original", "noised"])
def test_with_noisytune_the_anchor_is_what_was_asked_for(kind: Any) -> None:
    clean = tiny_bert().get_parameter(f"{QUERY}.weight").detach()
    model = tiny_bert()
    combine("mixout+noisytune", {"mixout.p": 1.0}).prepare(training_of(model, anchor_kind=kind))
    noised = model.get_parameter(f"{QUERY}.weight").detach()
    assert not torch.equal(noised, clean)
    assert torch.equal(effective(model), clean if kind == "original" else noised)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_where_nothing_pretrained_is_trained_it_is_refused() -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    wrapped: Any = peft.get_peft_model(tiny_bert(), config)
    fresh = frozenset(name for name, _ in wrapped.named_parameters() if ".classifier." in name)
    with pytest.raises(UsageError, match="mixout changes nothing here"):
        combine("mixout").prepare(training_of(wrapped, fresh=fresh, peft=True))
    with pytest.raises(UsageError, match="must be 0 to 1"):
        combine("mixout", {"mixout.p": 1.5})
