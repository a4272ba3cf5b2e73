import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, weights

import noisytune_cli
from noisytune_cli.checkpoint.quantized import refuse_quantized, refuse_quantized_config
from noisytune_cli.commands.average import average
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.errors import InputInvalid
from noisytune_cli.records import NoiseSpec, TensorSpec


def specs(dtypes: dict[str, str]) -> list[TensorSpec]:
    return [TensorSpec(name, dtype, (8, 8), "model.safetensors", 0, 0) for name, dtype in dtypes.items()]


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ 4-bit"),
    ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
    ({"quantization_config": {"quant_method": "auto-round", "bits": 2}}, "AutoRound 2-bit"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "block fp8"),
    ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
    ({"quantization_config": {"quant_method": "newest"}}, "newest"),
    ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes 4-bit"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes 8-bit"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ({"quantization_config": {"sparsity": 0.5}}, "names no method"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"text_config": {"quantization_config": {"quant_method": "torchao"}}}, "torchao"),
    ({"quantization": {"bits": 4, "group_size": 32, "mode": "affine"}}, "MLX 4-bit"),
    ({"quantization_config": {"bits": 8, "group_size": 64}}, "MLX 8-bit"),
]


@pytest.mark.parametrize(("config", "method"), CONFIGS)
def test_the_config_names_the_method(config: dict[str, Any], method: str) -> None:
    with pytest.raises(InputInvalid, match=f"quantised: {method} |quantised: .*{method}") as raised:
        refuse_quantized_config(config, "ckpt")
    assert "full-precision" in raised.value.next_step
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": False,
                "load_in_8bit": False,
            }
        },
        {"quantization": "none", "text_config": {"hidden_size": 8}},
    ],
)
def test_a_config_without_quantisation_is_let_through(config: dict[str, Any] | None) -> None:
    refuse_quantized_config(config, "ckpt")
    refuse_quantized(specs({"a.weight": "BF16"}), config=config, path="ckpt")


TENSORS: list[tuple[dict[str, str], str]] = [
    ({"q.weight": "F8_E4M3", "q.weight_scale_inv": "F32"}, "block fp8"),
    ({"q.weight": "F8_E4M3", "q.activation_scale": "F32"}, "block fp8"),
    ({"q.weight": "F8_E4M3", "q.qscale_weight": "F32"}, "block fp8"),
    ({"q.weight": "U8", "q.weight_scale_inv": "F32"}, "block fp8"),
    ({"q.weight": "F8_E4M3", "q.weight_scale": "F32", "q.input_scale": "F32"}, "fp8 with weight scales"),
    ({"q.weight": "F8_E5M2"}, "float8"),
    ({"q.weight": "F8_E4M3", "k_proj.k_scale": "F32", "v_proj.v_scale": "F32"}, "float8"),
    ({"q.weight": "F4"}, "float4"),
    ({"q.weight": "F6_E2M3"}, "float6"),
    ({"q.weight": "FLOAT4_E2M1FN_X2"}, "float4"),
    ({"q.weight": "U8", "q.weight_scale": "F8_E4M3", "q.weight_scale_2": "F32"}, "NVFP4"),
    ({"q.weight": "I8", "q.weight_scale": "F32"}, "8-bit weights with scales"),
    ({"experts.gate_up_proj_blocks": "U8", "experts.gate_up_proj_scales": "U8"}, "MXFP4"),
    ({"q.qweight": "I32", "q.qzeros": "I32", "q.scales": "F16", "q.g_idx": "I32"}, "GPTQ"),
    ({"q.qweight": "I32", "q.qzeros": "I32", "q.scales": "F16"}, "AWQ or AutoRound"),
    ({"q.weight": "U8", "q.weight.absmax": "F32", "q.weight.quant_map": "F32"}, "bitsandbytes 4-bit"),
    ({"q.weight": "U8", "q.weight.nested_absmax": "F32"}, "bitsandbytes 4-bit"),
    ({"q.weight": "I8", "q.SCB": "F32", "q.weight_format": "U8"}, "bitsandbytes 8-bit"),
    ({"q.weight_packed": "I32", "q.weight_scale": "BF16", "q.weight_shape": "I64"}, "compressed-tensors"),
    ({"q.weight_packed": "U8", "q.weight_scale": "BF16", "q.weight_zero_point": "I8"}, "compressed-tensors"),
    ({"q.weight_qdata": "I8", "q.weight_scale_and_zero": "BF16"}, "torchao"),
    ({"q.weight:qdata": "I8", "q.weight:scale": "BF16"}, "torchao"),
    ({"q.weight": "I32", "q.scale_and_zero": "BF16"}, "torchao"),
    ({"q.W_q": "U8", "q.scale": "F16", "q.zero": "F16"}, "HQQ"),
    ({"q.weight": "U32", "q.scales": "BF16", "q.biases": "BF16"}, "MLX"),
    ({"q.weight._data": "I8", "q.weight._scale": "F32"}, "quanto"),
]


