"""DENI: its schedule, its cost, its noise, its mean; and its members as checkpoint operations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from checkpoints import save, weights
from safetensors.numpy import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.errors import UsageError
from noisytune_cli.study.combination import combine
from noisytune_cli.study.methods import Member
from noisytune_cli.study.methods.deni import schedule

from .runs import batch_of, new_member, run, tiny_bert, training_of

PAPER = (0.3, 0.6, 0.1, 0.9)


def test_the_schedule_is_the_papers() -> None:
    assert schedule(1250, *PAPER) == {
        375: "clone",
        500: "merge",
        625: "clone",
        750: "merge",
        1125: "ensemble",
    }


def test_a_run_of_any_length_ends_with_the_ensemble() -> None:
    assert schedule(315, *PAPER) == {94: "clone", 126: "merge", 158: "clone", 190: "merge", 284: "ensemble"}
    for steps in range(1, 400):
        events = schedule(steps, *PAPER)
        kinds = list(events.values())
        assert kinds[-1] == "ensemble"
        assert max(events) < steps
        assert kinds[:-1] == (["clone", "merge"] * len(kinds))[: len(kinds) - 1]
        assert list(events) == sorted(events)


class Linear(nn.Module):
    """The smallest thing with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(x))
        return logits


def test_the_cost_is_037_of_an_ensemble_of_ten() -> None:
    torch.manual_seed(0)
    training = training_of(Linear(), steps=1250)
    method = combine("deni")
    method.prepare(training)
    training.members = [new_member(training.model)]
    taken, sizes = 0, []
    for step in range(1250):
        method.before_step(training, step)
        sizes.append(len(training.members))
        taken += len(training.members)
        method.after_step(training, step)
    assert taken == 1250 + 9 * 125 * 2 + 9 * 125 == 4625
    assert taken / 12500 == 0.37
    assert sizes == [1] * 375 + [10] * 125 + [1] * 125 + [10] * 125 + [1] * 375 + [10] * 125


@pytest.mark.parametrize(("step", "scale"), [(375, math.sqrt(0.15 / 375)), (1125, math.sqrt(0.15))])
def test_clones_are_the_base_with_noise_on_the_head(step: int, scale: float) -> None:
    model: Any = tiny_bert(labels=50, initializer_range=0.5)
    made: list[Member] = []

    def counted(model: Any) -> Member:
        made.append(new_member(model))
        return made[-1]

    training = training_of(model, steps=1250, new_member=counted)
    base = Member(model, torch.optim.SGD(model.parameters(), lr=1.0), None)
    training.members = [base]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = combine("deni")
    method.prepare(training)
    method.before_step(training, step)
    assert training.members[0] is base
    assert training.members[1:] == made
    assert len(made) == 9
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters()), "the base has no noise"
    changes = []
    for member in made:
        own = dict(member.model.named_parameters())
        assert all(p is not q for p, q in zip(member.model.parameters(), model.parameters(), strict=True))
        same = {name for name, p in own.items() if torch.equal(p, start[name])}
        assert same == {name for name in start if not name.startswith("classifier.w")}
        change = (own["classifier.weight"] - start["classifier.weight"]).detach()
        changes.append(change / start["classifier.weight"].std())
    together = torch.stack(changes)
    assert float(together.std()) == pytest.approx(scale, rel=0.05)
    assert float(together.mean()) == pytest.approx(0.0, abs=scale * 0.08)
    assert not torch.equal(changes[0], changes[1])


def test_the_base_becomes_the_mean_and_keeps_its_optimizer() -> None:
    model = tiny_bert()
    training = training_of(model, steps=1250)
    base = Member(model, torch.optim.Adam(model.parameters(), lr=1e-3), None)
    training.members = [base]
    method = combine("deni", {"deni.members": 3})
    method.prepare(training)
    method.loss(training, base, batch_of()).backward()  # type: ignore[no-untyped-call]
    base.optimizer.step()
    moments = base.optimizer.state[model.classifier.weight]["exp_avg"].clone()
    method.before_step(training, 375)
    with torch.no_grad():
        for value, member in zip((1.0, 2.0, 6.0), training.members, strict=True):
            member.model.bert.pooler.dense.weight.fill_(value)
    mean = torch.stack([m.model.classifier.weight.detach() for m in training.members]).mean(0)
    members = list(training.members)
    method.before_step(training, 500)
    assert training.members == [base]
    assert base.model is model
    assert torch.equal(model.bert.pooler.dense.weight, torch.full((8, 8), 3.0))
    assert torch.allclose(model.classifier.weight, mean)
    assert torch.equal(base.optimizer.state[model.classifier.weight]["exp_avg"], moments)
    assert float(members[1].model.bert.pooler.dense.weight.detach()[0, 0]) == 2.0


