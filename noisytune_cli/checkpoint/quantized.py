"""Recognise a quantised checkpoint, name the method, and refuse it whole.

What is stored there as a weight are codes, on which noise means nothing, and noising only the norms and
embeddings that were left in floating point would be silent nonsense. The config says it best, then the
dtypes, then families of names with the dtypes that go with them, then `__metadata__`. An integer tensor
or a `scale` alone proves nothing: batch norms count batches, masks are bytes, and models have scales.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import InputInvalid
from noisytune_cli.records import TensorSpec

#: What `quantization_config.quant_method` says -> what people call it. Others are named as they stand.
_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "fbgemm_fp8": "fbgemm fp8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "NVIDIA modelopt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "quanto",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}

_CONFIG_KEYS = ("quantization_config", "compression_config")
_METADATA_KEYS = (
    "quant_method",
    "quantization",
    "quantization_config",
    "_quantization_metadata",
    "quantized",
)
_NOTHING = frozenset({"", "none", "null", "false", "{}", "[]", "0"})

_BYTES = frozenset({"U8", "I8"})
_INTEGERS = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


@dataclass(frozen=True, slots=True)
class QuantizedFamily:
    """Codes whose name ends in `codes`, stored as one of `dtypes`, beside one of `companions`.

    The companion is named by what replaces `codes` at the end of the name.
    """

    method: str
    codes: str
    dtypes: frozenset[str]
    companions: tuple[str, ...]


#: The tell-tale tensors; the first row that holds names the method.
_FAMILIES = (
    QuantizedFamily("compressed-tensors", "weight_packed", _INTEGERS, ("weight_scale", "weight_shape")),
    QuantizedFamily("GPTQ", "qweight", _INTEGERS, ("g_idx",)),
    QuantizedFamily("AWQ or AutoRound", "qweight", _INTEGERS, ("qzeros", "scales")),
    QuantizedFamily("MXFP4", "_blocks", _BYTES, ("_scales",)),
    QuantizedFamily("MLX", "weight", frozenset({"U32"}), ("scales", "biases")),
    QuantizedFamily("HQQ", "W_q", _INTEGERS, ("scale", "zero", "meta")),
    QuantizedFamily("bitsandbytes 4-bit", "weight", _INTEGERS, ("weight.absmax", "weight.quant_map")),
    QuantizedFamily(
        "bitsandbytes 4-bit", "weight", _INTEGERS, ("weight.nested_absmax", "absmax", "quant_map")
    ),
    QuantizedFamily("bitsandbytes 8-bit", "weight", _INTEGERS, ("SCB", "weight_format")),
    QuantizedFamily("NVFP4 (modelopt)", "weight", _BYTES, ("weight_scale_2",)),
    QuantizedFamily("block fp8", "weight", _BYTES, ("weight_scale_inv", "qscale_weight", "activation_scale")),
    QuantizedFamily(
        "8-bit weights with scales", "weight", _BYTES, ("weight_scale", "weight_scales", "input_scale")
    ),
    QuantizedFamily("quanto", "weight._data", _INTEGERS, ("weight._scale",)),
    QuantizedFamily("torchao", "qdata", _INTEGERS, ("scale", "scale_and_zero", "zero_point")),
    QuantizedFamily(
        "torchao", "weight", _INTEGERS, ("scale_and_zero", "weight_scale_and_zero", "scales_and_zeros")
    ),
)
_CODES = tuple({family.codes for family in _FAMILIES})

#: How the dtypes of 8, 6 and 4-bit floats begin: as safetensors spells them, and as torch does.
_SMALL_FLOATS = ("F8_", "F6_", "F4", "FLOAT8_", "FLOAT4_")

#: The same for weights whose dtype alone says that they are quantised; the method is in the companion.
_FLOAT8_COMPANIONS = (
    ("NVFP4 (modelopt)", "weight_scale_2"),
    ("block fp8", "weight_scale_inv"),
    ("block fp8", "activation_scale"),
    ("block fp8", "qscale_weight"),
    ("torchao", "scale_and_zero"),
    ("fp8 with weight scales (modelopt, fbgemm, compressed-tensors)", "weight_scale"),
)


def refuse_quantized(
    tensors: Sequence[TensorSpec],
    *,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    path: str | os.PathLike[str],
) -> None:
    """Raise InputInvalid, naming the method, if the checkpoint is quantised."""
    refuse_quantized_config(config, path)
    names = {tensor.name for tensor in tensors}
    for find in (_method_of_dtype, _method_of_family):
        for tensor in tensors:
            method = find(tensor, names)
            if method is not None:
                raise _refusal(method, f"{tensor.dtype} values", path, tensor.name)
    for key, value in (metadata or {}).items():
        if key in _METADATA_KEYS and value.strip().lower() not in _NOTHING:
            method = _METHODS.get(value.strip().lower(), "by a method not known here")
            raise _refusal(method, f"__metadata__ has {key}", path)
        if "torchao" in value:
            raise _refusal("torchao", f"__metadata__ has {key}", path)


def refuse_quantized_config(config: Mapping[str, Any] | None, path: str | os.PathLike[str]) -> None:
    """Raise InputInvalid if config.json alone says that the weights are quantised."""
    method = _method_of_config(config or {})
    if method is not None:
        raise _refusal(method, "config.json says so", path)


def _refusal(
    method: str, evidence: str, path: str | os.PathLike[str], tensor: str | None = None
) -> InputInvalid:
    return InputInvalid(
        "cannot use a quantised checkpoint",
        path=path,
        tensor=tensor,
        why=f"it is quantised: {method} ({evidence}); "
        "noise on codes, a mean of them, or either on what is left alone, means nothing",
        next_step="Use the full-precision checkpoint it was made from, then quantise the result",
    )


def _method_of_config(config: Mapping[str, Any]) -> str | None:
    """Name the method in the config or in a part of it (`text_config`, `vision_config`)."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _CONFIG_KEYS:
            section = part.get(key)
            if isinstance(section, Mapping) and section:
                method = _method_of_section(section)
                if method is not None:
                    return method
        mlx = part.get("quantization")
        if isinstance(mlx, Mapping) and "bits" in mlx and "group_size" in mlx:
            return f"MLX {mlx['bits']}-bit"
    return None


