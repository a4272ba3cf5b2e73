"""The change of the norm and the norm of the change, by kind, on weights whose sums are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from noisytune_cli.study.training.drift import measure_drift, snapshot


class Small(nn.Module):
    """One parameter a kind, and one of none."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(2, 2)
        self.attention = nn.Linear(2, 1)
        self.mlp = nn.Linear(2, 1, bias=False)
        self.LayerNorm = nn.LayerNorm(2)
        self.classifier = nn.Linear(2, 1)
        self.gate = nn.Parameter(torch.ones(1))


def test_each_kind_is_measured_over_all_its_parameters() -> None:
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    start = snapshot(model)
    with torch.no_grad():
        model.word_embeddings.weight[0, 0] = 3.0  # |8 -> 9|, moved 1
        model.attention.weight[0, 0] = -2.0  # |4 -> 4|, moved 4
        model.attention.bias.fill_(1.0)  # a bias: |2 -> 1| of biases
        model.classifier.bias.fill_(4.0)  # the head's own: |6 -> 8|
        model.gate.fill_(5.0)
    drift = measure_drift(start, model)
    assert drift == {
        "head": {"norm_change": pytest.approx(2 / 6), "change_norm": pytest.approx(2 / 6)},
        "embeddings": {"norm_change": pytest.approx(1 / 8), "change_norm": pytest.approx(1 / 8)},
        "norm": {"norm_change": 0.0, "change_norm": 0.0},
        "bias": {"norm_change": pytest.approx(1 / 2), "change_norm": pytest.approx(1 / 2)},
        "attention": {"norm_change": 0.0, "change_norm": pytest.approx(1.0)},
        "mlp": {"norm_change": 0.0, "change_norm": 0.0},
    }


def test_a_kind_that_diverged_has_no_measure() -> None:
    model = Small()
    start = snapshot(model)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
        model.mlp.weight.fill_(float("inf"))
    assert {"head", "mlp"} & measure_drift(start, model).keys() == set()
    assert "attention" in measure_drift(start, model)


def test_a_parametrization_that_is_gone_at_the_end_is_no_change() -> None:
    model = Small()
    with torch.no_grad():
        model.classifier.weight.mul_(9)
    bare = snapshot(model)
    parametrizations.spectral_norm(model.classifier)
    state = {name: values.clone() for name, values in model.state_dict().items()}
    start = snapshot(model)
    assert start.keys() == bare.keys()
    assert not torch.allclose(start["classifier.weight"], bare["classifier.weight"])
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert model.classifier.parametrizations.training
    parametrize.remove_parametrizations(model.classifier, "weight")
    head = measure_drift(start, model)["head"]
    assert head == {"norm_change": pytest.approx(0, abs=1e-6), "change_norm": pytest.approx(0, abs=1e-6)}
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    assert measure_drift(start, model)["head"]["change_norm"] > 0.1


def test_a_snapshot_does_not_follow_the_model_and_zeros_are_left_out() -> None:
    model = nn.Sequential()
    model.register_parameter("bias", nn.Parameter(torch.zeros(3)))
    start = snapshot(model)
    with torch.no_grad():
        model.bias.fill_(1.0)  # type: ignore[operator]
    assert start["bias"].tolist() == [0.0, 0.0, 0.0]
    assert measure_drift(start, model) == {}
