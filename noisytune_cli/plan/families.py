"""The tensors in which known models keep several matrices, and how these lie there.

A rule is a name and evidence. Some layouts are certain from name and shapes alone: a stack of experts [n, …]
(`plan/experts.py`), torch's `in_proj_weight`, GPT-2's `c_attn` with its 3 · h columns. Others depend on the
model: the same `query_key_value` is stored by head in GPT-NeoX, by group of heads in Falcon 40B and in blocks
elsewhere, and the sizes of keys and values are in the config. Where they cannot be told, the tensor stays
whole and the rule says why. The layouts are those that the forward passes in transformers 5 take apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from noisytune_cli.checkpoint.config import Hyperparameters
from noisytune_cli.plan.experts import stacked_parts
from noisytune_cli.plan.parts import cut
from noisytune_cli.records import Part, TensorSpec

#: Models whose vision blocks have `qkv` as three equal blocks of rows.
_VISION = re.compile(
    r"(?:blip|blip-2|cohere_compass|deepseek_ocr2|dots3_note|ernie4_5_vl_moe|florence2|glm4v|glm4v_moe|glm5_next"
    r"|glm_image|glm_ocr|got_ocr2|hiera|instructblip|instructblipvideo|mgp-str|pp_formulanet"
    r"|pp_ocrv[56]_(?:mobile|server|small)_rec|qwen2_vl|qwen2_5_vl|qwen3_vl|qwen3_vl_moe|qwen3_5|qwen3_5_moe"
    r"|qwen3_omni_moe|qwen4_exp|sam|sam2|sam_hq|seggpt|slanext|timesformer|unlimited_ocr|vitdet)"
    r"(?:_\w+)?"
)

#: Models whose attention is stored by head: q, k and v of the first head, of the second, and so on.
_BY_HEAD = frozenset(["bloom", "fuyu", "gpt_neox", "gpt_neox_japanese", "minimax", "persimmon"])

#: Models whose attention is a block of queries, one of keys and one of values, sized by the config.
_IN_BLOCKS = frozenset(
    ["dbrx", "exaone4_5", "exaone4_5_vision", "modernbert", "mpt", "phi3", "phi4_multimodal"]
)

_FALCON = frozenset(("falcon", "RefinedWeb", "RefinedWebModel"))
_GRANITE = frozenset(["granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"])

_NO_SIZES = "the config does not give sizes of queries, keys and values that fit"
_NO_LAYOUT = "the config does not say how its heads are stored"


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How a fused matrix is divided: named pieces, `times` times in turn, along `axis`."""

    axis: int
    pieces: tuple[tuple[str, int], ...]
    times: int = 1

    @property
    def size(self) -> int:
        """What the pieces add up to."""
        return sum(size for _, size in self.pieces) * self.times


#: Blocks; or a reason why they cannot be told; or None: the tensor is one matrix.
_Found = _Blocks | str | None


def known_parts(
    tensor: TensorSpec, by_name: Mapping[str, TensorSpec], model: Hyperparameters
) -> tuple[Part, ...] | str:
    """Return the matrices of a tensor, none if it is one; a string says why they cannot be told."""
    stacked = stacked_parts(tensor, by_name, model)
    if stacked:
        return stacked
    module, _, name = tensor.name.rpartition(".")
    if name in ("weight", "bias"):
        rule, weight = _MODULES.get(module[module.rfind(".") + 1 :]), by_name.get(f"{module}.weight")
    else:
        rule = _torch_attention if name in ("in_proj_weight", "in_proj_bias") else None
        weight = by_name.get(f"{tensor.name.removesuffix(name)}in_proj_weight")
    if rule is None or weight is None or len(weight.shape) != 2:
        return ()
    found = rule(weight, module, model)
    if not isinstance(found, _Blocks):
        return found or ()
    if weight.shape[found.axis] != found.size:
        return f"its size is {weight.shape[found.axis]:,}, and the config's heads make {found.size:,}"
    if tensor.name == weight.name:
        return cut(tensor.shape, found.axis, found.pieces, found.times)
    # A bias is divided like the outputs of its weight.
    return cut(tensor.shape, 0, found.pieces, found.times) if tensor.shape == (found.size,) else ()


def _qkv(size: int) -> tuple[tuple[str, int], ...]:
    return ("q", size), ("k", size), ("v", size)


