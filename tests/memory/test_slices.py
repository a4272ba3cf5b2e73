"""The noise of slices of named tensors: fused and split weights get the bits of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from noisytune_cli import add_noise_, perturb_
from noisytune_cli.cli.app import app
from noisytune_cli.errors import InputInvalid, UsageError

PREFIX = "model.layers.0.self_attn."


def perturbed(tensors: dict[str, torch.Tensor], folder: Path, *options: str) -> dict[str, torch.Tensor]:
    save_file(tensors, folder / "a.safetensors")
    command = ["perturb", str(folder / "a.safetensors"), "-o", str(folder / "b.safetensors"), *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    return load_file(folder / "b.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fused_qkv_on_two_ranks_has_the_bits_of_q_k_and_v(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = {"q_proj": 16, "k_proj": 6, "v_proj": 6}
    whole = {f"{PREFIX}{n}.weight": torch.randn(size, 10).to(dtype) for n, size in rows.items()}
    expected = perturbed(whole, tmp_path, "--sigma", "0.01", "--seed", "7")
    for rank in range(2):
        parts = {name: t.chunk(2)[rank] for name, t in whole.items()}
        fused = torch.cat(list(parts.values()))
        at = 0
        for name, part in parts.items():
            view = fused[at : at + len(part)]
            shape = tuple(whole[name].shape)
            same = add_noise_(view, name=name, seed=7, sigma=0.01, shape=shape, offset=rank * len(part))
            assert same is view
            at += len(part)
        assert torch.equal(fused, torch.cat([expected[name].chunk(2)[rank] for name in parts]))


@pytest.mark.parametrize(
    ("place", "offset"),
    [
        ((slice(2, 7),), 2),
        ((slice(0, 9), slice(3, 5)), (0, 3)),
        ((slice(4, 5), slice(1, 8), slice(2, 3)), [4, 1, 2]),
        ((slice(0, 9),), 0),
        ((slice(3, 3),), np.int64(3)),
        ((slice(2, 7),), torch.tensor(2)),
        ((slice(4, 9), slice(3, 5)), np.array([4, 3])),
        ((slice(4, 9), slice(3, 5)), torch.tensor([4, 3])),
    ],
    ids=str,
)
def test_any_slice_of_any_dimension(place: tuple[slice, ...], offset: Any) -> None:
    values = torch.randn(9, 8, 5)
    mix = [{"seed": 1, "sigma": 0.1}, {"seed": 2, "sigma": 0.2, "coefficient": -1}]
    for options in ({"sigma": -0.1, "noise": "uniform", "seed": 5}, {"mix": mix, "shrink": 0.5}):
        expected = {"w": values.clone()}
        perturb_(expected, **options)
        for contiguous in (True, False):
            piece = values.clone()[place]
            piece = piece.contiguous() if contiguous else piece
            add_noise_(piece, name="w", shape=[9, 8, 5], offset=offset, **options)
            assert torch.equal(piece, expected["w"][place])


def test_a_whole_tensor_and_a_scalar_need_no_place() -> None:
    tensors = {"w": torch.randn(4, 4), "scale": torch.tensor(2.0)}
    expected = {name: t.clone() for name, t in tensors.items()}
    perturb_(expected, sigma=0.5)
    for name, tensor in tensors.items():
        assert torch.equal(add_noise_(tensor, name=name, sigma=0.5), expected[name])


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (4, 3), "offset": 2},
        {"shape": (4, 3), "offset": (0, 1)},
        {"shape": (4, 3), "offset": -1},
        {"shape": (4,)},
        {"shape": (4, 3), "offset": (0, 0, 0)},
        {"shape": (4, 3), "offset": 0.5},
        {"shape": (4, 3), "offset": None},
        {"shape": (4, 3), "offset": np.array([2, 0])},
        {"shape": (4, 3), "offset": np.array([0.0, 0.0])},
        {"shape": "43"},
        {"offset": 1},
        {"sigma": None},
        {"sigma": None, "mix": [{"seed": 1, "lambda": 1}]},
        {"seed": -1},
    ],
    ids=str,
)
def test_what_is_no_slice_or_no_noise_is_refused(options: dict[str, Any]) -> None:
    values = torch.randn(3, 3)
    before = values.clone()
    with pytest.raises(UsageError):
        add_noise_(values, name="w", **{"sigma": 0.1, **options})
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    "values", [torch.arange(4), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])], ids=str
)
def test_what_takes_no_noise_is_refused(values: torch.Tensor) -> None:
    before = values.clone()
    with pytest.raises(InputInvalid, match="Leave it out"):
        add_noise_(values, name="w", sigma=0.1)
    assert torch.equal(values.isfinite(), before.isfinite())
    assert values[0] == before[0]
