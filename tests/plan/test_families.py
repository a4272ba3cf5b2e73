"""Which tensors of known models divide into which matrices, against plain indexing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from matrices import LAYOUTS, indices

from noisytune_cli.manifest.consistency import cover_exactly
from noisytune_cli.plan.split import Division, divide
from noisytune_cli.records import Part, TensorSpec


def divisions(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None) -> dict[str, Division]:
    specs = [TensorSpec(n, "F32", s, "", 0, 4 * int(np.prod(s))) for n, s in shapes.items()]
    return divide(specs, (), (), config)


def elements(part: Part) -> list[int]:
    return [part.first + r * part.stride + i for r in range(part.repeat) for i in range(part.length)]


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_matrices_are_those_of_the_forward_pass(family: str) -> None:
    layout = LAYOUTS[family]
    found = divisions({layout.name: layout.shape, **layout.beside}, layout.config)[layout.name]
    expected = indices(layout.shape, layout.slicing)
    assert found.undivided is None
    assert {part.name: sorted(elements(part)) for part in found.parts} == {
        name: sorted(own.tolist()) for name, own in expected.items()
    }
    assert all(np.prod(part.shape) == part.elements for part in found.parts)
    assert cover_exactly(found.parts, int(np.prod(layout.shape)))


@pytest.mark.parametrize(
    ("name", "shape", "config", "why"),
    [
        ("l.0.attention.query_key_value.weight", (48, 16), None, "no config names it"),
        ("l.0.self_attn.qkv_proj.weight", (32, 16), {}, "no config names it"),
        ("l.0.self_attn.qkv_proj.weight", (32, 16), {"model_type": "new"}, "type new is not known"),
        ("l.0.self_attn.qkv_proj.weight", (32, 16), {"model_type": "phi3"}, "does not give sizes"),
        (
            "l.0.self_attn.qkv_proj.weight",
            (40, 16),
            {"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
            "does not give sizes",
        ),
        ("l.0.query_key_value.weight", (24, 16), {"model_type": "falcon"}, "how its heads are stored"),
        (
            "l.0.query_key_value.weight",
            (25, 16),
            {
                "model_type": "falcon",
                "new_decoder_architecture": False,
                "multi_query": True,
                "num_attention_heads": 4,
            },
            "its size is 25",
        ),
        ("h.0.attn.c_attn.weight", (24, 8), None, "no config names it"),
        ("h.0.attn.c_attn.weight", (24, 8), {"model_type": "gpt_bigcode"}, "how its heads are stored"),
        ("blocks.0.attn.qkv.weight", (24, 8), None, "no config names it"),
        ("b.experts.mlp.w1", (12, 8), {"model_type": "dbrx"}, "how many experts"),
        ("h.0.attn.qkv_proj.weight", (47, 16), {"model_type": "codegen"}, "its size is 47"),
    ],
)
def test_what_is_not_certain_stays_whole_and_says_why(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any] | None, why: str
) -> None:
    division = divisions({name: shape}, config)[name]
    assert not division.parts
    assert why in str(division.undivided)


@pytest.mark.parametrize(
    "shapes",
    [
        {"mlp.experts.gate_up_proj": (3, 12, 8)},
        {"mlp.experts.gate_up_proj": (3, 12, 8), "mlp.experts.down_proj": (3, 8, 5)},
        {
            "mlp.experts.gate_up_proj": (3, 8, 12),
            "mlp.experts.gate_up_proj_bias": (3, 12),
            "mlp.experts.down_proj": (3, 6, 8),
        },
    ],
)
def test_an_expert_is_one_matrix_where_gate_and_up_cannot_be_told_apart(
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    found = divisions(shapes, None)["mlp.experts.gate_up_proj"]
    assert [part.name for part in found.parts] == ["expert.0", "expert.1", "expert.2"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bert.encoder.layer.0.attention.self.query.weight", (16, 16)),
        ("mamba.layers.0.mixer.in_proj.weight", (32, 16)),
        ("conv1.weight", (8, 4, 3)),
        ("attn.in_proj_weight", (24, 9)),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", (8, 8)),
        ("attn.c_attn.lora_A.weight", (4, 8)),
        ("stage.0.fc1.weight", (8, 8, 3)),
        ("encoder.input_linear.weight", (16, 8)),
    ],
)
def test_other_tensors_are_one_matrix(name: str, shape: tuple[int, ...]) -> None:
    assert name not in divisions({name: shape}, {"model_type": "granitemoehybrid"})


def test_sizes_come_from_the_config_of_the_tower_that_fits() -> None:
    name = "language_model.layers.0.self_attn.qkv_proj.weight"
    text = {
        "model_type": "phi3",
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    config = {"vision_config": {"hidden_size": 8, "num_attention_heads": 2}, "text_config": text}
    found = divisions({name: (48, 16)}, config)[name]
    assert [(part.name, part.shape) for part in found.parts] == [
        ("q", (32, 16)),
        ("k", (8, 16)),
        ("v", (8, 16)),
    ]


def test_a_stack_too_long_to_record_stays_whole() -> None:
    found = divisions({"mlp.experts.down_proj": (5000, 2, 2)}, None)["mlp.experts.down_proj"]
    assert not found.parts
    assert found.undivided == "it has 5,000 matrices, too many to record"
