"""Every command and every piece of Python of docs/recipes.md, run in order on small models."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import noisytune_cli
from noisytune_cli.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(console|python)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def models(folder: Path) -> Any:
    """A llama and an upcycled mixture of experts, whose experts are copies of one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).to(torch.bfloat16)
    llama.save_pretrained(folder / "llama")
    (folder / "model.safetensors").write_bytes((folder / "llama" / "model.safetensors").read_bytes())
    dense = {"w1": torch.randn(24, 16), "w2": torch.randn(16, 24)}
    (folder / "upcycled").mkdir()
    save_file(
        {
            "lm_head.weight": torch.randn(32, 16),
            **{f"layers.0.moe.experts.{i}.{n}.weight": t.clone() for i in range(3) for n, t in dense.items()},
            "layers.1.mlp.experts.gate_up_proj": torch.randn(16, 48).repeat(3, 1, 1),
        },
        folder / "upcycled" / "model.safetensors",
    )
    return llama


def test_every_recipe_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    model = models(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    target = {name: torch.randn_like(p) for name, p in before.items()}

    def evaluate(made: Any) -> float:
        """A reward that noise can raise: how little is missing to a target."""
        return -sum((p.float() - target[n].float()).square().sum().item() for n, p in made.named_parameters())

    names = {
        "noisytune_cli": noisytune_cli,
        "model": model,
        "evaluate": evaluate,
        "statistics": statistics,
        "json": json,
        "Path": Path,
    }
    ran = 0
    for kind, text in blocks():
        if kind == "python":
            exec(compile(text, "recipes.md", "exec"), names)
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            continue
        for line in re.findall(r"^\$ (.*)$", text, flags=re.MULTILINE):
            ran += 1
            if line.startswith("noisytune "):
                done = CliRunner().invoke(app, shlex.split(line)[1:])
                assert done.exit_code == 0, f"{line}\n{done.stderr}"
            else:
                subprocess.run(line, shell=True, check=True, timeout=60)
    assert ran == PAGE.count("\n$ ") > 10
    check_what_came_of_it(model, evaluate, names)


def check_what_came_of_it(model: Any, evaluate: Any, names: dict[str, Any]) -> None:
    assert len(names["best"]) == 5
    assert len(list(Path("candidates").iterdir())) == 30
    assert len(list(Path("pairs").iterdir())) == 8
    assert [row["lam"] for row in names["rows"][::3]] == [0.0, 0.03, 0.41, 0.54][: len(names["rows"][::3])]
    # The run that scores led is better than where it began, and the file of its seeds gives the same bits.
    start = evaluate(model)
    with noisytune_cli.noisy(model, mix=names["history"]):
        assert evaluate(model) > start
        made = load_file("llama-es/model.safetensors")
        held = dict(model.named_parameters())
        assert all(torch.equal(held[name], tensor) for name, tensor in made.items())
    apart = load_file("upcycled-apart/model.safetensors")
    first, second = (apart[f"layers.0.moe.experts.{i}.w1.weight"] for i in range(2))
    assert not torch.equal(first, second)
    stacked = apart["layers.1.mlp.experts.gate_up_proj"]
    assert not torch.equal(stacked[0], stacked[1])
    norms = load_file("llama-norms/model.safetensors")
    assert not torch.equal(norms["model.norm.weight"], held["model.norm.weight"].float())
    assert torch.equal(norms["lm_head.weight"], held["lm_head.weight"].float())
