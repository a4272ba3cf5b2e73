"""fp8 checkpoints read as BF16 ones: the weights are torch's, and nothing of the codes is left."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import split
from runs import run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.engine.walk import Walk
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.noise import stream
from noisytune_cli.records import Conversion, NoiseSpec
from tests.commands.test_convert import tree

BF16 = Conversion(dequantized="BF16")
FP8 = torch.float8_e4m3fn


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw fp8 codes of every kind but NaN."""
    bits = torch.randint(0, 254, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    bits[bits == 127] = 1
    return bits.view(FP8)


def scales(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3 + 1e-5
    return drawn.to(dtype)


def dequantised(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Spread the scales over the weight, and round the product to BF16."""
    spread = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight.float() * spread[: weight.shape[0], : weight.shape[1]]).bfloat16()


TENSORS = {
    "a.weight": codes(300, 200),
    "a.weight_scale_inv": scales(3, 2),
    "b.weight": codes(256, 128, seed=1),
    "b.weight_scale_inv": scales(2, 1, seed=1, dtype=torch.bfloat16),
    "c.weight": codes(5, 1000, seed=2),
    "c.weight_scale_inv": scales(1, 8, seed=2),
    "d.weight": codes(40, 30, seed=3),
    "d.weight_scale": scales(seed=3),
    "d.input_scale": torch.tensor(0.5),
    "e.weight": codes(9, 7, seed=4),
    "e.weight_scale": scales(1, seed=4),
    "e.activation_scale": torch.tensor([0.25]),
    "norm.weight": torch.rand(30, generator=torch.Generator().manual_seed(9)).bfloat16(),
    "d.bias": torch.rand(40, generator=torch.Generator().manual_seed(8)),
}
EXPECTED = {
    "a.weight": dequantised(TENSORS["a.weight"], TENSORS["a.weight_scale_inv"], (128, 128)),
    "b.weight": dequantised(TENSORS["b.weight"], TENSORS["b.weight_scale_inv"], (128, 128)),
    "c.weight": dequantised(TENSORS["c.weight"], TENSORS["c.weight_scale_inv"], (128, 128)),
    "d.weight": (TENSORS["d.weight"].float() * TENSORS["d.weight_scale"]).bfloat16(),
    "e.weight": (TENSORS["e.weight"].float() * TENSORS["e.weight_scale"]).bfloat16(),
    "norm.weight": TENSORS["norm.weight"],
    "d.bias": TENSORS["d.bias"],
}
CONFIG = {
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "vocab_size": 9,
}


def base(root: Path, tensors: dict[str, torch.Tensor] = TENSORS, config: Any = CONFIG) -> Path:
    """A folder of two shards; a weight's scale may be in the other one."""
    folder = root / "base"
    folder.mkdir()
    shards = (dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2]))
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-0000{i}-of-00002.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def loaded(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_without_noise_the_weights_are_torchs(tmp_path: Path) -> None:
    run(base(tmp_path), tmp_path / "out", NoiseSpec(lam=0.0), conversion=BF16)
    found = loaded(tmp_path / "out")
    assert found.keys() == EXPECTED.keys()
    for name, value in EXPECTED.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [None, "F32"])
def test_std_and_noise_are_of_the_dequantised_values(
    dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base(tmp_path)
    result = run(folder, tmp_path / "out", conversion=Conversion(dtype=dtype, dequantized="BF16"))
    found = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        found |= split(path.read_bytes())[1]
    for receipt in result.manifest.receipts:
        tensor = receipt.step.tensor
        assert receipt.action == "perturb"
        value = EXPECTED[tensor.name].flatten()
        assert receipt.std == pytest.approx(float(value.double().std()), rel=1e-6)
        flat = value.view(torch.uint8).numpy().view({"BF16": np.uint16, "F32": np.float32}[tensor.dtype])
        c = stream.coefficients("uniform", 0, tensor.name, 0, flat.size)
        assert receipt.amplitude is not None
        amplitude = np.float32(receipt.amplitude)
        assert found[tensor.name] == stream.add_noise(flat, tensor.dtype, c, amplitude, dtype)[0].tobytes()
    assert verify(str(tmp_path / "out")).mismatches == ()
    assert verify(str(tmp_path / "out"), base=str(folder)).mismatches == ()
    monkeypatch.setattr("noisytune_cli.commands.replay.Walk", partial(Walk, tile_bytes=96))
    again = tmp_path / "again"
    replay(str(tmp_path / "out/noisytune.json"), str(again), base=str(folder), mmap=True, threads=3)
    assert tree(again) == tree(tmp_path / "out")


def test_tiles_and_threads_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base(tmp_path)
    run(folder, tmp_path / "out", conversion=BF16)
    monkeypatch.setattr("noisytune_cli.engine.walk._LARGEST_KEPT", 64)
    monkeypatch.setattr("noisytune_cli.commands.perturb.Walk", partial(Walk, tile_bytes=704))
    run(folder, tmp_path / "again", conversion=BF16, threads=3, mmap=True)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_config_index_and_what_is_left_out(tmp_path: Path) -> None:
    folder, out = base(tmp_path), tmp_path / "out"
    (folder / "hf_quant_config.json").write_text("{}")
    result = run(folder, out, conversion=BF16)
    assert json.loads((out / "config.json").read_text()) == {"torch_dtype": "bfloat16", "vocab_size": 9}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == EXPECTED.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in EXPECTED.values())
    assert not (out / "hf_quant_config.json").exists()
    assert dict(result.manifest.left_out) == {
        "hf_quant_config.json": "it describes quantised weights",
        "d.input_scale": "the activation scale of d.weight, now dequantised",
        "e.activation_scale": "the activation scale of e.weight, now dequantised",
    }
    manifest = json.loads((out / "noisytune.json").read_text())
    assert manifest["output"]["dequantized"] == "BF16"
    import jsonschema

    from tests.manifest.test_write import SCHEMA

    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_the_blocks_of_the_config_and_columns_of_one(tmp_path: Path) -> None:
    tensors = {
        "a.weight": codes(50, 21),
        "a.weight_scale_inv": scales(13, 7),
        "b.weight": codes(50, 1, seed=5),
        "b.weight_scale_inv": scales(13, 1, seed=5),
    }
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}}
    run(base(tmp_path, tensors, config), tmp_path / "out", NoiseSpec(lam=0.0), conversion=BF16)
    found = loaded(tmp_path / "out")
    for name in ("a", "b"):
        expected = dequantised(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"], (4, 3))
        assert torch.equal(found[f"{name}.weight"], expected)


def test_every_code_is_torchs(tmp_path: Path) -> None:
    from noisytune_cli.checkpoint.dequantize import _E4M3

    expected = torch.arange(256, dtype=torch.uint8).view(FP8).float().numpy()
    assert np.array_equal(_E4M3, expected, equal_nan=True)
    weight = torch.arange(256, dtype=torch.uint8).view(FP8)
    save_file({"w": weight, "w_scale": torch.ones(1)}, tmp_path / "in.safetensors")
    run(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        NoiseSpec(lam=0.0),
        conversion=BF16,
    )
    out = load_file(tmp_path / "out.safetensors")["w"]
    assert torch.equal(out.float().nan_to_num(9.0), weight.float().nan_to_num(9.0))
    assert verify(str(tmp_path / "out.safetensors"), base=str(tmp_path / "in.safetensors")).ok


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({"a.weight_scale_inv": scales(3, 3)}, CONFIG, r"its shape is \[3, 3\], not \[3, 2\]"),
        ({"a.weight_scale_inv": scales(3, 2).half()}, CONFIG, "its dtype is F16"),
        ({"a.weight_scale_inv": None}, CONFIG, "quantised: "),
        ({"d.weight_scale": scales(40, 1)}, CONFIG, "fp8 with weight scales"),
        ({"d.weight": codes(40, 30).view(torch.uint8).view(torch.float8_e5m2)}, CONFIG, "quantised: "),
        ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        (
            {},
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}},
            "no pair of sizes",
        ),
        ({"q.qweight": torch.zeros(4, dtype=torch.int32), "q.scales": torch.ones(2)}, CONFIG, "quantised: "),
    ],
)
def test_every_other_form_stays_refused(
    change: dict[str, torch.Tensor | None], config: Any, words: str, tmp_path: Path
) -> None:
    tensors = {name: value for name, value in {**TENSORS, **change}.items() if value is not None}
    if "q.qweight" in tensors:
        tensors["q.qzeros"] = torch.zeros(4, dtype=torch.int32)
    folder = base(tmp_path, tensors, config)
    with pytest.raises(InputInvalid, match=words):
        run(folder, conversion=BF16)
    assert not (tmp_path / "out").exists()


