"""What is left out of an output is named: after the summary, in a dry run's plan, and in JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoints import save, weights

from tests.cli.test_cli import invoke


@pytest.fixture
def with_twins(tmp_path: Path) -> Path:
    """A folder with files that are left out: one with a hostile name, and more than a line names."""
    root = save(tmp_path / "model/model.safetensors", {"w": weights("F32", 30)}).parent
    for name in ("a\x1b.gguf", "optimizer.pt", "pytorch_model.bin", "tf_model.h5"):
        (root / name).touch()
    os.mkfifo(root / "fifo")
    return root


LEFT_OUT = {
    "a\x1b.gguf": "the weights in another format (GGUF)",
    "fifo": "a FIFO",
    "optimizer.pt": "optimizer and trainer state",
    "pytorch_model.bin": "the weights in another format (PyTorch)",
    "tf_model.h5": "the weights in another format (TensorFlow)",
}


def test_files_that_are_left_out_are_named(with_twins: Path, tmp_path: Path) -> None:
    told = (
        "left out: a\\x1b.gguf (the weights in another format (GGUF)), fifo (a FIFO), "
        "optimizer.pt (optimizer and trainer state) and 2 more"
    )
    result = invoke("perturb", with_twins, "-o", tmp_path / "out", "--json")
    assert result.stderr.splitlines()[1:] == [told]
    assert {one["name"]: one["why"] for one in json.loads(result.stdout)["left_out"]} == LEFT_OUT
    result = invoke("perturb", with_twins, "-o", f"{tmp_path}/s{{seed}}", "--seed", "0-1")
    assert result.stderr.splitlines().count(told) == 1
    result = invoke("average", with_twins, with_twins, "-o", tmp_path / "mean", "--json")
    assert result.stderr.splitlines()[1:] == [told]
    assert {one["name"]: one["why"] for one in json.loads(result.stdout)["left_out"]} == LEFT_OUT
    assert invoke("perturb", with_twins, "-o", tmp_path / "quiet", "-q").stderr == ""
    recipe = invoke("perturb", with_twins, "--recipe-only", "-o", tmp_path / "r.json")
    assert "left out" not in recipe.stderr


def test_a_dry_run_names_what_is_left_out(with_twins: Path) -> None:
    result = invoke("perturb", with_twins, "--dry-run")
    assert result.stdout.splitlines()[1:] == [
        f"{name.replace(chr(27), chr(92) + 'x1b')}  left out ({why})" for name, why in LEFT_OUT.items()
    ]
    document = json.loads(invoke("perturb", with_twins, "--dry-run", "--json").stdout)
    assert {one["name"]: one["why"] for one in document["left_out"]} == LEFT_OUT
