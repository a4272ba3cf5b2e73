"""Noise of a given std, negative noise, mixtures and shrunk weights, from the command line to the bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.manifest.read import read_manifest
from noisytune_cli.noise import stream

SEED = 7


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "a.weight": torch.randn(64, 33),
        "a.bias": torch.ones(5),
        "a.half": (torch.randn(40, 9) * 3).to(torch.bfloat16),
        "a.small": torch.randn(12, 5).half(),
        "a.wide": torch.randn(8, 6, dtype=torch.float64),
        "a.scale": torch.tensor([2.0]),
        "a.zero": torch.zeros(7),
        "a.broken": torch.tensor([1.0, float("nan"), 3.0, 1e30]),
        "a.ids": torch.arange(6),
        "bn.running_mean": torch.randn(4),
        "bn.running_var": torch.rand(4),
        "bn.num_batches_tracked": torch.tensor(3),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    return path


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, result.stderr
    return result.stdout


def stored(tensor: torch.Tensor) -> tuple[NDArray[Any], str]:
    names = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
    dtype = names[tensor.dtype]
    flat = tensor.flatten()
    return (flat.view(torch.uint16) if dtype == "BF16" else flat).numpy(), dtype


def expected(name: str, distribution: str, terms: list[tuple[int, float]], kept: float = 1.0) -> bytes:
    """The formula, from amplitudes."""
    values, dtype = stored(tensors()[name])
    wide: Any = np.float64 if dtype == "F64" else np.float32
    x = stream.upcast(values, dtype)
    y = x if kept == 1.0 else wide(kept) * x
    total = None
    for seed, amplitude in terms:
        c = stream.coefficients(distribution, seed, name, 0, values.size).astype(wide)
        term = c * wide(np.float32(amplitude))
        total = term if total is None else total + term
    y = y if total is None else y + total
    return stream._round_to(y, dtype).tobytes()


def bytes_of(path: Path, name: str) -> bytes:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).flatten().view(torch.uint8).numpy().tobytes()


NOISED = ("a.weight", "a.bias", "a.half", "a.small", "a.wide", "a.scale", "a.zero")
KEPT = ("a.broken", "a.ids", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


def check_kept(source: Path, out: Path, names: tuple[str, ...] = KEPT) -> None:
    for name in names:
        assert bytes_of(out, name) == bytes_of(source, name), name


def check_again(source: Path, out: Path, tmp_path: Path) -> None:
    """The manifest is a recipe: verify, verify --base and replay agree with it."""
    run("verify", out)
    run("verify", out, "--base", source)
    again = tmp_path / "again.safetensors"
    run("replay", f"{out}.noisytune.json", "--base", source, "-o", again)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("options", "distribution", "factor"),
    [
        ([], "gaussian", 1.0),
        (["--noise", "uniform"], "uniform", 12**0.5),
        (["--noise", "gaussian"], "gaussian", 1.0),
    ],
)
@pytest.mark.parametrize("sigma", [0.001, -0.25])
def test_sigma(
    source: Path, tmp_path: Path, options: list[str], distribution: str, factor: float, sigma: float
) -> None:
    out = tmp_path / "out.safetensors"
    run("perturb", source, "--sigma", sigma, "--seed", SEED, *options, "-o", out)
    for name in NOISED:
        assert bytes_of(out, name) == expected(name, distribution, [(SEED, sigma * factor)]), name
    check_kept(source, out)
    document = json.loads(Path(f"{out}.noisytune.json").read_text())
    assert (document["noise"]["scope"], document["noise"]["sigma"]) == ("absolute", sigma)
    assert document["noise"]["lambda"] is None
    entries = {entry["name"]: entry for entry in document["tensors"]}
    assert all(entry["std"] is None and entry["lambda"] is None for entry in entries.values())
    assert entries["a.broken"]["reason"] == "non-finite"
    check_again(source, out, tmp_path)


def test_sigma_for_and_zero(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run("perturb", source, "--sigma", 0, "--sigma-for", "a.weight=0.5", "-o", out)
    assert bytes_of(out, "a.weight") == expected("a.weight", "gaussian", [(0, 0.5)])
    check_kept(source, out, (*KEPT, *(name for name in NOISED if name != "a.weight")))
    check_again(source, out, tmp_path)


def test_a_range_and_its_names(source: Path, tmp_path: Path) -> None:
    run("perturb", source, "--sigma", "0:0.3:0.1,-0.5", "-o", tmp_path / "o-{sigma}.safetensors")
    made = {path.name for path in tmp_path.glob("o-*.safetensors")}
    assert made == {f"o-{sigma}.safetensors" for sigma in ("-0.5", "0", "0.1", "0.2", "0.3")}
    assert (tmp_path / "o-0.safetensors").read_bytes() == source.read_bytes()
    for sigma in ("0.3", "-0.5"):
        made_of = bytes_of(tmp_path / f"o-{sigma}.safetensors", "a.wide")
        assert made_of == expected("a.wide", "gaussian", [(0, float(sigma))])


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_a_negative_lambda_is_the_negative_noise(source: Path, tmp_path: Path, noise: str) -> None:
    out = tmp_path / "o{lambda}.safetensors"
    run("perturb", source, "--lambda=-0.3,0.3", "--noise", noise, "-o", out)
    receipts = {}
    for lam in ("-0.3", "0.3"):
        made = Path(str(out).replace("{lambda}", lam))
        manifest = read_manifest(Path(f"{made}.noisytune.json")).manifest
        receipts[lam] = {r.step.tensor.name: r for r in manifest.receipts}
        receipt = receipts[lam]["a.weight"]
        assert receipt.amplitude is not None
        assert bytes_of(made, "a.weight") == expected("a.weight", noise, [(0, receipt.amplitude)])
        check_again(source, made, tmp_path)
        (tmp_path / "again.safetensors").unlink()
        Path(f"{tmp_path}/again.safetensors.noisytune.json").unlink()
    low, high = receipts["-0.3"]["a.weight"], receipts["0.3"]["a.weight"]
    assert low.amplitude == -high.amplitude
    assert (low.low, low.high, low.noise_std) == (high.low, high.high, high.noise_std)


@pytest.mark.parametrize("kept", [0.5, 0.0, 0.3])
def test_shrink(source: Path, tmp_path: Path, kept: float) -> None:
    out = tmp_path / "out.safetensors"
    run("perturb", source, "--lambda", 0.2, "--shrink", kept, "--seed", SEED, "-o", out)
    manifest = read_manifest(Path(f"{out}.noisytune.json")).manifest
    for receipt in manifest.receipts:
        name = receipt.step.tensor.name
        if name in KEPT:
            assert receipt.action == "copy", name
        elif name in ("a.scale", "a.bias", "a.zero"):
            assert receipt.action == "shrink", name
            assert bytes_of(out, name) == expected(name, "uniform", [], kept), name
        else:
            assert receipt.action == "perturb", name
            assert receipt.std is not None
            assert receipt.std == pytest.approx(tensors()[name].double().std().item(), rel=1e-6)
            assert bytes_of(out, name) == expected(name, "uniform", [(SEED, receipt.amplitude or 0)], kept)
    check_kept(source, out)
    check_again(source, out, tmp_path)


def test_what_is_left_out_is_not_shrunk_however_small(tmp_path: Path) -> None:
    source, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    held = {
        "a.weight": torch.randn(9, 4),
        "a.scale": torch.tensor([2.0]),
        "a.other": torch.tensor([3.0]),
        "bn.running_mean": torch.tensor([4.0]),
        "bn.running_var": torch.tensor([5.0]),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    save_file(held, source)
    run("perturb", source, "--shrink", 0.5, "--exclude", "a.scale", "-o", out)
    check_kept(source, out, ("a.scale", "bn.running_mean", "bn.running_var"))
    assert bytes_of(out, "a.other") == torch.tensor([1.5]).numpy().tobytes()
    check_again(source, out, tmp_path)
    included = tmp_path / "included.safetensors"
    run("perturb", source, "--shrink", 0.5, "--include", "a.weight", "-o", included)
    check_kept(source, included, ("a.scale", "a.other", "bn.running_mean"))


def test_shrinking_alone_and_nothing_at_all(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    run("perturb", source, "--lambda", 0, "--shrink", 0.5, "-o", out)
    for name in NOISED:
        assert bytes_of(out, name) == expected(name, "uniform", [], 0.5), name
    check_kept(source, out)
    check_again(source, out, tmp_path)
    same = tmp_path / "same.safetensors"
    run("perturb", source, "--lambda", 0, "--shrink", 1, "-o", same)
    assert same.read_bytes() == source.read_bytes()


def mixture(path: Path, kind: str, count: int = 5) -> list[tuple[int, float, float]]:
    lines = [(3 * i + 1, 0.01 * (i + 1), (-1) ** i * 0.5) for i in range(count)]
    path.write_text(
        "".join(json.dumps({"seed": seed, kind: s, "coefficient": c}) + "\n" for seed, s, c in lines)
    )
    return lines


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_a_mixture_of_sigmas(source: Path, tmp_path: Path, noise: str) -> None:
    lines = mixture(tmp_path / "mix.jsonl", "sigma")
    out = tmp_path / "out.safetensors"
    run("perturb", source, "--mix", tmp_path / "mix.jsonl", "--noise", noise, "-o", out)
    factor = 12**0.5 if noise == "uniform" else 1.0
    for name in NOISED:
        assert bytes_of(out, name) == expected(name, noise, [(s, c * a * factor) for s, a, c in lines])
    check_kept(source, out)
    check_again(source, out, tmp_path)
    document = json.loads(Path(f"{out}.noisytune.json").read_text())
    assert document["noise"]["seed"] is None
    assert [int(term["seed"]) for term in document["noise"]["mix"]] == [seed for seed, _, _ in lines]


def test_a_mixture_of_lambdas_and_shrunk(source: Path, tmp_path: Path) -> None:
    lines = mixture(tmp_path / "mix.jsonl", "lambda")
    out = tmp_path / "out.safetensors"
    run("perturb", source, "--mix", tmp_path / "mix.jsonl", "--shrink", 0.7, "-o", out)
    manifest = read_manifest(Path(f"{out}.noisytune.json")).manifest
    for receipt in manifest.receipts:
        name = receipt.step.tensor.name
        if receipt.action == "perturb":
            terms = [(seed, c * lam * (receipt.std or 0)) for seed, lam, c in lines]
            assert bytes_of(out, name) == expected(name, "uniform", terms, 0.7), name
    check_kept(source, out)
    check_again(source, out, tmp_path)


def test_a_mixture_in_the_home_directory_with_a_byte_order_mark(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture(tmp_path / "mix.jsonl", "sigma")
    run("perturb", source, "--mix", tmp_path / "mix.jsonl", "-o", tmp_path / "a.safetensors")
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "mix.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run("perturb", source, "--mix=~/marked.jsonl", "-o", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_all_forms_at_once_agree(source: Path, tmp_path: Path) -> None:
    """A recipe, a pickle, another device, threads and another dtype have the same noise."""
    mixture(tmp_path / "mix.jsonl", "sigma")
    options = ["--mix", tmp_path / "mix.jsonl", "--shrink", 0.9]
    run("perturb", source, *options, "-o", tmp_path / "a.safetensors")
    run("perturb", source, *options, "--device", "torch:cpu", "-o", tmp_path / "b.safetensors")
    run("perturb", source, *options, "--recipe-only", "-o", tmp_path / "c.json")
    run("replay", tmp_path / "c.json", "--base", source, "-o", tmp_path / "c.safetensors")
    torch.save(tensors(), tmp_path / "model.bin")
    run("perturb", tmp_path / "model.bin", *options, "-o", tmp_path / "d.bin")
    one = (tmp_path / "a.safetensors").read_bytes()
    assert (tmp_path / "b.safetensors").read_bytes() == one
    assert (tmp_path / "c.safetensors").read_bytes() == one
    pickled = torch.load(tmp_path / "d.bin", weights_only=True)
    for name in (*NOISED, *KEPT):
        held = pickled[name].flatten().view(torch.uint8).numpy().tobytes()
        assert held == bytes_of(tmp_path / "a.safetensors", name), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wild", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_what_is_not_finite_is_left_as_it_is_in_every_dtype(
    dtype: torch.dtype, wild: str, device: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    save_file({"w": torch.tensor([0.5, float(wild), 2.0], dtype=dtype), "v": torch.randn(9, 4)}, source)
    mixture(tmp_path / "mix.jsonl", "sigma")
    for options in (["--sigma", 0.1], ["--mix", tmp_path / "mix.jsonl"]):
        run("perturb", source, *options, "--device", device, "-o", out, "--overwrite")
        check_kept(source, out, ("w",))
        (entry,) = (r for r in read_manifest(Path(f"{out}.noisytune.json")).manifest.receipts if r.reason)
        assert (entry.step.tensor.name, entry.reason) == ("w", "non-finite")


def test_a_large_tensor_that_is_not_finite_is_left_as_it_is(tmp_path: Path) -> None:
    """It is larger than a tile, and its NaN comes late: what was written of it is written again."""
    values = torch.randn(1 << 20)
    values[-1] = float("inf")
    save_file({"w": values, "v": torch.randn(1 << 20)}, tmp_path / "m.safetensors")
    out = tmp_path / "out-{sigma}.safetensors"
    run("perturb", tmp_path / "m.safetensors", "--sigma", "0.1,0.2", "--threads", 2, "-o", out)
    for sigma in ("0.1", "0.2"):
        made = tmp_path / f"out-{sigma}.safetensors"
        assert bytes_of(made, "w") == values.view(torch.uint8).numpy().tobytes()
        assert bytes_of(made, "v") != bytes_of(tmp_path / "m.safetensors", "v")
        run("verify", made, "--base", tmp_path / "m.safetensors")


def test_the_largest_values_are_clamped_and_not_taken_for_infinite(tmp_path: Path) -> None:
    largest = torch.full((64,), torch.finfo(torch.float32).max)
    save_file({"w": largest}, tmp_path / "m.safetensors")
    run("perturb", tmp_path / "m.safetensors", "--sigma", 1e37, "-o", tmp_path / "out.safetensors")
    manifest = read_manifest(tmp_path / "out.safetensors.noisytune.json").manifest
    (receipt,) = manifest.receipts
    assert receipt.action == "perturb"
    assert 0 < receipt.clamped < 64


def test_dry_run_and_inspect_tell_it(source: Path) -> None:
    planned = run("perturb", source, "--sigma", "0.001,0.002", "--dry-run")
    assert "a.weight  F32 64x33  perturb σ=0.001,0.002; unless non-finite" in planned
    assert "output σ=0.002 seed=0" in planned
    told = json.loads(run("perturb", source, "--sigma", 0.001, "--dry-run", "--json"))
    assert told["noise"]["sigma"] == 0.001
    rows = json.loads(run("inspect", source, "--sigma", -0.25, "--format", "json", "-q"))
    reports = {row["name"]: row for row in rows["tensors"]}
    assert (rows["lambda"], rows["sigma"]) == (None, -0.25)
    for name in NOISED:
        assert (reports[name]["action"], reports[name]["noise_std"]) == ("perturb", 0.25), name
    assert reports["a.broken"]["reason"] == "non-finite"
    shrunk = run("perturb", source, "--shrink", 0.5, "--dry-run")
    assert "a.scale  F32 1  shrink (one-element)" in shrunk


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sigma", 0.1, "--lambda", 0.1], "--lambda and --sigma"),
        (["--sigma", 0.1, "--scope", "global"], "--scope and --sigma"),
        (["--sigma", 0.1, "--lambda-for", "a=0.1"], "--lambda-for and --sigma"),
        (["--sigma-for", "a=0.1"], "--sigma-for and --lambda"),
        (["--shrink", 1.5], "--shrink 1.5"),
        (["--shrink", "0.1,0.2"], "--shrink 0.1,0.2"),
        (["--sigma", "0:1:0"], "has no end"),
        (["--sigma", "1:0:0.1"], "has no end"),
        (["--sigma", "0:1:0.0001"], "has more than 1,000 numbers"),
        (["--sigma", "0:0.2:0.1,0.1"], "is in it twice"),
        (["--mix", "mix.jsonl", "--seed", 3], "--seed and --mix"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    mixture(Path("mix.jsonl"), "sigma")
    result = CliRunner().invoke(
        app,
        [
            "perturb",
            str(source),
            *map(str, options),
            "-o",
            str(tmp_path / ("o{sigma}.safetensors" if "--sigma" in options else "o.safetensors")),
        ],
    )
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no line"),
        ('{"seed": 1}', '"lambda" is not a finite number'),
        ('{"seed": -1, "sigma": 1}', '"seed" is not a whole number'),
        ('{"seed": 1, "sigma": 1, "sigma": 2}', "twice"),
        ('{"seed": 1, "sigma": NaN}', "line 1"),
        ('{"seed": 1, "sigma": 1, "lambda": 2}', "all noises of a mixture have the same"),
        ('{"seed": 1, "sigma": 1}\n\n{"seed": 2, "lambda": 1}', "line 3"),
        ('{"seed": 1, "sigma": 1, "weight": 2}', "it is no object of"),
        ("[1]", "it is no object of"),
    ],
)
def test_a_mixture_that_is_none_is_refused_by_its_line(
    source: Path, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "mix.jsonl").write_text(text)
    result = CliRunner().invoke(
        app,
        ["perturb", str(source), "--mix", str(tmp_path / "mix.jsonl"), "-o", str(tmp_path / "o.safetensors")],
    )
    assert result.exit_code == 3
    assert said in result.stderr


def test_noises_that_could_overflow_together_are_unrepresentable(tmp_path: Path) -> None:
    save_file({"w": torch.randn(8), "v": torch.randn(8)}, tmp_path / "m.safetensors")
    lines = [{"seed": seed, "sigma": 3e37} for seed in range(3)]
    (tmp_path / "mix.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = CliRunner().invoke(
        app,
        [
            "perturb",
            str(tmp_path / "m.safetensors"),
            "--mix",
            str(tmp_path / "mix.jsonl"),
            "-o",
            str(tmp_path / "o.safetensors"),
        ],
    )
    assert result.exit_code == 3
    assert "unrepresentable" in result.stderr