def test_nothing_to_dequantise_is_a_usage_error(tmp_path: Path) -> None:
    plain = {name: TENSORS[name] for name in ("norm.weight", "d.bias")}
    with pytest.raises(UsageError, match="no fp8 weight"):
        run(base(tmp_path, plain, {}), conversion=BF16)


def test_without_the_option_it_is_refused_as_before(tmp_path: Path) -> None:
    folder = base(tmp_path)
    with pytest.raises(InputInvalid, match="block fp8"):
        run(folder)
    planned = CliRunner().invoke(app, ["perturb", str(folder), "--dequantize", "bf16", "--dry-run"])
    assert planned.exit_code == 0
    assert "a.weight  BF16 300x200  perturb" in planned.stdout
    scales = [line for line in planned.stdout.splitlines() if "scale" in line]
    assert all("left out (the activation scale of" in line for line in scales)


def test_a_changed_code_or_scale_shows(tmp_path: Path) -> None:
    folder, out = base(tmp_path), tmp_path / "out"
    run(folder, out, conversion=BF16)
    changed = dict(TENSORS)
    changed["a.weight_scale_inv"] = TENSORS["a.weight_scale_inv"] * 2
    (tmp_path / "other").mkdir()
    other = base(tmp_path / "other", changed)
    found = verify(str(out), base=str(other)).mismatches
    assert [(d.tensor, "base" in d.what) for d in found] == [("a.weight", True)]


def test_transformers_loads_a_plain_bf16_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    tensors = {}
    for name, value in LlamaForCausalLM(config).bfloat16().state_dict().items():
        if name.endswith("_proj.weight"):
            tensors[name] = (value.float() * 1000).to(FP8)
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 1e-3)
        else:
            tensors[name] = value.contiguous()
    folder = base(tmp_path, tensors, {**config.to_dict(), "architectures": ["LlamaForCausalLM"], **CONFIG})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "vocab_size": 40}))
    run(folder, conversion=BF16)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert verify(str(tmp_path / "out"), base=str(folder)).ok
