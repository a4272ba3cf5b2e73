from collections.abc import Mapping
from typing import Any

import pytest

from noisytune_cli.plan.evidence.buffers import RULES, find_buffers
from noisytune_cli.records import TensorSpec


def specs(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> list[TensorSpec]:
    return [TensorSpec(name, dtype, shape, "model.safetensors", 0, 0) for name, shape in shapes.items()]


#: Modules in which every tensor is a buffer.
BUFFERS: dict[str, dict[str, tuple[int, ...]]] = {
    "batch norm": {"bn.running_mean": (8,), "bn.running_var": (8,), "bn.num_batches_tracked": ()},
    "causal masks": {
        "h.0.attn.bias": (1, 1, 64, 64),
        "h.0.attn.masked_bias": (),
        "h.0.crossattention.bias": (1, 1, 64, 64),
        "gpt_neox.layers.0.attention.bias": (1, 1, 64, 64),
        "gpt_neox.layers.0.attention.masked_bias": (),
        "attn.bias": (1, 1, 4, 4),
    },
    "window mask": {"layers.0.blocks.1.attn_mask": (64, 49, 49)},
    "positions": {
        "embeddings.position_ids": (1, 512),
        "attention.self.relative_position_index": (49, 49),
        "token_ordering": (1000,),
    },
    "fourier": {"fnet.dft_mat_seq": (512, 512)},
    "rotary": {
        "layers.0.self_attn.rotary_emb.inv_freq": (64,),
        "rope.inv_freq": (64,),
        "rotary_pos_emb.inv_freq": (32,),
        "rotary_emb.sliding_attention_original_inv_freq": (32,),
        "inv_timescales": (8,),
        "rotary_emb.cos_cached": (1, 1, 2048, 64),
        "rotary_emb.sin_cached": (1, 1, 2048, 64),
    },
    "experts": {
        "mlp.gate.e_score_correction_bias": (256,),
        "moe_statics.e_score_correction_bias": (1, 64),
        "feed_forward.expert_bias": (32,),
        "router.balancing_biases": (17,),
    },
    "logits": {"final_logits_bias": (1, 50265)},
    "versions": {"encoder.version": (1,), "decoder.version": (3,)},
    "state": {"layers.0.fc1._extra_state": (120,)},
    "sam 2": {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128)},
    "encodec": {
        "layers.0.codebook.embed": (1024, 128),
        "layers.0.codebook.embed_avg": (1024, 128),
        "layers.0.codebook.cluster_size": (1024,),
        "layers.0.codebook.inited": (1,),
    },
    "mimi": {"cb.embed_sum": (2048, 256), "cb.cluster_usage": (2048,), "cb.initialized": (1,)},
    "moshi": {
        "_codebook.embedding_sum": (2048, 256),
        "_codebook.cluster_usage": (2048,),
        "_codebook._initialized": (1,),
    },
    "gemma 4": {
        "layers.0.layer_scalar": (1,),
        "vision.std_bias": (768,),
        "vision.std_scale": (768,),
        "q_proj.input_min": (),
        "q_proj.input_max": (),
        "q_proj.output_min": (),
        "q_proj.output_max": (),
    },
    "minimax": {
        "self_attn.slope_rate": (8, 1, 1),
        "self_attn.query_decay": (8, 256, 1),
        "self_attn.key_decay": (8, 256, 1),
        "self_attn.diagonal_decay": (1, 8, 256, 256),
    },
    "a normaliser's state": {
        "obs.running_mean": (9,),
        "obs.running_var": (9,),
        "obs.count": (),
    },
    "random features": {
        "input.freqs": (64, 2),
        "input.phases": (64,),
        "rff.frequencies": (64,),
        "rff.phases": (64,),
        "noises.noise_3": (1, 1, 8, 8),
    },
    "a codebook by other names": {
        "codebook.N": (32,),
        "codebook.z_avg": (32, 8),
        "codebook.embeddings": (32, 8),
        "level_blocks.0.k": (32, 8),
        "level_blocks.0.k_sum": (32, 8),
        "level_blocks.0.k_elem": (32,),
    },
    "retnet": {"retnet_rel_pos.angle": (64,), "retnet_rel_pos.decay": (4,)},
    "biggan": {"linear.u0": (1, 8), "linear.sv0": (1,)},
    "molecules": {
        "conv_tp._compiled_main._w3j_1_2_1": (3, 5, 3),
        "atomic_energies_fn.atomic_energies": (1, 89),
        "schnet.atomic_mass": (119,),
    },
    "smpl": {
        "smpl.v_template": (40, 3),
        "smpl.shapedirs": (40, 3, 10),
        "smpl.J_regressor": (4, 40),
        "smpl.lbs_weights": (40, 4),
    },
    "a body's means": {"init_pose": (1, 144), "init_shape": (1, 10), "init_cam": (1, 3)},
    "flame": {"v_template": (40, 3), "posedirs": (36, 120), "lmk_bary_coords": (51, 3)},
    "atoms": {"aev.EtaR": (1, 1), "aev.ShfR": (1, 16), "aev.ShfA": (1, 1, 4, 1)},
    "equiformer": {"SO3_grid.6.2.to_grid_mat": (14, 14, 29), "SO3_grid.6.2.from_grid_mat": (14, 14, 29)},
    "ranges": {"head.pc_range": (6,), "head.position_range": (6,)},
    "captions": {"y_embedder.y_embedding": (120, 8)},
    "boxes": {"field.aabb": (2, 3), "aabb_train": (6,), "grid.aabbs": (4, 6)},
    "pre-emphasis": {"torchfb.0.flipped_filter": (1, 1, 2), "torch_spec.0.filter": (1, 1, 2)},
    "mean colours": {"sub_mean.weight": (3, 3, 1, 1), "sub_mean.bias": (3,), "add_mean.bias": (3,)},
    "lpips": {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)},
    "thin plates": {"GridGenerator.inv_delta_C": (23, 23), "GridGenerator.P_hat": (3200, 23)},
    "actions": {"action_scale": (6,), "action_bias": (6,)},
    "gfpgan": {"stylegan_decoder.noises.noise7": (1, 1, 32, 32)},
    "latent diffusion": {"betas": (1000,), "sqrt_alphas_cumprod": (1000,), "alphas_cumprod": (1000,)},
}