@pytest.mark.parametrize(("dtypes", "method"), TENSORS)
def test_the_tensors_name_the_method(dtypes: dict[str, str], method: str) -> None:
    plain = {"norm.weight": "BF16", "embed_tokens.weight": "BF16"}
    for order in (plain | dtypes, dtypes | plain):
        with pytest.raises(InputInvalid, match=f"quantised: {method}") as raised:
            refuse_quantized(specs(order), path="ckpt")
        assert raised.value.tensor in dtypes


@pytest.mark.parametrize(
    ("metadata", "method"),
    [
        ({"quant_method": "gptq"}, "GPTQ"),
        ({"_quantization_metadata": '{"layers": {}}'}, "_quantization_metadata"),
        ({"q.weight": '{"_type": "torchao.Int4Tensor"}'}, "torchao"),
    ],
)
def test_the_metadata_names_the_method(metadata: dict[str, str], method: str) -> None:
    with pytest.raises(InputInvalid, match=f"quantised: .*{method}"):
        refuse_quantized(specs({"a.weight": "F32"}), metadata=metadata, path="ckpt")


@pytest.mark.parametrize(
    "dtypes",
    [
        {"bn.num_batches_tracked": "I64", "bn.weight": "F32"},
        {"position_ids": "I64", "attn.bias": "U8", "mask": "BOOL"},
        {"positional_embedding.scale": "F32", "norm.scales": "F32", "q.biases": "F32"},
        {"q.weight": "BF16", "q.weight_scale": "F32", "q.input_scale": "F32"},
        {"q.weight": "BF16", "k_proj.k_scale": "F32", "v_proj.v_scale": "F32"},
        {"table.weight": "U8"},
        {"absmax": "F32", "codes.qweight": "F32", "codes.scales": "F32"},
        {"text_blocks": "U8"},
    ],
)
def test_a_plain_checkpoint_is_let_through(dtypes: dict[str, str]) -> None:
    metadata = {"format": "pt", "quantization": "none"}
    refuse_quantized(specs(dtypes), metadata=metadata, config={}, path="ckpt")


Layer = dict[str, tuple[str, tuple[int, ...]]]

#: What one layer of 64 inputs and 32 outputs holds, as the methods store it.
LAYERS: dict[str, Layer] = {
    "EXL2": {
        "q_weight": ("I32", (8, 32)),
        "q_scale": ("I32", (4, 4)),
        "q_scale_max": ("F16", (4,)),
        "q_groups": ("I16", (8,)),
        "q_invperm": ("I32", (64,)),
    },
    "EXL3": {"trellis": ("I16", (4, 2, 64)), "suh": ("F16", (64,)), "svh": ("F16", (32,))},
    "AQLM": {
        "codes": ("I8", (32, 8, 1)),
        "codebooks": ("F16", (1, 256, 1, 8)),
        "scales": ("F16", (32, 1, 1, 1)),
    },
    "QuIP#": {"Qidxs": ("I64", (32, 8)), "SU": ("F16", (64,)), "SV": ("F16", (32,)), "Wscale": ("F32", ())},
    "SVDQuant": {
        "qweight": ("I8", (32, 32)),
        "wscales": ("BF16", (1, 32)),
        "proj_down": ("BF16", (64, 16)),
        "proj_up": ("BF16", (32, 16)),
        "bias": ("BF16", (32,)),
    },
    "Marlin": {"B": ("I32", (4, 64)), "s": ("F16", (2, 32))},
    "QQQ": {"B": ("I32", (4, 64)), "s_channel": ("F32", (1, 32)), "s_group": ("F16", (2, 32))},
    "SpQR": {"dense_weights": ("I64", (128,)), "row_offsets": ("I32", (33,)), "col_vals": ("I32", (90,))},
    "VPTQ": {
        "indices": ("I16", (1, 32, 8)),
        "centroids.weight": ("F16", (1, 512)),
        "weight_scale": ("F16", (64,)),
    },
    "TensorRT-LLM": {"weight": ("I8", (64, 32)), "per_channel_scale": ("F16", (32,)), "bias": ("F16", (32,))},
    "packed bytes": {"packed": ("U8", (2048,)), "step": ("F32", (32,))},
    "compressed sparsity": {"compressed": ("BF16", (1024,)), "bitmask": ("U8", (32, 8))},
}