def test_it_trains_ten_models_that_differ_and_follow_the_seed() -> None:
    def trained(seed: int) -> list[Tensor]:
        training = training_of(tiny_bert(), steps=10, noise_seed=seed)
        torch.manual_seed(0)
        run(combine("deni"), training, [batch_of(seed=i) for i in range(10)])
        return [member.model.classifier.weight.detach() for member in training.members]

    first, again, other = trained(0), trained(0), trained(1)
    assert len(first) == 10
    assert len({tuple(w.flatten().tolist()) for w in first}) == 10
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_under_lora_the_adapters_get_noise_and_the_frozen_weights_are_shared() -> None:
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False
    )
    wrapped: Any = peft.get_peft_model(tiny_bert(), config)
    fresh = frozenset(name for name, _ in wrapped.named_parameters() if ".classifier." in name)
    training = training_of(wrapped, fresh=fresh, peft=True, steps=1250)
    training.members = [new_member(wrapped)]
    method = combine("deni")
    method.prepare(training)
    method.before_step(training, 1125)
    own = dict(wrapped.named_parameters())
    for member in training.members[1:]:
        for name, p in member.model.named_parameters():
            if not p.requires_grad:
                assert p is own[name], name
            elif not name.endswith("bias"):
                assert not torch.equal(p, own[name]), name
    run(combine("deni"), training_of(wrapped, fresh=fresh, peft=True), [batch_of()] * 10)


def test_with_another_method_each_copy_is_whole() -> None:
    for other in ("mixout", "r3f", "neftune"):
        training = training_of(tiny_bert(), steps=10)
        run(combine(f"deni+{other}", {"deni.members": 3}), training, [batch_of(seed=i) for i in range(10)])
        assert len(training.members) == 3
        for member in training.members:
            logits = member.model.eval()(**{k: v for k, v in batch_of().items() if k != "labels"}).logits
            assert torch.isfinite(logits).all()


def test_a_schedule_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="nor end \\+ interval after final"):
        combine("deni", {"deni.interval": 0.5})
    with pytest.raises(UsageError, match="at least 2"):
        combine("deni", {"deni.members": 1})
    for other in ("swa", "weightnoise", "recadam", "r4f"):
        with pytest.raises(UsageError, match=f"deni trains several models, and {other} works on one"):
            combine(f"deni+{other}")


def test_a_member_as_a_checkpoint_operation_is_perturb_with_the_root_of_v(tmp_path: Path) -> None:
    """`--noise-std √v` and `--lambda √(12 v)` are the same Gaussian noise, of std √v · std(W)."""
    v = 0.15
    source = save(tmp_path / "in.safetensors", {"head": weights("F32", 5000)})
    written = []
    for option, value in (("--noise-std", math.sqrt(v)), ("--lambda", math.sqrt(12 * v))):
        out = tmp_path / f"out{option}.safetensors"
        arguments = ["perturb", source, "-o", out, "--noise", "gaussian", option, repr(value)]
        result = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
        assert result.exit_code == 0, result.output
        written.append(out)
    left, right = (load_file(out)["head"].astype(np.float64) for out in written)
    np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
    before = load_file(source)["head"].astype(np.float64)
    assert (left - before).std() / before.std(ddof=1) == pytest.approx(math.sqrt(v), rel=0.03)
    manifest = json.loads((tmp_path / "out--noise-std.safetensors.noisytune.json").read_text())
    (tensor,) = manifest["tensors"]
    assert tensor["noise_std"] == pytest.approx(math.sqrt(v) * tensor["std"], rel=1e-6)
    assert manifest["noise"]["lambda"] == pytest.approx(1.3416407864998738)