#: Modules in which every tensor is a parameter, though its name suggests otherwise.
PARAMETERS: dict[str, dict[str, tuple[int, ...]]] = {
    "mamba": {"mixer.A_log": (64, 16), "mixer.D": (64,), "mixer.dt_bias": (64,)},
    "gpt-oss": {"self_attn.sinks": (64,)},
    "clip": {"positional_embedding": (77, 512), "visual.positional_embedding": (2, 768), "logit_scale": ()},
    "sam 1": {"shared_image_embedding.positional_embedding": (2, 128)},
    "attention": {
        "attention.self.query.bias": (768,),
        "attn.bias": (768,),
        "attention.bias": (1, 768),
        "attn.in_proj_bias": (2304,),
        "attn.wide.bias": (1, 1, 4, 4),
    },
    "whole names only": {"my_attn.bias": (1, 1, 4, 4), "xrunning_mean": (4,), "my_position_ids": (4,)},
    "lone statistics": {"gate.running_mean": (8,), "quantizer.embed": (100, 8), "film.mean": (8,)},
    "film": {"film.mean": (8,), "film.scale": (8,)},
    "learned features": {"pos.freqs": (64,), "sine.phases": (64,), "a.freqs": (8, 2), "a.phases": (2,)},
    "learned noise": {"conv.noise_const": (4, 4), "noises.noise_0": (8, 8)},
    "letters": {"a.k": (8, 8), "a.k_sum": (8, 8), "b.N": (8,), "b.embeddings": (8, 2), "c.u0": (1, 8)},
    "one of a pair": {"lru.decay": (8,), "rot.angle": (8,), "x.U_matrix_2": (4, 4), "x.v_template": (9, 3)},
    "film with an offset": {"film.scale": (8,), "film.offset": (8,), "lbs.lbs_weights": (9, 3)},
    "codebook without averages": {"codebook.embed": (1024, 8), "codebook.weight": (1024, 8)},
    "filters": {"sinc.filter": (64, 1, 251), "x.filter": (1, 2)},
    "voxels": {"backbone.voxel_size": (3,), "dx": (3,), "grid": (8, 12), "atomref": (100,), "init_cam": (3,)},
    "u and v": {"fm.v": (8, 4), "flow.u": (1, 8), "flow.w": (1, 8), "lin.u": (8,), "lin.weight": (8, 4)},
    "a head called after a mean": {"sub_mean.weight": (16, 3), "sub_mean.bias": (16,)},
    "an action's scale alone": {"action_scale": (6,), "density_grid": (8, 8), "A": (3, 18, 18)},
    "fc": {"layers.0.mlp.version": (512, 512), "encoder.version": (8,), "experts.expert_bias": (8, 512)},
}


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_are_recognised_under_any_prefix(family: str) -> None:
    for prefix in ("", "model.encoder."):
        shapes = {prefix + name: shape for name, shape in BUFFERS[family].items()}
        assert set(find_buffers(specs(shapes))) == set(shapes)


