"""Arguments of `perturb_` that make no sense: refused under their own names, before anything is changed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from noisytune_cli import perturb_
from noisytune_cli.errors import InputInvalid, Mismatch, UsageError
from noisytune_cli.records import Term

WRONG: list[dict[str, Any]] = [
    {"lam": float("nan")},
    {"lam": float("inf")},
    {"lam": "0.1"},
    {"lam": 10**400},
    {"seed": 2**64},
    {"seed": -1},
    {"seed": "1"},
    {"seed": 1.0},
    {"noise": "pink"},
    {"noise": np.array(["uniform", "gaussian"])},
    {"scope": "layer"},
    {"granularity": "row"},
    {"frozen": "skip"},
    {"fresh": True},
    {"include": 3},
    {"include": [None]},
    {"exclude": 3},
    {"fresh_names": 3},
    {"rules": "*=0.1"},
    {"rules": ["*"]},
    {"rules": {"*": "0.1"}},
    {"rules": {"*": float("nan")}},
    {"sigma": "0.1"},
    {"sigma": float("inf")},
    {"shrink": -0.1},
    {"shrink": 1.5},
    {"shrink": "half"},
    {"mix": []},
    {"mix": 3},
    {"mix": {"seed": 1, "sigma": 0.1}},
    {"mix": [3]},
    {"mix": [{"seed": 1}]},
    {"mix": [{"seed": 1, "lambda": 1, "sigma": 1}]},
    {"mix": [{"seed": 1, "sigma": 1, "weight": 1}]},
    {"mix": [{"seed": -1, "sigma": 1}]},
    {"mix": [{"seed": 1, "sigma": float("nan")}]},
    {"mix": [{"seed": 1, "sigma": 1}, {"seed": 2, "lambda": 1}]},
    {"mix": [Term(1, 0.1)]},
    {"scope": "absolute"},
    {"splits": "a=0:/2"},
    {"splits": 3},
    {"splits": None},
    {"splits": {"w": "0:/2"}},  # without granularity="matrix"
    {"splits": {"w": 3}},
    {"manifest": 3},
    {"manifest": {}},
    {"manifest": b"x"},
    {"config": 3},
    {"threads": 0},
    {"threads": -1},
    {"threads": 257},
    {"threads": 2.5},
    {"threads": "2"},
    {"names": 3},
]


TOGETHER: list[dict[str, Any]] = [
    {"lam": 0.1, "sigma": 0.1},
    {"lam": 0.15, "mix": [{"seed": 1, "sigma": 0.1}]},
    {"sigma": 0.1, "mix": [{"seed": 1, "sigma": 0.1}]},
    {"seed": 0, "mix": [{"seed": 1, "sigma": 0.1}]},
    {"rules": {"*": 0.1}, "mix": [{"seed": 1, "sigma": 0.1}]},
    {"scope": "matrix", "sigma": 0.1},
    {"scope": "absolute", "lam": 0.1},
    {"scope": "global", "mix": [{"seed": 1, "sigma": 0.1}]},
    {"scope": "absolute", "mix": [{"seed": 1, "lambda": 0.1}]},
]


@pytest.mark.parametrize("options", TOGETHER, ids=" ".join)
def test_arguments_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    tensors = {"w": torch.randn(3)}
    before = tensors["w"].clone()
    with pytest.raises(UsageError, match="^" + next(iter(options))):
        perturb_(tensors, **options)
    assert torch.equal(tensors["w"], before)


@pytest.mark.parametrize("options", WRONG, ids=[f"{k}={v!r}" for o in WRONG for k, v in o.items()])
def test_arguments_that_make_no_sense_are_refused_by_name(options: dict[str, Any]) -> None:
    (option,) = options
    tensors = {"w": torch.randn(3)}
    before = tensors["w"].clone()
    with pytest.raises(UsageError, match=rf"^{option}") as refused:
        perturb_(tensors, **options)
    assert "--" not in str(refused.value)  # the command line's options are not the caller's
    assert torch.equal(tensors["w"], before)


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="matches nothing"):
        perturb_({"w": torch.randn(3)}, include="none.*")


def test_numbers_of_any_kind_are_numbers() -> None:
    noised = []
    for lam, seed in [(0.5, 3), (np.float32(0.5), np.int64(3)), (Fraction(1, 2), np.uint8(3))]:
        tensors = {"w": torch.linspace(-1, 1, 50)}
        perturb_(tensors, lam, seed)
        noised.append(tensors["w"])
    assert torch.equal(noised[0], noised[1])
    assert torch.equal(noised[0], noised[2])


@pytest.mark.parametrize("model", [[torch.ones(3)], torch.ones(3), None, "bert"], ids=str)
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="neither a module nor a state dict"):
        perturb_(model)


@pytest.mark.parametrize("name", [3, None, "w\udc80"], ids=repr)
def test_names_that_are_no_text_are_refused(name: Any) -> None:
    with pytest.raises(InputInvalid, match="no tensor's name"):
        perturb_({name: torch.randn(3)})


@pytest.mark.parametrize("names", ["brt", {"zz": "y"}, "bert.encoder.w.x"], ids=str)
def test_names_that_fit_no_parameter_are_refused(names: Any) -> None:
    with pytest.raises(UsageError, match=r"changes no name.*bert\.encoder\.w"):
        perturb_({"bert.encoder.w": torch.randn(3)}, names=names)


def test_a_map_may_name_more_than_the_parameters() -> None:
    record = perturb_({"a": torch.randn(3), "b": torch.randn(3)}, names={"a": "x", "buffer": "y"})
    assert [r.step.stream for r in record.receipts] == ["x", "b"]


@pytest.mark.parametrize("given", [None, 3, "w\ud800"], ids=repr)
def test_a_function_must_give_names(given: Any) -> None:
    with pytest.raises(UsageError, match=r"gives .* for w"):
        perturb_({"w": torch.randn(3)}, names=lambda name: given)


def test_a_manifest_that_names_nothing_of_the_model_asks_for_names() -> None:
    record = perturb_({"encoder.w": torch.randn(3)})
    with pytest.raises(Mismatch, match=r"encoder\.w, and here bert\.encoder\.w\. Give names="):
        perturb_({"bert.encoder.w": torch.randn(3)}, manifest=record)
    perturb_({"bert.encoder.w": torch.randn(3)}, manifest=record, names="bert")


def test_advice_is_for_callers_not_for_the_command_line() -> None:
    linear = torch.nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(UsageError, match=r"fresh_names= leave parameters out") as refused:
        perturb_(linear, frozen="copy")
    assert "--" not in str(refused.value)
