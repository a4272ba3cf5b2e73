"""Matrices of stored tensors by plain NumPy indexing, as a model's forward pass takes them apart.

`LAYOUTS` are tensors with the matrices that the product must find in them; `indices` says which elements
each has. Nothing here knows of runs: an element's owner is looked up in an array of indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
from checkpoints import Tensor, floats
from numpy.typing import NDArray

from noisytune_cli.noise import distributions, stream
from noisytune_cli.records import NoiseSpec

Indices = NDArray[np.int64]
#: From the indices of a tensor's elements, in its shape, to those of each matrix.
Slicing = Callable[[Indices], Mapping[str, Indices]]


def indices(shape: tuple[int, ...], slicing: Slicing) -> dict[str, Indices]:
    """The indices of each matrix's elements."""
    return {n: i.ravel() for n, i in slicing(np.arange(int(np.prod(shape))).reshape(shape)).items()}


def rows(**sizes: int) -> Slicing:
    """Blocks of rows."""
    ends = np.cumsum(list(sizes.values())).tolist()
    return lambda i: {n: i[e - s : e] for (n, s), e in zip(sizes.items(), ends, strict=True)}


def columns(*names: str) -> Slicing:
    """Equal blocks of columns."""
    return lambda i: dict(zip(names, np.split(i, len(names), axis=-1), strict=True))


def by_head(heads: int, *names: str) -> Slicing:
    """`.view(heads, len(names), size)`, then each of them."""
    return lambda i: {
        name: i.reshape(heads, len(names), -1, *i.shape[1:])[:, at] for at, name in enumerate(names)
    }


def grouped(groups: int, queries: int) -> Slicing:
    """`.view(groups, queries + 2, size)`: some query heads, a key head and a value head in each group."""

    def slicing(i: Indices) -> Mapping[str, Indices]:
        view = i.reshape(groups, queries + 2, -1, *i.shape[1:])
        return {"q": view[:, :-2], "k": view[:, -2], "v": view[:, -1]}

    return slicing


def experts(inside: Slicing | None = None) -> Slicing:
    """Each of a stack, and the matrices inside it."""

    def slicing(i: Indices) -> Mapping[str, Indices]:
        if inside is None:
            return {f"expert.{e}": one for e, one in enumerate(i)}
        return {f"expert.{e}.{name}": part for e, one in enumerate(i) for name, part in inside(one).items()}

    return slicing


def alternate(i: Indices) -> Mapping[str, Indices]:
    """`[..., ::2]` and `[..., 1::2]`."""
    return {"gate": i[..., ::2], "up": i[..., 1::2]}


@dataclass(frozen=True)
class Layout:
    """A fused tensor in a model: its name, shape, config, and tensors that lie with it."""

    name: str
    shape: tuple[int, ...]
    slicing: Slicing
    config: Mapping[str, Any] | None = None
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_GQA = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
_FALCON = {"model_type": "falcon", "hidden_size": 16, "num_attention_heads": 4}
_EXPERTS = "model.layers.0.mlp.experts."