def _method_of_section(section: Mapping[str, Any]) -> str | None:
    said = section.get("quant_method")
    eight, four = section.get("load_in_8bit"), section.get("load_in_4bit")
    if said == "bitsandbytes" or (said is None and (eight is not None or four is not None)):
        # A bitsandbytes section with both switches off describes unquantised weights.
        if eight or four or (eight is None and four is None):
            return f"bitsandbytes{' 8-bit' if eight else ' 4-bit' if four else ''}"
        return None
    if said is None:
        if "bits" in section and "group_size" in section:
            return f"MLX {section['bits']}-bit"
        return str(section.get("quant_algo") or "a quantization_config that names no method")
    if said == "fp8" and section.get("weight_block_size"):
        return "block fp8"
    name = _METHODS.get(str(said).lower(), str(said))
    bits = section.get("bits")
    return f"{name} {bits}-bit" if isinstance(bits, int) else name


def _method_of_dtype(tensor: TensorSpec, names: set[str]) -> str | None:
    """Name the method of a tensor of 8, 6 or 4-bit floats."""
    if not tensor.dtype.startswith(_SMALL_FLOATS):
        return None
    module = tensor.name[: tensor.name.rfind(".") + 1]
    for method, companion in _FLOAT8_COMPANIONS:
        if module + companion in names:
            return method
    return "float" + tensor.dtype.removeprefix("FLOAT").removeprefix("F").split("_")[0]


def _method_of_family(tensor: TensorSpec, names: set[str]) -> str | None:
    """Name the method of a tensor that is the codes of one of `_FAMILIES`."""
    if tensor.dtype in FLOAT_DTYPES or not tensor.name.endswith(_CODES):
        return None
    for family in _FAMILIES:
        if tensor.dtype in family.dtypes and tensor.name.endswith(family.codes):
            stem = tensor.name.removesuffix(family.codes)
            if any(stem + companion in names for companion in family.companions):
                return family.method
    return None
