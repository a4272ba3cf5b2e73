"""R3F and R4F against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noisytune_cli.errors import InputInvalid
from noisytune_cli.study.combination import combine
from noisytune_cli.study.methods import Member, Training
from noisytune_cli.study.methods.r3f import symmetric_divergence

from .runs import batch_of, forward, new_member, run, tiny_bert, training_of

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def loss_of(training: Training, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    method = combine("r3f", {f"r3f.{key}": value for key, value in settings.items()})
    return method.loss(training, new_member(training.model), batch)


def test_the_divergence_is_that_of_the_formula() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p‖q) = ln 2 - ln 3 / 2, KL(q‖p) = 3/4 ln 3 - ln 2.
    left = torch.tensor([[0.0, 0.0], [7.0, 7.0]])
    right = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    # Their sum is ln 3 / 4, and the second row's is 0: so much for the mean of both.
    assert float(symmetric_divergence(left, right)) == pytest.approx(math.log(3) / 8, rel=1e-6)
    assert float(symmetric_divergence(right, left)) == pytest.approx(math.log(3) / 8, rel=1e-6)
    assert float(symmetric_divergence(left, left)) == 0.0


def test_the_divergence_agrees_with_torch_and_is_finite_far_out() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 4, generator=generator) * 3 for _ in range(2))
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    both = nn.functional.kl_div(p, q, log_target=True, reduction="sum") + nn.functional.kl_div(
        q, p, log_target=True, reduction="sum"
    )
    assert float(symmetric_divergence(a, b)) == pytest.approx(float(both) / 5, rel=1e-5)
    far = symmetric_divergence(torch.tensor([[0.0, 500.0]]), torch.tensor([[500.0, 0.0]]))
    assert float(far) == pytest.approx(1000.0)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_the_loss_is_the_tasks_plus_lambda_times_the_divergence(noise: str) -> None:
    model, batch = tiny_bert(**STILL, initializer_range=0.5), batch_of()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    generator = torch.Generator().manual_seed(3)
    drawn = torch.empty_like(embeddings)
    if noise == "uniform":
        drawn.uniform_(-0.1, 0.1, generator=generator)
    else:
        drawn.normal_(0.0, 0.1, generator=generator)
    clean = forward(model, batch)
    noised = model(inputs_embeds=embeddings + drawn, attention_mask=batch["attention_mask"]).logits
    p, q = clean.softmax(-1).detach().double().numpy(), noised.softmax(-1).detach().double().numpy()
    divergence = 0.0
    for row in range(p.shape[0]):
        for c in range(p.shape[1]):
            divergence += p[row, c] * math.log(p[row, c] / q[row, c])
            divergence += q[row, c] * math.log(q[row, c] / p[row, c])
    task = float(nn.functional.cross_entropy(clean, batch["labels"]).detach())
    training = training_of(model, generator=torch.Generator().manual_seed(3))
    got = loss_of(training, batch, **{"lambda": 50.0, "sigma": 0.1, "noise": noise})
    assert divergence > 1e-3
    assert float(got.detach()) == pytest.approx(task + 50 * divergence / p.shape[0], rel=1e-4)


def test_the_noise_is_of_the_size_asked_for() -> None:
    seen: list[Tensor] = []
    model, batch = tiny_bert(**STILL), batch_of(rows=16, length=12)
    clean = model.get_input_embeddings()(batch["input_ids"]).detach()
    model.bert.embeddings.LayerNorm.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    loss_of(training_of(model), batch, sigma=1e-3)
    change = seen[1] - seen[0]
    assert clean.shape == change.shape
    assert 0.99e-3 < float(change.abs().max()) <= 1.001e-3
    assert float(change.std()) == pytest.approx(1e-3 / math.sqrt(3), rel=0.1)
    seen.clear()
    loss_of(training_of(model), batch, sigma=1e-3, noise="normal")
    assert float((seen[1] - seen[0]).std()) == pytest.approx(1e-3, rel=0.1)


def test_no_gradient_reaches_the_table_through_the_noised_branch() -> None:
    def gradient(lam: float) -> tuple[Tensor, Tensor]:
        model = tiny_bert(**STILL)
        loss_of(training_of(model), batch_of(), **{"lambda": lam, "sigma": 0.1}).backward()  # type: ignore[no-untyped-call]
        assert model.bert.embeddings.word_embeddings.weight.grad is not None
        assert model.classifier.weight.grad is not None
        return model.bert.embeddings.word_embeddings.weight.grad, model.classifier.weight.grad

    model, batch = tiny_bert(**STILL), batch_of()
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    noise = torch.empty_like(embeddings).uniform_(-0.1, 0.1, generator=generator)
    clean = forward(model, batch)
    noised = model(inputs_embeds=(embeddings + noise).detach(), attention_mask=batch["attention_mask"]).logits
    loss = nn.functional.cross_entropy(clean, batch["labels"]) + 20 * symmetric_divergence(clean, noised)
    loss.backward()
    table, head = gradient(20.0)
    assert torch.allclose(table, model.bert.embeddings.word_embeddings.weight.grad, atol=1e-7)
    assert torch.allclose(head, model.classifier.weight.grad, atol=1e-7)
    without, _ = gradient(0.0)
    assert not torch.allclose(table, without, atol=1e-7), "the clean branch keeps its gradient"


def test_a_regression_has_the_tasks_loss_alone() -> None:
    model, batch = tiny_bert(labels=1, **STILL), batch_of(labels=1)
    calls = 0

    def counted(model: nn.Module, batch: Any, **replaced: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(model, batch, **replaced)

    def squared(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(logits.squeeze(-1), labels.float())

    training = training_of(model, regression=True, task_loss=squared, forward=counted)
    assert torch.equal(loss_of(training, batch), squared(forward(model, batch), batch["labels"]))
    assert calls == 1


def sigma_max(model: Any) -> float:
    return float(torch.linalg.matrix_norm(model.classifier.weight.detach(), 2))


def test_the_head_of_r4f_has_norm_one_and_keeps_its_parameters() -> None:
    model = tiny_bert(**STILL)
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    own, sigma = model.classifier.weight, sigma_max(model)
    before = torch.random.get_rng_state()
    method, training = combine("r4f", {"r4f.sigma": 0.01}), training_of(model)
    method.prepare(training)
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator is left alone"
    for _ in range(20):
        model(**{k: v for k, v in batch_of().items() if k != "labels"})
    bounded = model.classifier.weight.detach().clone()
    assert torch.allclose(bounded, own.detach() / sigma, atol=1e-5)
    assert any(p is own for p in model.parameters())
    training.members = [new_member(model)]
    method.finish(training)
    assert not nn.utils.parametrize.is_parametrized(model)
    assert "classifier.weight" in dict(model.named_parameters())
    assert sigma_max(model) == pytest.approx(1.0, rel=1e-4)


def test_r4f_trains_through_the_bound_head() -> None:
    model = tiny_bert(**STILL)
    start = model.classifier.weight.detach().clone()
    run(combine("r4f"), training_of(model), [batch_of(seed=i) for i in range(5)])
    assert not torch.allclose(model.classifier.weight, start / torch.linalg.matrix_norm(start, 2), atol=1e-4)
    assert sigma_max(model) == pytest.approx(1.0, rel=1e-2)


def test_beside_mixout_r4f_bounds_the_mixed_head_of_a_checkpoint() -> None:
    model = tiny_bert(**STILL)
    anchor, own = model.classifier.weight.detach().clone(), model.classifier.weight
    training = training_of(model, fresh=frozenset())
    with torch.no_grad():
        own.add_(torch.randn(own.shape, generator=torch.Generator().manual_seed(9)))
    method = combine("mixout+r4f", {"mixout.p": 1.0, "r4f.sigma": 0.01})
    method.prepare(training)
    seen: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda m, _: seen.append(m.weight.detach()))
    for _ in range(30):
        forward(model, batch_of())
    handle.remove()
    assert torch.allclose(seen[-1], anchor / torch.linalg.matrix_norm(anchor, 2), atol=1e-4)
    assert model.classifier.parametrizations.weight.original is own
    # And it trains: what is left is the weight itself, bounded.
    model = tiny_bert(**STILL)
    batches = [batch_of(seed=i) for i in range(5)]
    run(combine("mixout+r4f"), training_of(model, fresh=frozenset()), batches)
    assert sigma_max(model) == pytest.approx(1.0, rel=0.05)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_recadam_holds_the_head_that_r4f_bounds() -> None:
    model = tiny_bert()
    training = training_of(model, fresh=frozenset())
    own, anchor = model.classifier.weight, training.anchor["classifier.weight"]
    method = combine("recadam+r4f")
    method.prepare(training)
    optimizer: Any = method.make_optimizer(training)
    held = {
        id(p): beside
        for group in optimizer.param_groups
        for p, beside in zip(group["params"], group["anchors"], strict=True)
    }
    assert held[id(own)] is anchor
    assert None not in held.values()


def test_a_model_without_such_a_head_is_refused() -> None:
    model = tiny_bert()
    model.classifier.requires_grad_(False)
    with pytest.raises(InputInvalid, match="no linear layer that is trained has 3 outputs"):
        combine("r4f").prepare(training_of(model))


def test_a_decoder_finds_its_last_token_in_the_noised_pass_too() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 16, "pad_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(**size, num_labels=3)).eval()
    batch = batch_of()
    member: Member = new_member(model)
    task = nn.functional.cross_entropy(forward(model, batch), batch["labels"])
    loss = combine("r3f").loss(training_of(model), member, batch)
    # Noise of 1e-5 hardly moves a prediction; one read at a padded place would be another sentence's.
    assert float(loss.detach()) == pytest.approx(float(task.detach()), abs=1e-6)


def test_a_model_that_does_not_use_its_table_is_refused() -> None:
    model = tiny_bert()
    model.set_input_embeddings(nn.Embedding(20, 8))
    stray = nn.Embedding(20, 8)
    model.get_input_embeddings = lambda: stray
    with pytest.raises(InputInvalid, match="cannot add noise to the embeddings of Bert"):
        loss_of(training_of(model), batch_of())
