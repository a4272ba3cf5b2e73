"""The methods on encoders and decoders that name and build things in other ways than BERT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from noisytune_cli.study.combination import combine
from noisytune_cli.study.methods.mixout import dropouts

from .runs import batch_of, forward, run, training_of

SIZE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 20,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "num_labels": 3,
}
CONFIGS: dict[str, Any] = {
    "roberta": lambda: transformers.RobertaConfig(**SIZE),
    "albert": lambda: transformers.AlbertConfig(**SIZE, embedding_size=6),
    "deberta": lambda: transformers.DebertaV2Config(**SIZE, relative_attention=True, pos_att_type=["p2c"]),
    "qwen3": lambda: transformers.Qwen3Config(**SIZE, head_dim=4, num_key_value_heads=2),
}


def model_of(architecture: str) -> tuple[Any, frozenset[str]]:
    """Return a model in training, and the names of its head."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[architecture]())
    head = (n for n, _ in model.named_parameters() if n.startswith(("classifier.", "score.")))
    return model.train(), frozenset(head)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("method", ["noisytune+mixout", "noisytune+recadam", "r4f"])
def test_a_method_trains_body_and_head(architecture: str, method: str) -> None:
    model, head = model_of(architecture)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    method_of = combine(method, {"recadam.t0": 0.0})
    run(method_of, training_of(model, fresh=head, steps=2), [batch_of(seed=i) for i in range(2)])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert head & moved
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(moved & linear) > len(linear) / 2


@pytest.mark.parametrize("architecture", CONFIGS)
def test_all_dropout_is_found(architecture: str) -> None:
    model, _ = model_of(architecture)
    for module, attribute in dropouts(model):
        setattr(module, attribute, 0.0)
    assert torch.equal(forward(model, batch_of()), forward(model, batch_of()))