@pytest.mark.parametrize("family", PARAMETERS)
def test_parameters_with_the_names_of_buffers_are_none(family: str) -> None:
    for prefix in ("", "model.encoder."):
        shapes = {prefix + name: shape for name, shape in PARAMETERS[family].items()}
        assert find_buffers(specs(shapes)) == {}


def test_the_rule_that_decided_is_named() -> None:
    assert find_buffers(specs({"rope.inv_freq": (8,)})) == {"rope.inv_freq": "rotary frequencies"}


def test_random_fourier_features_are_a_buffer_from_sam_2_on() -> None:
    shapes = {
        "shared_image_embedding.positional_embedding": (2, 128),
        "prompt_encoder.shared_embedding.positional_embedding": (2, 128),
        "mask_decoder.obj_score_token.weight": (1, 256),
    }
    assert set(find_buffers(specs(shapes))) == set(list(shapes)[:2])


#: Of modules that have parameters too, which tensors are buffers.
MIXED: dict[str, tuple[dict[str, tuple[int, ...]], set[str]]] = {
    "stylegan": (
        {"mapping.w_avg": (8,), "mapping.fc0.weight": (8, 8), "head.w_avg": (8,)},
        {"mapping.w_avg"},
    ),
    "kan": ({"l.grid": (8, 12), "l.spline_weight": (16, 8, 8), "l.spline_scaler": (16, 8)}, {"l.grid"}),
    "residual flow": ({"l.weight": (16, 4, 2), "l.u": (16,), "l.v": (8,), "l.bias": (16,)}, {"l.u", "l.v"}),
    "sngan": ({"l.weight": (16, 8, 3, 3), "l.u": (1, 16)}, {"l.u"}),
    "evonorm": ({"n.weight": (8,), "n.bias": (8,), "n.v": (8,), "n.running_var": (8,)}, {"n.running_var"}),
    "nerfacc": ({"g.occs": (512,), "g.binaries": (1, 8, 8, 8)}, {"g.occs"}),
    "instant-ngp": ({"density_grid": (8, 4096), "density_bitfield": (4096,)}, {"density_grid"}),
    "bevfusion": ({"v.dx": (3,), "v.bx": (3,), "v.nx": (3,)}, {"v.dx", "v.bx"}),
    "bevdepth": ({"voxel_size": (3,), "voxel_num": (3,)}, {"voxel_size", "voxel_num"}),
    "schnetpack": ({"p.atomref": (100,), "p.mean": (1,)}, {"p.atomref"}),
    "kpconv": ({"KPConv.kernel_points": (15, 3), "KPConv.weights": (15, 4, 8)}, {"KPConv.kernel_points"}),
    "st-gcn": ({"A": (3, 18, 18), "edge_importance.0": (3, 18, 18)}, {"A"}),
}