LAYOUTS: Mapping[str, Layout] = {
    "gpt2": Layout("h.0.attn.c_attn.weight", (8, 24), columns("q", "k", "v")),
    "gpt2-bias": Layout(
        "h.0.attn.c_attn.bias", (24,), rows(q=8, k=8, v=8), None, {"h.0.attn.c_attn.weight": (8, 24)}
    ),
    "gpt2-cross": Layout("h.0.crossattention.c_attn.weight", (8, 16), columns("k", "v")),
    "torch-attention": Layout("layers.0.self_attn.in_proj_weight", (24, 8), rows(q=8, k=8, v=8)),
    "torch-attention-bias": Layout(
        "self_attn.in_proj_bias", (24,), rows(q=8, k=8, v=8), None, {"self_attn.in_proj_weight": (24, 8)}
    ),
    "starcoder": Layout(
        "transformer.h.0.attn.c_attn.weight",
        (24, 16),
        rows(q=16, k=4, v=4),
        {"model_type": "gpt_bigcode", "n_head": 4, "n_embd": 16, "multi_query": True},
    ),
    "bigcode-by-head": Layout(
        "transformer.h.0.attn.c_attn.weight",
        (48, 16),
        by_head(4, "q", "k", "v"),
        {"model_type": "gpt_bigcode", "n_head": 4, "n_embd": 16, "multi_query": False},
    ),
    "neox": Layout(
        "gpt_neox.layers.0.attention.query_key_value.weight",
        (48, 16),
        by_head(4, "q", "k", "v"),
        {"model_type": "gpt_neox", "hidden_size": 16, "num_attention_heads": 4},
    ),
    "bloom-bias": Layout(
        "h.0.self_attention.query_key_value.bias",
        (48,),
        by_head(4, "q", "k", "v"),
        {"model_type": "bloom", "n_embed": 16, "n_head": 4},
        {"h.0.self_attention.query_key_value.weight": (48, 16)},
    ),
    "falcon-40b": Layout(
        "h.0.self_attention.query_key_value.weight",
        (32, 16),
        grouped(2, 2),
        {**_FALCON, "new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 2},
    ),
    "falcon-7b": Layout(
        "h.0.self_attention.query_key_value.weight",
        (24, 16),
        rows(q=16, k=4, v=4),
        {**_FALCON, "new_decoder_architecture": False, "multi_query": True},
    ),
    "falcon-rw": Layout(
        "h.0.self_attention.query_key_value.weight",
        (48, 16),
        by_head(4, "q", "k", "v"),
        {**_FALCON, "new_decoder_architecture": False, "multi_query": False},
    ),
    "codegen": Layout(
        "h.0.attn.qkv_proj.weight", (48, 16), by_head(4, "q", "v", "k"), {"model_type": "codegen"}
    ),
    "phi3": Layout(
        "model.layers.0.self_attn.qkv_proj.weight",
        (32, 16),
        rows(q=16, k=8, v=8),
        {"model_type": "phi3", **_GQA},
    ),
    "phi3-mlp": Layout("model.layers.0.mlp.gate_up_proj.weight", (12, 16), rows(gate=6, up=6)),
    "dbrx": Layout(
        "blocks.0.norm_attn_norm.attn.Wqkv.weight",
        (32, 16),
        rows(q=16, k=8, v=8),
        {"model_type": "dbrx", "d_model": 16, "n_heads": 4, "attn_config": {"kv_n_heads": 2}},
    ),
    "dbrx-experts": Layout(
        "blocks.0.ffn.experts.mlp.w1",
        (12, 8),
        lambda i: experts()(i.reshape(3, 4, 8)),
        {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 3}},
    ),
    "modernbert": Layout(
        "layers.0.attn.Wqkv.weight",
        (48, 16),
        rows(q=16, k=16, v=16),
        {"model_type": "modernbert", "hidden_size": 16, "num_attention_heads": 4},
    ),
    "qwen-vision": Layout(
        "visual.blocks.0.attn.qkv.weight", (24, 8), rows(q=8, k=8, v=8), {"model_type": "qwen2_5_vl"}
    ),
    "deberta": Layout(
        "encoder.layer.0.attention.self.in_proj.weight",
        (48, 16),
        by_head(4, "q", "k", "v"),
        {"model_type": "deberta", "num_attention_heads": 4},
    ),
    "jetmoe": Layout(
        "layers.0.self_attention.kv_proj.weight", (8, 6), rows(k=4, v=4), {"model_type": "jetmoe"}
    ),
    "mixtral": Layout(
        _EXPERTS + "gate_up_proj",
        (3, 12, 8),
        experts(rows(gate=6, up=6)),
        {"model_type": "mixtral"},
        {_EXPERTS + "down_proj": (3, 8, 6)},
    ),
    "mixtral-down": Layout(_EXPERTS + "down_proj", (3, 8, 6), experts()),
    "llama4": Layout(
        "feed_forward.experts.gate_up_proj",
        (3, 8, 12),
        experts(columns("gate", "up")),
        {"model_type": "llama4"},
        {"feed_forward.experts.down_proj": (3, 6, 8)},
    ),
    "gpt-oss": Layout(
        _EXPERTS + "gate_up_proj",
        (3, 8, 12),
        experts(alternate),
        {"model_type": "gpt_oss"},
        {_EXPERTS + "down_proj": (3, 6, 8), _EXPERTS + "gate_up_proj_bias": (3, 12)},
    ),
    "gpt-oss-bias": Layout(
        _EXPERTS + "gate_up_proj_bias",
        (3, 12),
        experts(alternate),
        {"model_type": "gpt_oss"},
        {_EXPERTS + "gate_up_proj": (3, 8, 12), _EXPERTS + "down_proj": (3, 6, 8)},
    ),
    "granite": Layout(
        "model.layers.0.block_sparse_moe.input_linear.weight", (3, 12, 8), experts(rows(gate=6, up=6))
    ),
    "aria": Layout(
        "language_model.model.layers.0.mlp.experts.fc1.weight", (3, 8, 12), experts(columns("gate", "up"))
    ),
}


def noised(
    tensor: Tensor, name: str, matrices: Mapping[str, Indices], noise: NoiseSpec
) -> tuple[bytes, dict[str, float]]:
    """A tensor's bytes with each matrix's own noise, by the reference, and each matrix's std."""
    flat = np.ascontiguousarray(tensor.values).ravel()
    every = floats(tensor)
    c = stream.coefficients(noise.distribution, noise.seed, name, 0, flat.size)
    out, stds = flat.copy(), {}
    for part, own in matrices.items():
        stds[part] = oracle.std32(every[i] for i in own.tolist())
        amplitude = distributions.load(noise.distribution).amplitude(noise.lam, stds[part])
        out[own] = stream.add_noise(flat[own], tensor.dtype, c[own], amplitude)[0]
    return out.tobytes(), stds
