"""Recognise a quantised checkpoint, name the method, and refuse it whole.

What is stored there as a weight are codes, on which noise means nothing, and noising only the norms and
embeddings that were left in floating point would be silent nonsense. The config names the method best, then
the dtypes, then families of names with the dtypes that go with them, then `__metadata__`. Of methods that
nobody has heard of yet the structure tells: a layer that has integers where others have their matrix. An
integer tensor or a `scale` alone proves nothing: batch norms count batches, masks are bytes, and models have
scales. Nor does a config: it may be what is left of a method that the weights were freed from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from noisytune_cli.checkpoint.composition import Model, within
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


class QuantizedFamily(NamedTuple):
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

#: What names have in them of tensors that belong to quantised weights, or to such as only act as if.
_SCALES = ("scale", "zero", "quant", "absmax")

#: What integers are called that point at something, or hide it: JAX has no other than those of 32 bits.
_NO_CODES = re.compile(r"(?:^|[._])(?:index|ids|edges|faces|mask)$")

#: The most numbers that a point, or a cell of a grid, has.
_AXES = 4

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
    are_all: bool = False,
) -> None:
    """Raise InputInvalid, naming the method, if the checkpoint is quantised.

    `are_all` says that `tensors` are all that is stored, so that they may belie the config.
    """
    claim = _claim_of(config or {})
    if claim is not None and are_all and claim.may_be_left_over and _are_plain(tensors):
        raise InputInvalid(
            "cannot use a checkpoint that calls itself quantised",
            path=path,
            why=f"config.json says that it is: {claim.method}, but its weights are of full precision",
            next_step=f"Remove {claim.key} from config.json (in a copy), and it can be used",
        )
    if claim is not None:
        raise claim.refusal(path)
    names = {tensor.name for tensor in tensors}
    for find in (_method_of_dtype, _method_of_family):
        for tensor in tensors:
            method = find(tensor, names)
            if method is not None:
                raise _refusal(method, f"{tensor.dtype} values", path, tensor.name)
    if (codes := _find_codes(tensors)) is not None:
        raise _refusal("codes in place of a matrix", f"{codes.dtype} values", path, codes.name)
    for key, value in (metadata or {}).items():
        if key in _METADATA_KEYS and value.strip().lower() not in _NOTHING:
            method = _METHODS.get(value.strip().lower(), "by a method not known here")
            raise _refusal(method, f"__metadata__ has {key}", path)
        if "torchao" in value:
            raise _refusal("torchao", f"__metadata__ has {key}", path)


def refuse_quantized_models(
    models: Sequence[Model], *, metadata: Mapping[str, str], path: str, are_all: bool = False
) -> None:
    """Raise InputInvalid if one of a checkpoint's models is quantised, each by its own config and names."""
    for model in models:
        refuse_quantized(
            model.tensors,
            config=model.config,
            metadata=within(model.prefix, metadata),
            path=os.path.join(path, model.folder) if model.folder else path,
            are_all=are_all,
        )


def refuse_quantized_config(config: Mapping[str, Any] | None, path: str | os.PathLike[str]) -> None:
    """Raise InputInvalid if config.json alone says that the weights are quantised."""
    claim = _claim_of(config or {})
    if claim is not None:
        raise claim.refusal(path)


_NEXT_STEP = "Use the full-precision checkpoint it was made from, then quantise the result"


def _refusal(
    method: str,
    evidence: str,
    path: str | os.PathLike[str],
    tensor: str | None = None,
    next_step: str = _NEXT_STEP,
) -> InputInvalid:
    return InputInvalid(
        "cannot use a quantised checkpoint",
        path=path,
        tensor=tensor,
        why=f"it is quantised: {method} ({evidence}); "
        "noise on codes, a mean of them, or either on what is left alone, means nothing",
        next_step=next_step,
    )