@pytest.mark.parametrize("family", MIXED)
def test_buffers_are_told_from_the_parameters_beside_them(family: str) -> None:
    shapes, buffers = MIXED[family]
    assert set(find_buffers(specs(shapes))) == buffers


NORM = {".weight": (8,), ".bias": (8,), ".running_mean": (8,), ".running_var": (8,)}


@pytest.mark.parametrize(
    ("module", "config", "counter", "frozen"),
    [
        ("backbone.model.bn1", {"model_type": "detr"}, False, True),
        ("backbone.model.bn1", {"model_type": "rt_detr_v2"}, False, True),
        ("backbone.model.bn1", {"model_type": "detr"}, True, False),
        ("backbone.model.bn1", {"model_type": "resnet"}, False, False),
        ("module.bn1", None, False, False),
        ("backbone.0.body.layer1.0.bn1", None, False, True),
        ("backbone.body.bn1", None, False, True),
        ("backbone.bottom_up.stem.conv1.norm", None, False, True),
        ("backbone.body.bn1", None, True, False),
        ("model.backbone.layer1.0.bn1", None, False, True),
        ("model.backbones.0.0.body.bn1", None, False, True),
        ("backbone.conv1.conv1_1.norm", None, False, True),
        ("backbone.conv1.conv1_1.norm", None, True, False),
    ],
)
def test_frozen_batch_norms_are_told_by_the_architecture(
    module: str, config: dict[str, Any] | None, counter: bool, frozen: bool
) -> None:
    shapes: dict[str, tuple[int, ...]] = {module + end: shape for end, shape in NORM.items()}
    if counter:
        shapes[f"{module}.num_batches_tracked"] = ()
    found = find_buffers(specs(shapes), config=config)
    assert (f"{module}.weight" in found, f"{module}.bias" in found) == (frozen, frozen)
    assert f"{module}.running_var" in found


def test_every_rule_names_its_family() -> None:
    assert all(rule.family and rule.end for rule in RULES)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForPreTraining": ("BertConfig", SMALL),
    "DistilBertForMaskedLM": ("DistilBertConfig", {"dim": 32, "n_layers": 1, "n_heads": 2}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL),
    "BartForConditionalGeneration": ("BartConfig", SEQ2SEQ),
    "CLIPModel": ("CLIPConfig", {}),
    "GptOssForCausalLM": ("GptOssConfig", SMALL | EXPERTS),
    "MiniMaxForCausalLM": ("MiniMaxConfig", SMALL | EXPERTS | {"num_hidden_layers": 2}),
    "MambaForCausalLM": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 100}),
    "NemotronHForCausalLM": ("NemotronHConfig", {}),
    "BarkSemanticModel": ("BarkSemanticConfig", {"hidden_size": 32, "num_layers": 1, "num_heads": 2}),
    "EncodecModel": ("EncodecConfig", {}),
    "MimiModel": ("MimiConfig", {"num_hidden_layers": 1}),
    "Sam2Model": ("Sam2Config", {}),
    "SamModel": ("SamConfig", {}),
    "ResNetForImageClassification": ("ResNetConfig", {}),
    "RTDetrForObjectDetection": ("RTDetrConfig", {}),
    "Wav2Vec2ConformerModel": (
        "Wav2Vec2ConformerConfig",
        {"num_hidden_layers": 1, "position_embeddings_type": "rotary"},
    ),
    "SpeechT5HifiGan": ("SpeechT5HifiGanConfig", {}),
    "DonutSwinModel": ("DonutSwinConfig", {}),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rules_agree_with_the_models_of_transformers(architecture: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config_class, options = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**options)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = find_buffers(
        specs({name: tuple(tensor.shape) for name, tensor in state.items()}), config=config.to_dict()
    )
    assert set(found) == set(state) - parameters
