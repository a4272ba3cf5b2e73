"""`perturb_` with σ, a share that is kept, mixtures and strengths below 0: the bits of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import noisytune_cli
from noisytune_cli.cli.app import app
from noisytune_cli.errors import UsageError
from noisytune_cli.manifest.read import read_manifest
from noisytune_cli.memory import in_place
from noisytune_cli.noise.devices import cuda
from noisytune_cli.records import Manifest, Term

SIGMAS = [{"seed": 5, "sigma": 0.25}, {"seed": 2**64 - 1, "sigma": 0.5, "coefficient": -0.3}]
LAMBDAS = [{"seed": 5, "lambda": 0.25}, {"seed": 6, "lambda": 0.5, "coefficient": -0.3}]

#: The options here, and those of the command line; `mix` is written to the file MIX.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sigma": ({"sigma": 0.01, "seed": 7}, ["--sigma", "0.01", "--seed", "7"]),
    "uniform": ({"sigma": -0.01, "noise": "uniform"}, ["--sigma=-0.01", "--noise", "uniform"]),
    "rules": (
        {"sigma": 0, "rules": {"w*": 0.5}, "shrink": 0.5},
        ["--sigma", "0", "--sigma-for", "w*=0.5", "--shrink", "0.5"],
    ),
    "negative": ({"lam": -0.3}, ["--lambda=-0.3"]),
    "shrink": ({"lam": 0.2, "shrink": 0.4, "seed": 3}, ["--lambda", "0.2", "--shrink", "0.4", "--seed", "3"]),
    "global": (
        {"scope": "global", "shrink": 0.4, "rules": {"w": 0}},
        ["--scope", "global", "--shrink", "0.4", "--lambda-for", "w=0"],
    ),
    "nothing kept": ({"lam": 0, "shrink": 0}, ["--lambda", "0", "--shrink", "0"]),
    "mix of sigmas": ({"mix": SIGMAS, "shrink": 0.9}, ["--mix", "MIX", "--shrink", "0.9"]),
    "mix of lambdas": ({"mix": LAMBDAS, "noise": "gaussian"}, ["--mix", "MIX", "--noise", "gaussian"]),
    "parts": (
        {"lam": 0.2, "shrink": 0.5, "granularity": "matrix", "splits": {"w": "0:/2"}},
        ["--lambda", "0.2", "--shrink", "0.5", "--granularity", "matrix", "--split", "w=0:/2"],
    ),
}


def tensors() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "w": torch.randn(70, 30),
        "w.half": torch.randn(41, 7).to(torch.bfloat16),
        "short": torch.randn(33).half(),
        "wide": torch.randn(5, 9, dtype=torch.float64),
        "norm.running_mean": torch.randn(30),
        "norm.running_var": torch.rand(30),
        "norm.num_batches_tracked": torch.tensor(3),
        "constant": torch.full((5, 5), 0.1),
        "logit_scale": torch.tensor(4.6),
        "broken": torch.tensor([1.0, float("nan"), 2.0]),
        "endless": torch.tensor([1.0, float("inf"), 2.0], dtype=torch.float16),
        "empty": torch.empty(0, 3),
        "count": torch.arange(5),
        "near": torch.tensor([65504.0, -65504.0] * 9, dtype=torch.float16),
    }


def bits(tensor: Any) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def on_disk(folder: Path, options: dict[str, Any], arguments: list[str]) -> tuple[dict[str, Any], Manifest]:
    """What the command line makes of the tensors."""
    (folder / "mix.jsonl").write_text("\n".join(json.dumps(term) for term in options.get("mix", [])))
    safetensors.torch.save_file(tensors(), folder / "a.safetensors")
    arguments = [str(folder / "mix.jsonl") if one == "MIX" else one for one in arguments]
    command = ["perturb", str(folder / "a.safetensors"), "-o", str(folder / "b.safetensors"), *arguments]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    manifest = read_manifest(folder / "b.safetensors.noisytune.json").manifest
    return safetensors.torch.load_file(folder / "b.safetensors"), manifest


@pytest.mark.parametrize(("options", "arguments"), CASES.values(), ids=CASES)
def test_every_noise_has_the_bits_of_the_command_line(
    options: dict[str, Any], arguments: list[str], tmp_path: Path
) -> None:
    expected, manifest = on_disk(tmp_path, options, arguments)
    here = tensors()
    record = noisytune_cli.perturb_(here, **options)
    assert {n: bits(t) for n, t in here.items()} == {n: bits(t) for n, t in expected.items()}
    receipts = {r.step.tensor.name: r for r in record.receipts}
    for one in manifest.receipts:
        mine = receipts[one.step.tensor.name]
        for key in ("action", "reason", "lam", "std", "amplitude", "low", "high", "unchanged", "clamped"):
            assert getattr(mine, key) == getattr(one, key), (one.step.tensor.name, key)
    assert record.noise == manifest.noise
    again = tensors()
    noisytune_cli.perturb_(again, manifest=record)
    assert {n: bits(t) for n, t in again.items()} == {n: bits(t) for n, t in here.items()}


@pytest.mark.parametrize("name", ["sigma", "mix of sigmas", "mix of lambdas", "shrink"])
def test_a_devices_operations_have_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, _ = CASES[name]
    expected, here = tensors(), tensors()
    noisytune_cli.perturb_(expected, **options)
    monkeypatch.setattr(in_place, "_is_exact_device", lambda name: True)
    for proof in ("adds_exactly", "sums_exactly"):
        monkeypatch.setattr(cuda, proof, lambda *kind: False)
    noisytune_cli.perturb_(here, **options)
    assert {n: bits(t) for n, t in here.items()} == {n: bits(t) for n, t in expected.items()}


def test_a_mixture_is_a_file_dictionaries_or_records(tmp_path: Path) -> None:
    path = tmp_path / "mix.jsonl"
    path.write_text("\n".join(map(json.dumps, SIGMAS)))
    records = [Term(5, 0.25), Term(2**64 - 1, 0.5, -0.3)]
    made = []
    for options in (
        {"mix": SIGMAS},
        {"mix": path},
        {"mix": str(path)},
        {"mix": records, "scope": "absolute"},
    ):
        here = tensors()
        record = noisytune_cli.perturb_(here, **options)
        assert record.noise.mix == tuple(records)
        assert record.noise.scope == "absolute"
        made.append({name: bits(t) for name, t in here.items()})
    assert made == [made[0]] * 4


def test_layouts_ties_and_frozen_parameters() -> None:
    table = torch.randn(20, 4)
    expected = {"model.embed_tokens.weight": table.clone(), "w": table.clone()}
    noisytune_cli.perturb_(expected, sigma=0.1, shrink=0.5)
    turned = table.t().contiguous().t()
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, False), "b": torch.nn.Linear(3, 3, False)})
    module["a"].weight.requires_grad_(False)
    before = bits(module["a"].weight)
    tied = {"model.embed_tokens.weight": table, "lm_head.weight": table, "w": turned}
    noisytune_cli.perturb_(tied, sigma=0.1, shrink=0.5)
    assert {name: bits(tied[name]) for name in expected} == {name: bits(t) for name, t in expected.items()}
    record = noisytune_cli.perturb_(module, lam=0, shrink=0.5, frozen="copy")
    assert bits(module["a"].weight) == before
    assert [r.action for r in record.receipts] == ["copy", "shrink"]


def test_a_seed_of_an_earlier_mixture_is_refused() -> None:
    model = torch.nn.Linear(9, 5)
    noisytune_cli.perturb_(model, mix=[{"seed": 3, "sigma": 0.1}, {"seed": 4, "sigma": 0.1}])
    with pytest.raises(UsageError, match="the noise of seed 4"):
        noisytune_cli.perturb_(model, sigma=0.1, seed=4)
    noisytune_cli.perturb_(model, sigma=0.1, seed=5)


@pytest.mark.parametrize("options", [{"sigma": 0.1}, {"scope": "global"}], ids=["sigma", "global"])
@pytest.mark.parametrize("names", [("n.mean", "n.std"), ("n.min_val", "n.max_val")])
def test_statistics_of_one_value_without_a_dimension_are_told_by_it(
    names: tuple[str, str], options: dict[str, Any]
) -> None:
    state = {names[0]: torch.tensor(0.1), names[1]: torch.tensor(0.5), "fc.weight": torch.randn(4, 4)}
    before = torch.stack([state[name] for name in names])
    record = noisytune_cli.perturb_(state, **options)
    assert [r.reason for r in record.receipts] == ["buffer", "buffer", None]
    assert torch.equal(torch.stack([state[name] for name in names]), before)
    noisytune_cli.Population(state).set(**options)
    assert torch.equal(torch.stack([state[name] for name in names]), before)
