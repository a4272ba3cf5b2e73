"""Methods by name, their options from the command line, and which of them go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from noisytune_cli.errors import UsageError
from noisytune_cli.study import methods
from noisytune_cli.study.combination import combine, draws, read_settings

from .runs import batch_of, run, tiny_bert, training_of


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_named_as_its_file_and_its_defaults_are_valid(name: str) -> None:
    method = methods.load(name)
    assert method.name == name
    assert method().options == dict(method.defaults)
    assert combine(name).name == name


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no such method: noizytune: the methods are .*noisytune, plain"):
        combine("noizytune")


def test_options_are_read_as_the_type_of_their_default() -> None:
    settings = read_settings(
        ["r3f.lambda=1", "noisytune.fresh=true", "noisytune.exclude=*.bias,@norm", "r3f.lambda=2"]
    )
    assert settings == {"r3f.lambda": 2.0, "noisytune.fresh": True, "noisytune.exclude": "*.bias,@norm"}
    assert type(settings["r3f.lambda"]) is float
    combination = combine("noisytune", {**settings, "other.key": 3})
    assert combination.options["noisytune.fresh"] is True
    assert combination.options["noisytune.noise"] == "uniform"
    assert "other.key" not in combination.options


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("noisytune.lamda=1", "noisytune has no such option. Its options are: noisytune.lambda,"),
        ("plain.p=1", "plain has no such option. Leave it out"),
        ("neftune.alpha=big", "it must be a number. The default is neftune.alpha=5"),
        ("neftune.alpha=nan", "it must be a number"),
        ("neftune.alpha=1e999", "it must be a number"),
        (
            "noisytune.lambda=0.3",
            "the study's runs are made of it, so it has an option of its own",
        ),
        ("noisytune.noise=gaussian", "Use --noise gaussian"),
        ("noisytune.scope=global", "Use --scope global"),
        ("noisytune.fresh=2", "it must be true or false"),
        ("noisytune.fresh", "is written METHOD.KEY=VALUE"),
        ("lambda=0.1", "is written METHOD.KEY=VALUE"),
        ("nothing.lambda=0.1", "no such method: nothing"),
    ],
)
def test_a_wrong_option_is_named(text: str, line: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_settings([text])
    assert line in raised.value.line()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"noisytune.lambda": -0.1}, "must be at least 0"),
        ({"noisytune.noise": "normal"}, "Use one of: uniform, gaussian"),
        ({"noisytune.width": 1.0}, "no such option"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, methods.Value], line: str) -> None:
    with pytest.raises(UsageError) as raised:
        combine("noisytune", settings)
    assert line in raised.value.line()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("noisytune+noisytune", "one method twice"),
        ("plain+noisytune", "without any method"),
        ("neftune+r3f", "each of neftune and r3f changes the loss"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        combine(text)


def test_plain_is_finetuning_and_nothing_else() -> None:
    model, batches = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), [batch_of()] * 3
    by_hand = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    training = training_of(model)
    before = training.generator.get_state()
    run(combine("plain"), training, batches)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for batch in batches:
        inputs: Any = {k: v for k, v in batch.items() if k != "labels"}
        nn.functional.cross_entropy(by_hand(**inputs).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for got, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(training.generator.get_state(), before)


@pytest.mark.parametrize("name", [name for name in methods.names() if name not in ("plain", "noisytune")])
def test_noisytune_combines_with_each_and_its_noise_is_there_first(name: str) -> None:
    combination = combine(f"{name}+noisytune")
    assert combination.name == f"noisytune+{name}" == combine(f"noisytune+{name}").name
    model = tiny_bert()
    training = training_of(model)
    start = model.bert.pooler.dense.weight.detach().clone()
    combination.prepare(training)
    assert not torch.equal(model.bert.pooler.dense.weight, start)
    noised = model.bert.pooler.dense.weight.detach().clone()
    model = tiny_bert()
    run(combine(f"{name}+noisytune"), training_of(model), [batch_of(seed=i) for i in range(4)])
    assert not torch.equal(model.bert.pooler.dense.weight, noised)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("name", methods.names())
def test_a_method_says_whether_it_draws_from_the_seed_of_noise(name: str, regression: bool) -> None:
    def trained(noise_seed: int) -> list[Any]:
        labels = 1 if regression else 3
        model = tiny_bert(labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        training = training_of(model, noise_seed=noise_seed, regression=regression)
        if regression:
            training.task_loss = lambda logits, wanted: nn.functional.mse_loss(logits[:, 0], wanted.float())
        # Noise that float32 can tell.
        method = combine(name, {"r3f.sigma": 0.1})
        run(method, training, [batch_of(seed=i, labels=labels) for i in range(5)])
        return [p.detach() for p in model.parameters()]

    same = all(torch.equal(one, other) for one, other in zip(trained(0), trained(1), strict=True))
    assert draws(name, regression=regression) == (not same)


def test_a_combination_draws_where_one_of_it_does() -> None:
    assert not draws("recadam+swa", regression=False)
    assert draws("noisytune+recadam", regression=False)
    assert draws("r3f+swa", regression=False)
    assert not draws("r3f+swa", regression=True)
    assert not draws("recadam+a-method-of-old", regression=False)