#: Layers with integers that are no codes.
PLAIN: dict[str, Layer] = {
    "batch norm": {
        "weight": ("F32", (32,)),
        "running_mean": ("F32", (32,)),
        "num_batches_tracked": ("I64", ()),
    },
    "relative positions": {"relative_position_index": ("I64", (64, 64)), "table": ("F32", (225, 4))},
    "relative positions of JAX": {
        "relative_position_index": ("I32", (64, 64)),
        "table": ("F32", (225, 4)),
    },
    "edges": {"edge_index": ("I64", (2, 90)), "edge_weight": ("F32", (90,)), "degree": ("F32", (90,))},
    "a mesh": {"faces": ("I32", (90, 3)), "vertices": ("F32", (50, 3))},
    "cells of a grid": {"coords": ("I64", (512, 3)), "numbers": ("I64", (512,)), "occs": ("F32", (512,))},
    "a mask beside a vector": {"mask": ("U8", (64, 64)), "scale": ("F32", (64,))},
    "a masked layer": {"weight": ("F32", (32, 64)), "mask": ("U8", (32, 64))},
    "a masked vector": {"weight": ("F32", (96,)), "mask": ("U8", (96,))},
    "a causal mask": {
        "bias": ("U8", (1, 1, 64, 64)),
        "masked_bias": ("F32", ()),
        "c_attn.weight": ("F32", (64, 64)),
    },
    "a mask alone": {"mask": ("U8", (1, 1, 64, 64)), "value": ("F32", ())},
    "positions": {
        "position_ids": ("I64", (2, 64)),
        "kinds": ("I64", (2, 64)),
        "word.weight": ("F32", (64, 8)),
    },
    "a table": {"table": ("I32", (64, 2))},
    "a confusion matrix": {"confmat": ("I64", (8, 8)), "weight": ("F32", (8,))},
    "a codebook": {"embed": ("F32", (8, 64)), "inited": ("U8", (1,)), "usage": ("I64", (8,))},
    "a hash": {"ids": ("I64", (64,)), "offsets": ("I64", (8,)), "lengths": ("I64", (8,))},
}


def layer(tensors: Layer) -> list[TensorSpec]:
    """A model in which such a layer lies between others."""
    whole = {
        "embed_tokens.weight": ("BF16", (64, 64)),
        **{f"layers.0.q.{name}": found for name, found in tensors.items()},
        "layers.0.norm.weight": ("BF16", (64,)),
    }
    return [
        TensorSpec(name, dtype, shape, "model.safetensors", 0, 0) for name, (dtype, shape) in whole.items()
    ]


@pytest.mark.parametrize("method", LAYERS)
def test_codes_in_place_of_a_matrix_are_known_whatever_their_names(method: str) -> None:
    for names in (LAYERS[method], {f"x{i}": found for i, found in enumerate(LAYERS[method].values())}):
        with pytest.raises(InputInvalid, match="cannot use a quantised checkpoint") as raised:
            refuse_quantized(layer(names), path="ckpt")
        assert (raised.value.tensor or "").startswith("layers.0.q.")


@pytest.mark.parametrize("kind", PLAIN)
def test_integers_that_are_no_codes(kind: str) -> None:
    refuse_quantized(layer(PLAIN[kind]), path="ckpt")


