import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisytune_cli.errors import UsageError
from noisytune_cli.plan.groups import kinds_of
from noisytune_cli.plan.patterns import KINDS, check_matched, compile_pattern, match_names

#: A name of each family, and the kinds it belongs to.
MEMBERS = {
    "bert.embeddings.word_embeddings.weight": "@embeddings",
    "bert.embeddings.token_type_embeddings.weight": "@embeddings",
    "bert.embeddings.LayerNorm.bias": "@norm @bias",
    "bert.embeddings.LayerNorm.beta": "@norm @bias",
    "bert.encoder.layer.11.attention.self.query.bias": "@attention @bias",
    "bert.encoder.layer.11.attention.output.LayerNorm.weight": "@norm",
    "bert.encoder.layer.11.intermediate.dense.weight": "@mlp",
    "bert.encoder.layer.11.output.dense.weight": "@mlp",
    "bert.pooler.dense.weight": "",
    "cls.predictions.transform.LayerNorm.weight": "@head @norm",
    "cls.predictions.decoder.weight": "@head",
    "cls.seq_relationship.bias": "@head @bias",
    "lm_head.dense.weight": "@head",
    "distilbert.transformer.layer.0.attention.q_lin.weight": "@attention",
    "distilbert.transformer.layer.0.sa_layer_norm.weight": "@norm",
    "distilbert.transformer.layer.0.ffn.lin1.weight": "@mlp",
    "vocab_projector.weight": "@head",
    "albert.encoder.embedding_hidden_mapping_in.weight": "",
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight": "@mlp",
    "discriminator_predictions.dense.weight": "@head",
    "deberta.encoder.rel_embeddings.weight": "@embeddings",
    "transformer.wte.weight": "@embeddings",
    "transformer.wpe.weight": "@embeddings",
    "transformer.h.0.attn.c_attn.weight": "@attention",
    "transformer.h.0.mlp.c_fc.bias": "@mlp @bias",
    "transformer.ln_f.weight": "@norm",
    "base_model.model.score.weight": "@head",
    "gpt_neox.embed_in.weight": "@embeddings",
    "gpt_neox.layers.3.attention.query_key_value.weight": "@attention",
    "gpt_neox.layers.3.post_attention_layernorm.weight": "@norm",
    "embed_out.weight": "@head",
    "model.embed_tokens.weight": "@embeddings",
    "module.model.layers.0.self_attn.q_proj.weight": "@attention",
    "model.layers.0.self_attn.q_norm.weight": "@norm",
    "model.layers.0.mlp.gate_up_proj.weight": "@mlp",
    "model.layers.0.block_sparse_moe.experts.7.w1.weight": "@mlp",
    "model.layers.0.self_attn.sinks": "@attention",
    "model.norm.weight": "@norm",
    "lm_head.weight": "@head",
    "shared.weight": "@embeddings",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "@attention",
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": "@mlp",
    "decoder.block.0.layer.1.EncDecAttention.q.weight": "@attention",
    "model.encoder.layers.10.fc1.weight": "@mlp",
    "model.encoder.layers.10.encoder_attn.v_proj.bias": "@attention @bias",
    "model.decoder.embed_positions.weight": "@embeddings",
    "proj_out.weight": "@head",
    "transformer_blocks.0.proj_out.weight": "",
    # The models of a folder of several.
    "text_encoder_2/shared.weight": "@embeddings",
    "transformer/proj_out.weight": "@head",
    "transformer/transformer_blocks.0.proj_out.weight": "",
    "2_StaticEmbedding/embedding.weight": "@embeddings",
    "unet/norm.weight": "@norm",
    # Names that are paths, as JAX and TensorFlow have them.
    "bert/encoder/layer_0/attention/output/LayerNorm/gamma": "@norm",
    "bert/encoder/layer_0/attention/output/LayerNorm/beta": "@norm @bias",
    "params/encoder/layers_0/mlp/wi_0/kernel": "@mlp",
    "params/lm_head/kernel": "@head",
    "params/token_embeddings/embedding": "@embeddings",
    "vit/Transformer/encoderblock_0/MultiHeadAttention_1/query/bias": "@attention @bias",
    # Norms in a list or a dictionary, and what a norm is steered by.
    "swin.hidden_states_norms.stage1.weight": "@norm",
    "model.layers.0.self_attn.q_layernorm.norms.3.weight": "@norm",
    "enc_output_norm.0.bias": "@norm @bias",
    "transformer_blocks.0.norm1.linear.weight": "",
    "vit.embeddings.position_embeddings": "@embeddings",
    "vit.embeddings.patch_embeddings.projection.weight": "",
    "swin.encoder.layers.2.blocks.4.output.dense.weight": "@mlp",
    "classifier.weight": "@head",
    "vision_model.pre_layrnorm.weight": "@norm",
    "visual.positional_embedding": "@embeddings",
    "backbone.embeddings.weight": "@embeddings",
    "backbone.layers.0.mixer.A_log": "",
    "backbone.layers.0.mixer.in_proj.weight": "",
    "backbone.layers.0.mixer.dt_proj.bias": "@bias",
    "model.layers.2.mixer.q_proj.weight": "@attention",
    "blocks.3.att.key.weight": "@attention",
    "encoder.layers.0.self_att.att.in_proj_weight": "@attention",
    "encoder.layers.0.matte.weight": "",
    "model.layers.3.mixer.up_proj.weight": "@mlp",
    "layer1.0.bn2.weight": "@norm",
    "conv1_BN.weight": "@norm",
    "lstm.bias_ih_l0_reverse": "@bias",
    "transformer.norm1.linear.weight": "",
    # Feed-forward blocks in a list that is called after attention.
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": "@mlp",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.bias": "@attention @bias",
    "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight": "@norm",
    "down_blocks.0.attentions.0.proj_in.weight": "@attention",
    "attn_layers.layers.1.1.ff.0.0.weight": "@mlp",
    "cross_attention.mlp.dense1.weight": "@mlp",
    "blocks.0.attn.cpb_mlp.0.weight": "@attention",
    # Tables of ESPnet, audiocraft, DLRM, torchrec, DiT, recommenders; attention of OpenFold; wrappers.
    "decoder.left_decoder.embed.0.weight": "@embeddings",
    "emb.3.weight": "@embeddings",
    "emb_l.11.weight": "@embeddings",
    "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_0.weight": "@embeddings",
    "y_embedder.embedding_table.weight": "@embeddings",
    "item_embedding.weight": "@embeddings",
    "shared.lora_embedding_A.default": "@embeddings",
    "params/shared/embedding": "@embeddings",
    "encoder.initial_splitter.shared.glu_layers.0.fc.weight": "",
    "shared.0.weight_orig": "",
    "evoformer.blocks.0.msa_att_row.mha.linear_q.weight": "@attention",
    "evoformer.blocks.0.msa_att_row.layer_norm_m.weight": "@norm",
    "decoder.mha.out.weight": "@attention",
    "encoder.attr_embed.matt_x.weight": "",
    "_fsdp_wrapped_module._orig_mod.head.weight": "@head",
    # Tables and heads of minGPT, Megatron, ChatGLM, Gemma, XTTS, DETR, detectron2, mmsegmentation, ESPnet.
    "transformer.tok_emb.weight": "@embeddings",
    "transformer.pos_emb": "@embeddings",
    "embedder.weight": "@embeddings",
    "gpt.mel_embedding.weight": "@embeddings",
    "gpt.mel_head.weight": "@head",
    "text_embedding.0.weight": "",
    "vision_model.embeddings.patch_embedding.weight": "",
    "time_embed.0.weight": "",
    "transformer.output_layer.weight": "@head",
    "module.language_model.output_layer.bias": "@head @bias",
    "encoder.layers.0.output_layer.weight": "",
    "class_embed.weight": "@head",
    "roi_heads.box_predictor.cls_score.bias": "@head @bias",
    "decode_head.conv_seg.weight": "@head",
    "ctc.ctc_lo.weight": "@head",
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_parameter_belongs_to_the_kinds_of_its_family(name: str) -> None:
    kinds = [kind for kind in KINDS if match_names([kind], [name])[0]]
    assert sorted(kinds) == sorted(MEMBERS[name].split())


def test_kinds_tell_names_with_the_same_numbers_apart() -> None:
    names = ["layers.0.fc1.weight", "layers.0.fc3.weight", "layers.12.fc1.weight"]
    assert match_names(["@mlp"], names) == [{names[0], names[2]}]


def test_a_buffer_is_of_no_kind() -> None:
    names = ["h.0.attn.bias", "h.0.attn.c_attn.bias"]
    assert match_names(["@bias", "*.bias"], names, {"h.0.attn.bias"}) == [{names[1]}, set(names)]


def test_a_norm_is_told_by_its_shapes_whatever_it_is_called() -> None:
    norms = {f"{m}.{own}": (8,) for m in ("layer1.0.downsample.1", "mlp.1") for own in ("weight", "bias")}
    layers = {"layer1.0.downsample.0.weight": (8, 4, 1, 1), "mlp.0.weight": (8, 4), "mlp.0.bias": (8,)}
    layers |= {"mlp.2.weight": (8,), "mlp.3.weight": (1,), "mlp.3.bias": (8,)}
    shapes = {"mlp.1.running_mean": (8,), **norms, **layers}
    of_norm, of_mlp = match_names(["@norm", "@mlp"], list(shapes), {"mlp.1.running_mean"}, shapes)
    assert of_norm == set(norms)
    assert of_mlp == {name for name in layers if name.startswith("mlp")}
    # One that is frozen has buffers alone.
    assert match_names(["@norm"], list(shapes), set(norms), shapes) == [frozenset()]
    assert kinds_of(list(shapes), (), shapes)["mlp.1.bias"] == "norm"
    assert kinds_of(list(shapes))["mlp.1.bias"] == "bias"


def test_what_has_a_bias_is_no_table() -> None:
    layers = [
        "embed.weight",
        "embed.bias",
        "encoder.embed.0.weight",
        "pos_embed.0.weight",
        "pos_embed.0.bias",
    ]
    names = [*layers, "encoder.embed.0.bias", "decoder.embed.0.weight"]
    assert match_names(["@embeddings"], names) == [{"decoder.embed.0.weight"}]


_PARTS = ["*", "?", "[ab]", "[!a]", "[", "]", "!", "a", "b", ".", "A", "\n", "a.b"]


@given(
    st.lists(st.sampled_from(_PARTS), min_size=1, max_size=6).map("".join),
    st.lists(st.text("abA.[]!\n", max_size=6), max_size=8, unique=True),
)
def test_a_pattern_matches_as_fnmatchcase_does(pattern: str, names: list[str]) -> None:
    assert match_names([pattern], names) == [{name for name in names if fnmatch.fnmatchcase(name, pattern)}]


def test_a_name_that_begins_with_an_at_sign_can_be_matched() -> None:
    assert match_names(["[@]norm"], ["@norm", "norm"]) == [{"@norm"}]


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(UsageError) as raised:
        compile_pattern("@norms")
    assert all(kind in str(raised.value) for kind in KINDS)
    assert "Did you mean @norm?" in str(raised.value)


def test_an_empty_pattern_is_refused() -> None:
    with pytest.raises(UsageError, match="empty pattern"):
        compile_pattern("")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("*.layernorm.*", "case-sensitive; perhaps bert.LayerNorm.weight is meant"),
        ("bert.LayerNrom.weight", "Perhaps bert.LayerNorm.weight"),
        ("*quary.weight", "Perhaps bert.query.weight"),
        ("zzz", "whole name"),
        ("@mlp", "Leave it out"),
    ],
)
def test_a_pattern_that_matches_nothing_suggests_what_was_meant(pattern: str, hint: str) -> None:
    names = ["bert.LayerNorm.weight", "bert.query.weight"]
    with pytest.raises(UsageError, match="matches nothing") as raised:
        check_matched([pattern], match_names([pattern], names), names)
    assert hint in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_pattern_that_matches_is_not_refused() -> None:
    check_matched(["a*"], match_names(["a*"], ["ab"]), ["ab"])
    assert compile_pattern("a*").matches("ab")
    assert not compile_pattern("a*").matches("ba")
