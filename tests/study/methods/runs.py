"""Training runs for tests of methods: tiny models with known weights, and the loop that the engine has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from noisytune_cli.study.combination import MethodCombination
from noisytune_cli.study.methods import Batch, Member, Training


def tiny_bert(labels: int = 3, seed: int = 0, **settings: Any) -> BertForSequenceClassification:
    """Return a BERT of a few hundred weights, in training mode."""
    torch.manual_seed(seed)
    size = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
        "intermediate_size": 12,
        "max_position_embeddings": 16,
    }
    return BertForSequenceClassification(BertConfig(**size, num_labels=labels, **settings)).train()


def batch_of(rows: int = 4, length: int = 6, labels: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Return a batch in which the last row is two tokens shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, -2:] = 0
    return {
        "input_ids": torch.randint(1, 20, (rows, length), generator=generator) * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, labels, (rows,), generator=generator),
    }


def forward(model: nn.Module, batch: Batch, /, **replaced: Tensor | None) -> Tensor:
    """Return the logits, as the engine's forward pass does."""
    inputs = {**{k: v for k, v in batch.items() if k != "labels"}, **replaced}
    logits: Tensor = model(**{k: v for k, v in inputs.items() if v is not None}).logits
    return logits.float()


def training_of(model: Any, *, fresh: frozenset[str] | None = None, **settings: Any) -> Training:
    """Return a run over a model whose parameters named `classifier` are fresh, unless told otherwise."""
    own = dict(model.named_parameters())
    if fresh is None:
        fresh = frozenset(name for name in own if name.startswith("classifier"))
    values: dict[str, Any] = {
        "model": model,
        "anchor": {n: p.detach().clone() for n, p in own.items() if n not in fresh and "lora" not in n},
        "fresh": fresh,
        "regression": False,
        "task_loss": nn.functional.cross_entropy,
        "steps": 10,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "warmup": 0.1,
        "peft": False,
        "init_seed": 0,
        "order_seed": 0,
        "noise_seed": 0,
        "new_member": new_member,
        "forward": forward,
    }
    values |= settings
    values.setdefault("generator", torch.Generator().manual_seed(values["noise_seed"]))
    return Training(**values)


def new_member(model: Any) -> Member:
    """Return a member that goes down the gradient at a constant rate, so that steps can be told by hand."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return Member(model, torch.optim.SGD(trained, lr=0.1), None)


def run(method: MethodCombination, training: Training, batches: list[dict[str, Tensor]]) -> None:
    """Train as the engine does."""
    method.prepare(training)
    optimizer = method.make_optimizer(training)
    member = new_member(training.model)
    training.members = [member if optimizer is None else Member(member.model, optimizer, None)]
    for step, batch in enumerate(batches):
        method.before_step(training, step)
        for member in training.members:
            method.loss(training, member, batch).backward()  # type: ignore[no-untyped-call]
            member.optimizer.step()
            member.optimizer.zero_grad()
        method.after_step(training, step)
    method.finish(training)
