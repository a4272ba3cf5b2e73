"""SWA: the mean of the right weights, and of nothing else."""

from __future__ import annotations

import pytest
import torch

from noisytune_cli.study.combination import combine

from .runs import new_member, tiny_bert, training_of


@pytest.mark.parametrize(
    ("steps", "start", "first"), [(8, 0.25, 2), (10, 0.25, 2), (4, 0.0, 0), (5, 1.0, 4), (1, 0.25, 0)]
)
def test_the_weights_are_the_mean_from_the_first_step_that_counts(
    steps: int, start: float, first: int
) -> None:
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    training = training_of(model, steps=steps)
    training.members = [new_member(model)]
    method = combine("swa", {"swa.start": start})
    weight, frozen = model.classifier.weight, model.bert.embeddings.word_embeddings.weight.detach().clone()
    taken = []
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        if step >= first:
            taken.append(weight.detach().double())
        method.after_step(training, step)
        assert torch.equal(weight.detach().double(), taken[-1]) if taken else True
    method.finish(training)
    assert len(taken) == steps - first
    assert torch.allclose(weight.detach().double(), torch.stack(taken).mean(0), atol=1e-6)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, frozen)
