"""NEFTune (Jain et al., 2023): uniform noise on the token embeddings of every batch, in training only.

`E' = E + U(-1, 1) · α / √(L · d)` for embeddings [L, d] of a sentence. L is the batch's padded length in the
common implementation, the sentence's own in the authors', where padding gets no noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from noisytune_cli.study.methods import Batch, Member, Method, Training, Value
from noisytune_cli.study.methods._embeddings import changed_embeddings


class NEFTune(Method):
    """`alpha` is α (5; the paper tries 5, 10 and 15), `length` says which L: padded or true."""

    name = "neftune"
    draws = "always"
    defaults: ClassVar[Mapping[str, Value]] = {"alpha": 5.0, "length": "padded"}

    def __init__(self, **options: Value) -> None:
        super().__init__(**options)
        self.alpha = self.number("alpha")
        self.length = self.choice("length", "padded", "true")

    def loss(self, training: Training, member: Member, batch: Batch) -> Tensor:
        """Return the task's loss on noised embeddings, a scalar."""
        mask = batch.get("attention_mask") if self.length == "true" else None

        def noised(embeddings: Tensor) -> Tensor:
            generator = training.generator_on(embeddings.device)
            noise = torch.empty_like(embeddings).uniform_(-1.0, 1.0, generator=generator)
            return embeddings + noise * self._scale(embeddings, mask)

        with changed_embeddings(member.model, noised):
            return super().loss(training, member, batch)

    def _scale(self, embeddings: Tensor, mask: Tensor | None) -> Tensor | float:
        """Return α / √(L · d): one number, or [B, L, 1] with 0 for padding where a mask [B, L] tells it."""
        length, width = embeddings.shape[-2:]
        if mask is None:
            return self.alpha / math.sqrt(length * width)
        lengths = mask.sum(dim=1, keepdim=True)
        return (mask * self.alpha / (lengths * width).sqrt()).unsqueeze(-1)


METHOD = NEFTune