@pytest.mark.parametrize(("config", "method"), CONFIGS)
def test_plain_weights_belie_a_config(config: dict[str, Any], method: str) -> None:
    plain = specs({"q.weight": "BF16", "q.bias": "BF16", "norm.weight": "F32"})
    with pytest.raises(InputInvalid, match=f"{method}.*, but its weights are of full precision") as raised:
        refuse_quantized(plain, config=config, path="ckpt", are_all=True)
    assert re.match(
        r"Remove (quantization|quantization_config|compression_config) from", raised.value.next_step
    )
    with pytest.raises(InputInvalid, match=r"config\.json says so.*; if this is it, remove"):
        refuse_quantized(plain, config=config, path="ckpt")
    for more in ({"q.weight_scale": "BF16"}, {"table.codes": "I32"}, {"head.weight": "F8_E4M3"}):
        with pytest.raises(InputInvalid, match=r"config\.json says so.*; if this is it, remove"):
            refuse_quantized([*plain, *specs(more)], config=config, path="ckpt", are_all=True)


def test_a_method_that_packs_codes_into_floats_is_refused_by_its_config() -> None:
    config = {"quantization": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None}}
    plain = specs({"q.weight": "F16"})
    with pytest.raises(InputInvalid, match="TensorRT-LLM W4A16_AWQ") as raised:
        refuse_quantized(plain, config=config, path="ckpt", are_all=True)
    assert "remove" not in raised.value.next_step
    refuse_quantized(plain, config={"quantization": {"quant_algo": None}}, path="ckpt", are_all=True)


def test_a_left_over_quantization_config_is_named(tmp_path: Path) -> None:
    save(tmp_path / "m/model.safetensors", {"q.weight": weights("F32", 9, 4)})
    (tmp_path / "m/config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    for source in (tmp_path / "m", tmp_path / "m/model.safetensors"):
        with pytest.raises(InputInvalid, match="Remove quantization_config"):
            perturb(Request(str(source), NoiseSpec()), str(tmp_path / "out"))
        with pytest.raises(InputInvalid, match="Remove quantization_config"):
            average([str(source)] * 2, str(tmp_path / "out"))
    assert "of full precision" in (inspect(str(tmp_path / "m")).quantized or "")


DATA = Path(os.environ.get("NOISYTUNE_DATA") or Path(__file__).parents[3] / "shared" / "data") / "checkpoints"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no real checkpoints (NOISYTUNE_DATA)")


def read_header(path: Path) -> tuple[list[TensorSpec], dict[str, str]]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__", {})
    tensors = [TensorSpec(n, t["dtype"], tuple(t["shape"]), path.name, 0, 0) for n, t in header.items()]
    return tensors, metadata


@needs_data
def test_a_real_mlx_checkpoint_is_refused_by_config_and_by_tensors() -> None:
    folder = DATA / "qwen3-mlx-4bit-sharded"
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(InputInvalid, match="MLX 4-bit"):
        refuse_quantized_config(config, folder)
    tensors = [t for path in sorted(folder.glob("*.safetensors")) for t in read_header(path)[0]]
    with pytest.raises(InputInvalid, match="quantised: MLX"):
        refuse_quantized(tensors, path=folder)


@needs_data
def test_no_other_real_checkpoint_is_refused() -> None:
    files = [path for path in sorted(DATA.glob("*/*.safetensors")) if "mlx-4bit" not in str(path)]
    assert files
    for path in files:
        tensors, metadata = read_header(path)
        config = path.parent / "config.json"
        refuse_quantized(
            tensors,
            config=json.loads(config.read_text()) if config.exists() else None,
            metadata=metadata,
            path=path,
        )


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2"])
def test_a_dtype_that_only_torch_names_is_refused_in_memory(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rest = torch.randn(4, 4)
    tensors = {"q.weight": torch.zeros(4, 4, dtype=torch.uint8).view(getattr(torch, dtype)), "rest": rest}
    before = rest.clone()
    with pytest.raises(InputInvalid, match=f"quantised: {dtype[:6]}"):
        noisytune_cli.perturb_(tensors)
    assert torch.equal(rest, before)