def _halves(first: str, second: str, rows: int) -> _Found:
    return _Blocks(0, ((first, rows // 2), (second, rows // 2))) if rows % 2 == 0 else None


def _torch_attention(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """[3 · e, e] in torch's MultiheadAttention."""
    rows, columns = weight.shape
    return _Blocks(0, _qkv(columns)) if rows == 3 * columns else None


def _c_attn(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """[h, 3 · h] (or keys and values in [h, 2 · h]) in GPT-2, whose Conv1D has outputs as columns."""
    rows, columns = weight.shape
    if columns == 3 * rows:
        return _Blocks(1, _qkv(rows))
    if columns == 2 * rows and ".crossattention." in f".{module}":
        return _Blocks(1, (("k", rows), ("v", rows)))
    if "gpt_bigcode" not in model.types:
        return model.unknown
    multi_query, heads = model.flag("multi_query"), model.heads()
    if multi_query is None or not heads or columns % heads:
        return _NO_LAYOUT
    size = columns // heads
    if multi_query:
        return _Blocks(0, (("q", columns), ("k", size), ("v", size)))
    return _Blocks(0, _qkv(size), heads)


def _attention(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """Queries, keys and values in blocks, by head or by group of heads, as the model has them."""
    outputs, inputs = weight.shape
    if "codegen" in model.types:
        # Four slices, one for each of the cores it was trained on; in each q, v and k.
        return _Blocks(0, tuple((name, outputs // 12) for name in ("q", "v", "k")), 4)
    if model.types & _FALCON:
        return _falcon(outputs, model)
    if not model.types & (_BY_HEAD | _IN_BLOCKS):
        return model.unknown
    in_blocks = bool(model.types & _IN_BLOCKS)
    heads = model.attention(outputs, inputs, grouped=in_blocks)
    if heads is None:
        return _NO_SIZES
    query, key, size = heads
    if in_blocks:
        return _Blocks(0, (("q", query * size), ("k", key * size), ("v", key * size)))
    return _Blocks(0, _qkv(size), query)


def _falcon(outputs: int, model: Hyperparameters) -> _Found:
    """Falcon's three layouts: by group of heads (40B), one key and value for all (7B), by head (RW)."""
    grouped, multi_query = model.flag("new_decoder_architecture"), model.flag("multi_query")
    if grouped is None and "falcon" not in model.types:
        grouped = "RefinedWeb" in model.types  # what 40B was called before the setting existed
    heads, groups = model.heads(), model.number("num_kv_heads", "n_head_kv")
    if heads is None or grouped is None or (not grouped and multi_query is None):
        return _NO_LAYOUT
    if grouped:
        if not groups or heads % groups:
            return _NO_SIZES
        size = outputs // (heads + 2 * groups)
        return _Blocks(0, (("q", heads // groups * size), ("k", size), ("v", size)), groups)
    if multi_query:
        size = outputs // (heads + 2)
        return _Blocks(0, (("q", heads * size), ("k", size), ("v", size)))
    return _Blocks(0, _qkv(outputs // (3 * heads)), heads)


def _vision(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """Three equal blocks of rows."""
    if model.types & _IN_BLOCKS:
        return _attention(weight, module, model)
    if not any(map(_VISION.fullmatch, model.types)):
        return model.unknown
    return _Blocks(0, _qkv(weight.shape[0] // 3))


def _kv_proj(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """Keys and values in JetMoE."""
    return _halves("k", "v", weight.shape[0]) if "jetmoe" in model.types else None


def _in_proj(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """Queries, keys and values by head in DeBERTa; elsewhere `in_proj` is something else."""
    if "deberta" not in model.types:
        return None
    heads = model.heads()
    return _Blocks(0, _qkv(weight.shape[0] // (3 * heads)), heads) if heads else _NO_SIZES


def _gate_up(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """Gate, then up, in halves of the rows; the other way round in the speech layers of Phi 4."""
    swapped = "phi4_multimodal" in model.types and ".feed_forward_" in module
    return _halves(*(("up", "gate") if swapped else ("gate", "up")), weight.shape[0])


def _modernbert(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """Input, then gate, in ModernBERT; elsewhere `Wi` is one matrix."""
    known = model.types & {"modernbert", "modernbert-decoder"}
    return _halves("input", "gate", weight.shape[0]) if known else None


def _input_linear(weight: TensorSpec, module: str, model: Hyperparameters) -> _Found:
    """Gate, then up, in the feed-forward layer that all of Granite's tokens share."""
    known = model.types & _GRANITE and module.endswith(".shared_mlp.input_linear")
    return _halves("gate", "up", weight.shape[0]) if known else None


#: The last component of a module's name -> the rule for its weight.
_MODULES: Mapping[str, Callable[[TensorSpec, str, Hyperparameters], _Found]] = {
    "c_attn": _c_attn,
    "qkv_proj": _attention,
    "query_key_value": _attention,
    "Wqkv": _attention,
    "qkv": _vision,
    "kv_proj": _kv_proj,
    "in_proj": _in_proj,
    "gate_up_proj": _gate_up,
    "Wi": _modernbert,
    "input_linear": _input_linear,
}
