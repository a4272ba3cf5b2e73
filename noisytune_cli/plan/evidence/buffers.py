"""Buffers: tensors in a state dict that no optimizer ever moves, told by name and evidence.

Masks, positions, running statistics and codebooks stand beside the parameters and look like them; noise
on them breaks the model without making it train differently. A name alone misleads (`attn.bias` is a mask
in GPT-2 and a parameter in BERT), so every rule asks for evidence too: a shape, a sibling or the config.
The families are those for which transformers, torchvision, detectron2 or latent diffusion register
buffers, and frozen tensors that training updates by other means than the gradient.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from noisytune_cli.records import TensorSpec

#: Decides from the tensor, all tensors by name, and the config's `model_type`.
Evidence = Callable[[TensorSpec, Mapping[str, TensorSpec], str], bool]


def _sibling(tensor: TensorSpec, by_name: Mapping[str, TensorSpec], name: str) -> TensorSpec | None:
    """Return the tensor `name` of the same module, if there is one."""
    return by_name.get(tensor.name[: tensor.name.rfind(".") + 1] + name)


def _beside(*names: str) -> Evidence:
    """Hold if one of `names` is in the same module."""
    return lambda tensor, by_name, _: any(_sibling(tensor, by_name, name) for name in names)


def _twin(*names: str) -> Evidence:
    """Hold if one of `names` is in the same module and has the same shape."""

    def evidence(tensor: TensorSpec, by_name: Mapping[str, TensorSpec], _: str) -> bool:
        twins = (_sibling(tensor, by_name, name) for name in names)
        return any(twin is not None and twin.shape == tensor.shape for twin in twins)

    return evidence


def _as_many(*names: str) -> Evidence:
    """Hold if one of `names` is in the same module and has as many rows."""

    def evidence(tensor: TensorSpec, by_name: Mapping[str, TensorSpec], _: str) -> bool:
        others = (_sibling(tensor, by_name, name) for name in names)
        return any(other is not None and other.shape[:1] == tensor.shape[:1] != () for other in others)

    return evidence


def _dimensions(*counts: int) -> Evidence:
    """Hold if the number of dimensions is one of `counts`."""
    return lambda tensor, *_: len(tensor.shape) in counts


def _all(*evidences: Evidence) -> Evidence:
    return lambda tensor, by_name, model: all(evidence(tensor, by_name, model) for evidence in evidences)


def _few(tensor: TensorSpec, *_: object) -> bool:
    """Hold for a flag, counter or version: at most three elements."""
    return tensor.elements <= 3


def _one(tensor: TensorSpec, *_: object) -> bool:
    """Hold for one element."""
    return tensor.elements == 1


def _square(tensor: TensorSpec, *_: object) -> bool:
    """Hold for [n, n] or a stack of it, n > 1."""
    return len(tensor.shape) >= 2 and tensor.shape[-1] == tensor.shape[-2] > 1


def _causal_mask(tensor: TensorSpec, *_: object) -> bool:
    """Hold for [1, 1, n, n]: a parameter that is a bias has one dimension, seldom two."""
    return len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and _square(tensor)


def _row(tensor: TensorSpec, *_: object) -> bool:
    """Hold for [1, n] or [n]."""
    return len(tensor.shape) == 1 or (len(tensor.shape) == 2 and tensor.shape[0] == 1)


def _coordinates(tensor: TensorSpec, *_: object) -> bool:
    """Hold for [1, h, w, 2], pairs of coordinates."""
    return len(tensor.shape) == 4 and tensor.shape[-1] == 2


def _pair(tensor: TensorSpec, *_: object) -> bool:
    """Hold for [1, 1, 2], the two taps of a pre-emphasis."""
    return tensor.shape == (1, 1, 2)


def _box(tensor: TensorSpec, *_: object) -> bool:
    """Hold for the corners of boxes: [2, 3], [6], or [levels, 6]."""
    return tensor.shape == (2, 3) or tensor.shape[-1:] == (6,)


def _six(tensor: TensorSpec, *_: object) -> bool:
    """Hold for [6], two corners of a box."""
    return tensor.shape == (6,)


def _colours(tensor: TensorSpec, *_: object) -> bool:
    """Hold for what changes three colours into three."""
    return tensor.shape in ((3, 3, 1, 1), (3,))


def _side(of: int) -> Evidence:
    """Hold for a vector as long as the weight beside it is high (0) or wide (1)."""

    def evidence(tensor: TensorSpec, by_name: Mapping[str, TensorSpec], _: str) -> bool:
        weight = _sibling(tensor, by_name, "weight")
        if weight is None or len(weight.shape) < 2 or not _row(tensor):
            return False
        return tensor.elements == (math.prod(weight.shape[1:]) if of else weight.shape[0])

    return evidence


def _channels(tensor: TensorSpec, *_: object) -> bool:
    """Hold for [channels, 1, 1]."""
    return len(tensor.shape) == 3 and tensor.shape[1:] == (1, 1)


def _fourier(tensor: TensorSpec, *_: object) -> bool:
    """Hold for [2, n], random frequencies for x and y."""
    return len(tensor.shape) == 2 and tensor.shape[0] == 2


def _sam2(tensor: TensorSpec, by_name: Mapping[str, TensorSpec], _: str) -> bool:
    """Hold in SAM 2 and later, whose mask decoder scores objects: in SAM 1 it is a parameter."""
    prefix = re.split(r"(?:prompt_encoder\.)?shared_(?:image_)?embedding\.", tensor.name)[0]
    return _fourier(tensor) and f"{prefix}mask_decoder.obj_score_token.weight" in by_name


#: The DETR line in transformers, whose backbones have frozen batch norms.
_DETR_LINE = (
    r"(conditional_|dab_|deformable_|rt_)?detr(_v2)?|d_fine|deimv2|(mm_)?grounding_dino|pp_doclayout_v[234]"
    r"|table_transformer"
)


def _in_backbone(name: str) -> bool:
    """Tell the same where names do: torchvision's and detectron2's models, RT-DETR, policies (ACT)."""
    return not {"backbone", "backbones"}.isdisjoint(name.split(".")[:-2])


def _frozen_norm(tensor: TensorSpec, by_name: Mapping[str, TensorSpec], model: str) -> bool:
    """Hold for the weight and bias of a batch norm of a frozen backbone.

    It has no batch counter, as a trainable one has since torch 0.4.1; older files lack it too, so the
    architecture must be known; without a config it is one that has a backbone, as none had by then.
    """
    mean = _sibling(tensor, by_name, "running_mean")
    if mean is None or mean.shape != tensor.shape:
        return False
    known = re.fullmatch(_DETR_LINE, model) is not None if model else _in_backbone(tensor.name)
    return known and _sibling(tensor, by_name, "num_batches_tracked") is None


class BufferRule(NamedTuple):
    """A shell pattern for the end of a name (from a dot on), the evidence asked for, and whose it is."""

    end: str
    evidence: Evidence
    family: str


def _together(family: str, *names: str) -> Iterator[BufferRule]:
    """Yield the rules of siblings of one family, each of which is told by another one beside it."""
    return (BufferRule(name, _beside(*(n for n in names if n != name)), family) for name in names)


_CODEBOOK = ("embed_avg", "embed_sum", "embedding_sum", "cluster_size", "cluster_usage")
#: A factor of each method whose scale, `alpha`, is stored beside it.
_LOW_RANK = (
    *("lora_down.weight", "lora.down.weight", "lora_A.weight"),
    *("hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks"),
)
#: What a body model has beside its `v_template`.
_BODY = ("shapedirs", "posedirs", "exprdirs", "J_regressor", "lbs_weights")
#: What says, beside the cells of an occupancy grid, which of them are used.
_CELLS = ("binaries", "_binary", "density_bitfield")
#: Beside a mean camera, what else an estimate of a body begins with.
_BODY_MEANS = ("init_pose", "init_body_pose", "init_shape", "init_betas", "init_cam")
#: The radial and angular functions of atoms' surroundings.
_SURROUNDINGS = ("EtaR", "ShfR", "EtaA", "Zeta", "ShfA", "ShfZ")
_vector = _dimensions(1)

RULES: tuple[BufferRule, ...] = (
    BufferRule("running_mean", _twin("running_var"), "batch norm"),
    BufferRule("running_var", _twin("running_mean"), "batch norm"),
    BufferRule("num_batches_tracked", _beside("running_mean"), "batch norm"),
    BufferRule("weight", _frozen_norm, "frozen batch norm (DETR line, torchvision, detectron2, ACT)"),
    BufferRule("bias", _frozen_norm, "frozen batch norm (DETR line, torchvision, detectron2, ACT)"),
    BufferRule("running_var", _twin("weight"), "batch norm without a mean (EvoNorm)"),
    BufferRule("attn.bias", _causal_mask, "causal mask (GPT-2, GPT-J, Bark, ImageGPT, nanoGPT)"),
    BufferRule("crossattention.bias", _causal_mask, "causal mask (GPT-2 cross-attention)"),
    BufferRule("attention.bias", _causal_mask, "causal mask (GPT-NeoX, GPT-Neo)"),
    BufferRule("attn.mask", _causal_mask, "causal mask (minGPT)"),
    BufferRule("attn.causal_mask", _causal_mask, "causal mask (CodeGen)"),
    BufferRule("attn.masked_bias", _one, "mask value (GPT-2, GPT-J)"),
    BufferRule("crossattention.masked_bias", _one, "mask value (GPT-2 cross-attention)"),
    BufferRule("attention.masked_bias", _one, "mask value (GPT-NeoX, GPT-Neo)"),
    BufferRule("attn_mask", _square, "window mask (Swin, as released)"),
    BufferRule("attn_mask_probs", _vector, "mask schedule (EoMT)"),
    BufferRule("position_ids", _row, "positions (BERT, CLIP, ...)"),
    BufferRule("token_type_ids", _row, "token types (BERT, CLAP)"),
    BufferRule("relative_position_index", _dimensions(1, 2), "positions (Swin, BEiT, Donut, CLAP)"),
    BufferRule("relative_coords_table", _coordinates, "positions (Swin 2, as released)"),
    BufferRule("pos_idx_to_embed", _dimensions(1, 2), "positions (Florence 2)"),
    BufferRule("_float_tensor", _one, "positions (fairseq's sinusoids)"),
    BufferRule("token_ordering", _vector, "token order (Gemma 4 assistant)"),
    BufferRule("dft_mat_*", _square, "Fourier matrix (FNet)"),
    BufferRule("shared_image_embedding.positional_embedding", _sam2, "random Fourier features (SAM 2, 3)"),
    BufferRule("shared_embedding.positional_embedding", _sam2, "random Fourier features (SAM 2, 3)"),
    BufferRule("positional_encoding_gaussian_matrix", _fourier, "random Fourier features (SAM as released)"),
    BufferRule("*inv_freq", _vector, "rotary frequencies"),
    BufferRule("inv_timescales", _vector, "rotary frequencies (TimesFM)"),
    BufferRule("cos_cached", _twin("sin_cached"), "rotary cache"),
    BufferRule("sin_cached", _twin("cos_cached"), "rotary cache"),
    BufferRule("e_score_correction_bias", _row, "mixture of experts: load balance (DeepSeek V3, ...)"),
    BufferRule("expert_bias", _row, "mixture of experts: load balance (LFM 2, AFMoE)"),
    BufferRule("balancing_biases", _row, "mixture of experts: load balance (Zaya)"),
    BufferRule("final_logits_bias", _row, "logits bias (BART, mBART, Marian, Pegasus)"),
    BufferRule("*coder.version", _few, "format version (fairseq)"),
    BufferRule("_extra_state", lambda *_: True, "a module's own state (torch, Transformer Engine)"),
    BufferRule("embed", _all(_beside(*_CODEBOOK), _dimensions(2, 3)), "EMA codebook (EnCodec, XCodec)"),
    BufferRule("embed_avg", _beside("embed", "cluster_size"), "EMA codebook (EnCodec, XCodec)"),
    BufferRule("embed_sum", _beside("cluster_usage"), "EMA codebook (Mimi)"),
    BufferRule("embedding_sum", _beside("cluster_usage"), "EMA codebook (Moshi, as released)"),
    BufferRule("cluster_size", _beside("embed", "embed_avg"), "EMA codebook (EnCodec, XCodec)"),
    BufferRule("cluster_usage", _beside("embed_sum", "embedding_sum"), "EMA codebook (Mimi, Moshi)"),
    BufferRule("init*ed", _all(_one, _beside(*_CODEBOOK)), "EMA codebook (EnCodec, Mimi)"),
    BufferRule("_initialized", _all(_one, _beside(*_CODEBOOK)), "EMA codebook (Moshi, as released)"),
    BufferRule("N", _as_many("z_avg"), "EMA codebook (VideoGPT)"),
    BufferRule("z_avg", _as_many("N"), "EMA codebook (VideoGPT)"),
    BufferRule("embeddings", _all(_twin("z_avg"), _beside("N")), "EMA codebook (VideoGPT)"),
    BufferRule("k", _all(_twin("k_sum"), _beside("k_elem")), "EMA codebook (Jukebox)"),
    BufferRule("k_sum", _as_many("k_elem"), "EMA codebook (Jukebox)"),
    BufferRule("k_elem", _as_many("k_sum"), "EMA codebook (Jukebox)"),
    BufferRule("layer_scalar", _one, "layer scale (Gemma 4)"),
    BufferRule("std_bias", _twin("std_scale"), "standardisation (Gemma 4)"),
    BufferRule("std_scale", _twin("std_bias"), "standardisation (Gemma 4)"),
    BufferRule("input_min", _all(_one, _beside("input_max")), "clipping range (Gemma 4)"),
    BufferRule("input_max", _all(_one, _beside("input_min")), "clipping range (Gemma 4)"),
    BufferRule("output_min", _all(_one, _beside("output_max")), "clipping range (Gemma 4)"),
    BufferRule("output_max", _all(_one, _beside("output_min")), "clipping range (Gemma 4)"),
    BufferRule("slope_rate", _channels, "decay (MiniMax)"),
    BufferRule("query_decay", _beside("slope_rate"), "decay (MiniMax)"),
    BufferRule("key_decay", _beside("slope_rate"), "decay (MiniMax)"),
    BufferRule("diagonal_decay", _beside("slope_rate"), "decay (MiniMax)"),
    BufferRule("criterion.empty_weight", _vector, "class weights (MaskFormer line)"),
    BufferRule("norm_mean", _all(_channels, _twin("norm_std")), "input statistics (RADIO)"),
    BufferRule("norm_std", _all(_channels, _twin("norm_mean")), "input statistics (RADIO)"),
    BufferRule("global_mean", _twin("global_invstd"), "input statistics (Phi 4 multimodal)"),
    BufferRule("global_invstd", _twin("global_mean"), "input statistics (Phi 4 multimodal)"),
    BufferRule("latent_mean", _twin("latent_std"), "latent statistics (Pocket TTS)"),
    BufferRule("latent_std", _twin("latent_mean"), "latent statistics (Pocket TTS)"),
    BufferRule("mean", _all(_twin("scale"), _beside("conv_pre.bias")), "input statistics (HiFi-GAN)"),
    BufferRule("scale", _all(_twin("mean"), _beside("conv_pre.bias")), "input statistics (HiFi-GAN)"),
    BufferRule("num_points_scale", _vector, "sampling weights (D-FINE)"),
    BufferRule("n_points_scale", _vector, "sampling weights (RT-DETR 2)"),
    BufferRule("betas", _twin("alphas_cumprod"), "noise schedule (latent diffusion)"),
    BufferRule("*alphas_cumprod*", _all(_vector, _twin("betas")), "noise schedule (latent diffusion)"),
    BufferRule("posterior_*", _all(_vector, _twin("betas")), "noise schedule (latent diffusion)"),
    BufferRule("scale_factor", _all(_one, _beside("betas", "model_ema.decay")), "scale (latent diffusion)"),
    BufferRule("decay", _all(_one, _beside("num_updates")), "EMA decay (latent diffusion)"),
    BufferRule("count", _all(_one, _beside("running_var", "var")), "running statistics (rl_games)"),
    BufferRule("scale", _beside("input_stats.mean"), "input statistics (diffusion policy)"),
    BufferRule("offset", _beside("input_stats.mean"), "input statistics (diffusion policy)"),
    BufferRule("freqs", _as_many("phases"), "random Fourier features (StyleGAN 3, EDM 2)"),
    BufferRule("frequencies", _as_many("phases"), "random Fourier features"),
    BufferRule("phases", _as_many("freqs", "frequencies"), "random Fourier features (StyleGAN 3, EDM 2)"),
    BufferRule("noise_const", _all(_square, _beside("noise_strength")), "fixed noise (StyleGAN 2)"),
    BufferRule("noises.noise*", _causal_mask, "fixed noise (StyleGAN 2, GFPGAN)"),
    BufferRule("u0", _all(_row, _beside("sv0")), "power iteration (BigGAN)"),
    BufferRule("sv0", _all(_one, _beside("u0")), "power iteration (BigGAN)"),
    BufferRule("u", _all(_side(0), _beside("v")), "power iteration (residual flows)"),
    BufferRule("v", _all(_side(1), _beside("u")), "power iteration (residual flows)"),
    BufferRule("u", _all(_side(0), _dimensions(2)), "power iteration (SNGAN)"),
    BufferRule("angle", _all(_vector, _beside("decay")), "rotary frequencies (RetNet)"),
    BufferRule("decay", _all(_vector, _beside("angle")), "decay (RetNet)"),
    BufferRule("_w3j_*", _dimensions(3), "Wigner 3j symbols (e3nn)"),
    BufferRule("U_matrix_*", _beside("weights_max"), "symmetric contraction (MACE)"),
    BufferRule("atomic_energies_fn.atomic_energies", _dimensions(1, 2), "energies of atoms (MACE)"),
    BufferRule("v_template", _beside(*_BODY), "body model (SMPL, FLAME)"),
    *(BufferRule(name, _beside("v_template"), "body model (SMPL, FLAME)") for name in _BODY),
    *(
        BufferRule(name, _beside("v_template"), "body model (SMPL, FLAME)")
        for name in ("*bary_coords", "J_regressor_*")
    ),
    *_together("mean body (HMR)", *_BODY_MEANS),
    *_together("surroundings of atoms (ANI)", *_SURROUNDINGS),
    BufferRule("*_grid_mat", _beside("to_grid_mat", "from_grid_mat"), "spherical harmonics (eSCN)"),
    BufferRule("balance_degree_weight", _beside("affine_weight"), "weights of degrees (Equiformer)"),
    BufferRule("atomref", _beside("mean"), "energies of atoms (SchNetPack)"),
    BufferRule("atomic_mass*", _vector, "masses of atoms (SchNet)"),
    BufferRule("grid", _beside("spline_weight", "coef"), "knots of splines (KAN)"),
    BufferRule("*aabb*", _box, "a box around a scene (nerfstudio, TensoRF)"),
    *(BufferRule(name, _six, "a box around a scene (PETR)") for name in ("pc_range", "*position_range")),
    BufferRule("occs", _beside(*_CELLS), "occupancy grid (nerfacc)"),
    BufferRule("density_grid", _beside(*_CELLS), "occupancy grid (instant-ngp)"),
    BufferRule("dx", _all(_vector, _beside("nx")), "cells of a grid (Lift, Splat, Shoot; BEVFusion)"),
    BufferRule("bx", _all(_vector, _beside("nx")), "cells of a grid (Lift, Splat, Shoot; BEVFusion)"),
    BufferRule("voxel_*", _all(_vector, _beside("voxel_num")), "cells of a grid (BEVDepth)"),
    BufferRule("*filter", _pair, "pre-emphasis (ECAPA-TDNN, XTTS)"),
    BufferRule("scaling_layer.shift", _twin("scale"), "input statistics (LPIPS)"),
    BufferRule("scaling_layer.scale", _twin("shift"), "input statistics (LPIPS)"),
    *(
        BufferRule(f"{name}.{end}", _colours, "mean colour (EDSR, RCAN)")
        for name in ("sub_mean", "add_mean")
        for end in ("weight", "bias")
    ),
    BufferRule("kernel_points", _as_many("weights"), "points of a kernel (KPConv)"),
    *_together("thin plates (TPS, ASTER)", "inv_delta_C", "P_hat"),
    BufferRule("A", _twin("edge_importance.0"), "a graph of joints (ST-GCN)"),
    BufferRule("y_embedder.y_embedding", _dimensions(2), "an empty caption (PixArt, Sana)"),
    BufferRule("w_avg", _all(_vector, _beside("fc0.weight")), "mean latent (StyleGAN 2, 3)"),
    BufferRule("action_scale", _twin("action_bias"), "range of actions (CleanRL)"),
    BufferRule("action_bias", _twin("action_scale"), "range of actions (CleanRL)"),
    BufferRule("alpha", _all(_one, _beside(*_LOW_RANK)), "scale of low-rank factors (kohya, LyCORIS)"),
)


def _index(rules: Sequence[BufferRule]) -> tuple[dict[str, list[BufferRule]], list[BufferRule]]:
    """Split `rules` by the last component of their names, and those where it has a wildcard."""
    literal: dict[str, list[BufferRule]] = {}
    wild: list[BufferRule] = []
    for rule in rules:
        last = rule.end.rsplit(".", 1)[-1]
        if "*" in last:
            wild.append(rule)
        else:
            literal.setdefault(last, []).append(rule)
    return literal, wild


_LITERAL, _WILD = _index(RULES)
_WILD_LAST = re.compile("|".join(fnmatch.translate(rule.end.rsplit(".", 1)[-1]) for rule in _WILD))


def find_buffers(tensors: Sequence[TensorSpec], *, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the names that are buffers, each with the family of the rule that says so."""
    by_name = {tensor.name: tensor for tensor in tensors}
    model = str((config or {}).get("model_type", ""))
    return {
        tensor.name: rule.family
        for tensor in tensors
        if (rule := _rule_for(tensor, by_name, model)) is not None
    }


def stands_alone(tensor: TensorSpec, *, config: Mapping[str, Any] | None = None) -> bool:
    """Say whether a rule holds for a tensor without its siblings: its name and shape tell it."""
    model = str((config or {}).get("model_type", ""))
    return _rule_for(tensor, {tensor.name: tensor}, model) is not None


def _rule_for(tensor: TensorSpec, by_name: Mapping[str, TensorSpec], model: str) -> BufferRule | None:
    last = tensor.name[tensor.name.rfind(".") + 1 :]
    rules = _LITERAL.get(last, ())
    if last != "weight" and last != "bias" and _WILD_LAST.fullmatch(last):
        rules = (*rules, *_WILD)
    for rule in rules:
        if rule.evidence(tensor, by_name, model) and fnmatch.fnmatchcase(f".{tensor.name}", f"*.{rule.end}"):
            return rule
    return None
