"""perturb_ with granularity "matrix": the bits of the command line for every matrix."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

import noisytune_cli
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.engine import tiles
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.memory.sharded import LocalRun, LocalTensor
from noisytune_cli.memory.tensors import LiveTensor
from noisytune_cli.records import NoiseSpec, Part

C_ATTN = "h.0.attn.c_attn.weight"


def state(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    scale = torch.linspace(1, 5, 48)
    tensors = {
        C_ATTN: torch.randn(16, 48) * scale,
        "h.0.attn.c_attn.bias": torch.randn(48) * scale,
        "w": torch.randn(12, 7),
        "plain": torch.randn(9),
    }
    tensors["w"][0] = 2.0
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def on_disk(tensors: dict[str, torch.Tensor], folder: Path, noise: NoiseSpec) -> dict[str, Any]:
    safetensors.torch.save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    perturb(Request(str(folder / "a.safetensors"), noise), str(folder / "b.safetensors"))
    return safetensors.torch.load_file(folder / "b.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_dict_gets_the_bits_of_the_command_line(
    dtype: torch.dtype, noise: str, scope: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_LONG", 32)
    splits = {"w": "0:1,5,6"}
    spec = NoiseSpec(
        distribution=noise, scope=scope, granularity="matrix", splits=tuple(splits.items()), seed=9
    )
    expected = on_disk(state(dtype), tmp_path, spec)
    tensors = state(dtype)
    manifest = noisytune_cli.perturb_(
        tensors, seed=9, noise=noise, scope=scope, granularity="matrix", splits=splits
    )
    assert same(tensors, expected)
    parts = {receipt.step.tensor.name: receipt.parts for receipt in manifest.receipts}
    assert {name: [done.part.name for done in done_to] for name, done_to in parts.items()} == {
        C_ATTN: ["q", "k", "v"],
        "h.0.attn.c_attn.bias": ["q", "k", "v"],
        "w": ["0", "1", "2"],
        "plain": [],
    }
    assert parts["w"][0].reason == (None if scope == "global" else "constant")


def test_a_manifest_gives_each_matrix_its_noise_again(tmp_path: Path) -> None:
    spec = NoiseSpec(granularity="matrix", splits=(("w", "1:/7"),))
    expected = on_disk(state(), tmp_path, spec)
    tensors = state()
    noisytune_cli.perturb_(tensors, manifest=tmp_path / "b.safetensors.noisytune.json")
    assert same(tensors, expected)
    with pytest.raises(UsageError, match="manifest= and other noise"):
        noisytune_cli.perturb_(
            tensors, manifest=tmp_path / "b.safetensors.noisytune.json", splits={"w": "0:/2"}
        )


def test_values_that_are_not_contiguous_get_the_same(tmp_path: Path) -> None:
    spec = NoiseSpec(granularity="matrix")
    expected = on_disk(state(), tmp_path, spec)
    tensors = state()
    wide = torch.zeros(48, 16)
    wide.copy_(tensors[C_ATTN].T)
    tensors[C_ATTN] = wide.T
    assert not tensors[C_ATTN].is_contiguous()
    noisytune_cli.perturb_(tensors, granularity="matrix")
    assert same(tensors, expected)


def test_a_refusal_changes_nothing() -> None:
    tensors, before = state(), state()
    with pytest.raises(UsageError, match="is 12, and 5\\+6 is 11"):
        noisytune_cli.perturb_(tensors, granularity="matrix", splits=[("w", "0:5,6")])
    with pytest.raises(UsageError, match="granularity"):
        noisytune_cli.perturb_(tensors, granularity="rows")  # type: ignore[arg-type]
    assert same(tensors, before)


def test_the_config_of_a_model_in_a_wrapper_is_its_own() -> None:
    """As in DDP, or in somebody's own module: it tells how a fused tensor is divided."""

    def inner() -> Any:
        module: Any = torch.nn.Module()
        module.query_key_value = torch.nn.Linear(16, 48, bias=False)
        torch.nn.init.normal_(module.query_key_value.weight, generator=torch.Generator().manual_seed(1))
        settings = {"model_type": "gpt_neox", "num_attention_heads": 2, "hidden_size": 16}
        module.config = SimpleNamespace(to_dict=lambda: settings)
        return module

    plain, wrapper, two = inner(), torch.nn.Module(), torch.nn.Module()
    wrapper.net = torch.nn.Sequential(inner())
    two.a, two.b = inner(), inner()
    (receipt,) = noisytune_cli.perturb_(plain, granularity="matrix").receipts
    assert len(receipt.parts) == 3
    noisytune_cli.perturb_(wrapper, granularity="matrix", names="net.0")
    assert torch.equal(wrapper.net[0].query_key_value.weight, plain.query_key_value.weight)
    assert not any(receipt.parts for receipt in noisytune_cli.perturb_(two, granularity="matrix").receipts)


def test_a_sharded_tensor_that_holds_several_matrices_is_refused() -> None:
    from noisytune_cli.memory.plan import plan_parameters

    values = torch.randn(8, 48)
    held = LocalTensor(values, (LocalRun(0, 0, 384),), mesh=object(), shards=(0,))
    resident = LiveTensor((C_ATTN,), (C_ATTN,), torch.randn(16, 48), held)
    noise = NoiseSpec(granularity="matrix")
    with pytest.raises(InputInvalid, match="it is sharded, and holds several matrices"):
        plan_parameters([resident], noise, is_module=True, config=None, source="model")
    ((whole,), _) = plan_parameters(
        [resident],
        NoiseSpec(granularity="matrix", splits=((C_ATTN, "0:/1"),)),
        is_module=True,
        config=None,
        source="model",
    )
    assert not whole.is_divided


def test_what_stays_as_it_is_stays_whole() -> None:
    tensors, before = state(), state()
    manifest = noisytune_cli.perturb_(tensors, granularity="matrix", exclude="*c_attn*")
    assert torch.equal(tensors[C_ATTN], before[C_ATTN])
    found = {receipt.step.tensor.name: receipt for receipt in manifest.receipts}
    assert (found[C_ATTN].reason, found[C_ATTN].parts) == ("excluded", ())
    assert isinstance(found[C_ATTN].step.parts[0], Part)
