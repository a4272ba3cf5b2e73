"""Kinds and layers, told by names."""

from __future__ import annotations

from noisytune_cli.plan.groups import NO_LAYER, OTHER, kinds_of, layers_of


def test_a_name_is_of_its_most_special_kind() -> None:
    assert kinds_of(["attn.q_proj.bias", "attn.q_proj.weight", "lm_head.bias", "temperature"]) == {
        "attn.q_proj.bias": "bias",
        "attn.q_proj.weight": "attention",
        "lm_head.bias": "head",
        "temperature": OTHER,
    }


def test_a_layer_ends_at_the_first_number_that_counts() -> None:
    names = [
        "0.auto_model.encoder.layer.0.output.dense.weight",
        "0.auto_model.encoder.layer.1.output.dense.weight",
        "0.auto_model.embeddings.weight",
        "pooler.dense.weight",
    ]
    assert list(layers_of(names).values()) == [
        "0.auto_model.encoder.layer.0",
        "0.auto_model.encoder.layer.1",
        "0",
        NO_LAYER,
    ]


def test_experts_are_in_their_layer() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(2) for j in range(2)]
    assert set(layers_of(names).values()) == {"model.layers.0", "model.layers.1"}


def test_an_only_layer_is_one() -> None:
    assert layers_of(["h.0.w", "wte.weight"]) == {"h.0.w": "h.0", "wte.weight": NO_LAYER}