class _Claim(NamedTuple):
    """A method that a config names, under which key, and whether plain weights would belie it."""

    method: str
    key: str
    may_be_left_over: bool = True

    def refusal(self, path: str | os.PathLike[str]) -> InputInvalid:
        next_step = _NEXT_STEP
        if self.may_be_left_over:
            next_step += f"; if this is it, remove {self.key} from config.json (in a copy)"
        return _refusal(self.method, "config.json says so", path, next_step=next_step)


def _claim_of(config: Mapping[str, Any]) -> _Claim | None:
    """Return what the config or a part of it (`text_config`, `vision_config`) says."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _CONFIG_KEYS:
            section = part.get(key)
            if isinstance(section, Mapping) and section:
                method = _method_of_section(section)
                if method is not None:
                    return _Claim(method, key)
        section = part.get("quantization")
        if isinstance(section, Mapping):
            if "bits" in section and "group_size" in section:
                return _Claim(f"MLX {section['bits']}-bit", "quantization")
            if section.get("quant_algo"):
                # Its packed codes are stored as if they were F16.
                return _Claim(f"TensorRT-LLM {section['quant_algo']}", "quantization", False)
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


def _find_codes(tensors: Sequence[TensorSpec]) -> TensorSpec | None:
    """Return integers that stand where a layer's matrix would; None where there are none.

    A layer is a module that nothing with a matrix lies in: what masks and tables of positions belong to is
    made of layers. Beside its codes it has scales, zero points or codebooks.
    """
    modules: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        modules.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    composed: set[str] = {""}  # a model is more than a layer
    for module, held in modules.items():
        if any(tensor.dtype in FLOAT_DTYPES and _is_matrix(tensor) for tensor in held):
            while module not in composed and (module := module.rpartition(".")[0]) not in composed:
                composed.add(module)
    for module, held in modules.items():
        if module not in composed and (codes := _codes_of_layer(held)) is not None:
            return codes
    return None


def _codes_of_layer(held: Sequence[TensorSpec]) -> TensorSpec | None:
    integers = [tensor for tensor in held if tensor.dtype in _INTEGERS and tensor.elements > 1]
    floats = [tensor for tensor in held if tensor.dtype in FLOAT_DTYPES]
    beside = [tensor for tensor in floats if not tensor.name.endswith(".bias")]
    shapes = {tensor.shape for tensor in floats}
    for codes in integers:
        if codes.shape in shapes or _is_mask(codes) or _NO_CODES.search(codes.name):
            continue  # what hides elements is as large as what it hides
        if len(codes.shape) == 2 and codes.shape[-1] <= _AXES:
            continue  # coordinates or faces: a matrix of a layer is wider
        if not _is_matrix(codes):
            found = codes.dtype in _BYTES and bool(beside) and codes.elements > 64
            found &= all(codes.elements > tensor.elements for tensor in floats)
        elif any(map(_is_matrix, floats)):
            found = codes.dtype != "I64"  # as the indexes of a table beside it are
        else:
            found = bool(beside) and len(beside) + len(integers) > (2 if codes.dtype == "I64" else 1)
        if found:
            return codes
    # All in integers: sparse codes with offsets and columns, or packed with their scales.
    packed = len(integers) > 2 and len({tensor.dtype for tensor in integers}) > 1
    return integers[0] if packed and not beside else None


def _is_matrix(tensor: TensorSpec) -> bool:
    return sum(size > 1 for size in tensor.shape) > 1


def _is_mask(tensor: TensorSpec) -> bool:
    """Tell whether a tensor is [1, 1, n, n], as causal masks are."""
    return len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]


def _are_plain(tensors: Sequence[TensorSpec]) -> bool:
    """Tell whether weights are of full precision beyond doubt: no codes, and nothing to scale them with."""
    for tensor in tensors:
        last = tensor.name.rpartition(".")[2]
        codes = tensor.dtype.startswith(_SMALL_FLOATS) or (tensor.dtype in _INTEGERS and _is_matrix(tensor))
        if codes or any(word in last for word in _SCALES):
            return False
    return True
