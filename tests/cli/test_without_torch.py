"""Without torch: what does not need it works, and what does says so on one line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from checkpoints import save, weights
from pickles import torch_bytes
from without import run_without

_NEEDED = "this needs torch: it is not installed. Install it: pip install torch."


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "in.safetensors", {"w": weights("F32", 30, 10), "v": weights("BF16", 9, 9)})


def without_torch(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (folder := tmp_path / "site").mkdir(exist_ok=True)
    return run_without(("torch", "triton"), folder, *arguments)


def noisytune(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return without_torch(tmp_path, "-m", "noisytune_cli", *arguments)


def test_torch_is_hidden(tmp_path: Path) -> None:
    result = without_torch(tmp_path, "-c", "import torch")
    assert "No module named 'torch'" in result.stderr


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_every_verb_works_on_the_cpu(source: Path, tmp_path: Path, form: str) -> None:
    if form != "safetensors":
        source = tmp_path / "in.bin"
        source.write_bytes(torch_bytes({"w": weights("F32", 30, 10)}, zipped=form == "zip"))
    noised, second, rebuilt, mean = (tmp_path / f"{name}{source.suffix}" for name in "abcd")
    for command in (
        ["perturb", source, "-o", noised],
        ["perturb", source, "--noise", "gaussian", "--seed", "1", "-o", second],
        ["inspect", noised],
        ["verify", noised, "--base", source],
        ["replay", noised, "--base", source, "-o", rebuilt],
        ["average", noised, second, "-o", mean],
    ):
        result = noisytune(tmp_path, *command)
        assert result.returncode == 0, result.stderr
    assert rebuilt.read_bytes() == noised.read_bytes()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_gpu_needs_it(source: Path, tmp_path: Path, device: str) -> None:
    out = tmp_path / "out.safetensors"
    result = noisytune(tmp_path, "perturb", source, "--device", device, "-o", out)
    assert (result.returncode, result.stdout) == (6, "")
    assert result.stderr == f"noisytune: error: {_NEEDED}\n"
    assert not out.exists()


def test_a_study_needs_it(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")
    data = (
        "--train",
        tmp_path / "rows.csv",
        "--dev",
        tmp_path / "rows.csv",
        "--text",
        "text",
        "--label",
        "label",
    )
    (tmp_path / "model").mkdir()
    result = noisytune(tmp_path, "study", tmp_path / "model", *data, "-o", tmp_path / "out")
    assert result.returncode == 6
    assert len(result.stderr.splitlines()) == 1
    assert "not installed: torch" in result.stderr
    assert "pip install '.[study]'" in result.stderr


@pytest.mark.parametrize("name", ["perturb_", "noisy_from_pretrained", "NoisyTuneCallback"])
def test_the_python_names_say_that_they_need_it(tmp_path: Path, name: str) -> None:
    result = without_torch(tmp_path, "-c", f"from noisytune_cli import {name}")
    assert result.stderr.splitlines()[-1] == f"noisytune_cli.errors.PackageMissing: {_NEEDED}"
    caught = f"try:\n  from noisytune_cli import {name}\nexcept ImportError as e: print(e)"
    assert without_torch(tmp_path, "-c", caught).stdout == f"{_NEEDED}\n"


def test_a_module_of_ours_that_is_missing_stays_a_bug(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['noisytune_cli.commands.inspect'] = None\n"
        "from noisytune_cli.__main__ import main; main()"
    )
    result = without_torch(tmp_path, "-c", script, "inspect", source)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
