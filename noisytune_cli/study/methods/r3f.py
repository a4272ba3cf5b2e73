"""R3F (Aghajanyan et al., ICLR 2021): the prediction may not move when the embeddings move a little.

`L = L_task + λ · [KL(p‖q) + KL(q‖p)]`: p from the clean forward pass, q from one whose raw token embeddings
got noise. Details are of the authors' code (fairseq's `sentence_prediction_r3f`): the noised branch's
embeddings are detached, both logits keep their gradients, the divergence is in float32, summed over classes
and averaged over the batch, and a regression has plain squared error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from noisytune_cli.study.methods import Batch, Member, Method, Training, Value
from noisytune_cli.study.methods._embeddings import changed_embeddings


class R3F(Method):
    """Two forward passes, one backward, in training only.

    `lambda` weighs the divergence (1.0: the authors' code; the paper searched 0.1, 0.5, 1, 5 and its example
    on RTE has 0.7), `sigma` is the noise's size (1e-5), `noise` its kind: U(-σ, σ) or N(0, σ²).
    """

    name = "r3f"
    draws = "classification"
    defaults: ClassVar[Mapping[str, Value]] = {"lambda": 1.0, "sigma": 1e-5, "noise": "uniform"}

    def __init__(self, **options: Value) -> None:
        super().__init__(**options)
        self.lam = self.number("lambda")
        self.sigma = self.number("sigma")
        self.noise = self.choice("noise", "uniform", "normal")

    def loss(self, training: Training, member: Member, batch: Batch) -> Tensor:
        """Return the task's loss plus λ times the symmetric divergence, a scalar."""
        logits = training.forward(member.model, batch)
        loss = training.task_loss(logits, batch["labels"])
        if training.regression:
            return loss
        with changed_embeddings(member.model, lambda embeddings: self._noised(embeddings, training)):
            noised = training.forward(member.model, batch)
        return loss + self.lam * symmetric_divergence(logits, noised)

    def _noised(self, embeddings: Tensor, training: Training) -> Tensor:
        generator = training.generator_on(embeddings.device)
        noise = torch.empty_like(embeddings)
        if self.noise == "uniform":
            noise.uniform_(-self.sigma, self.sigma, generator=generator)
        else:
            noise.normal_(0.0, self.sigma, generator=generator)
        return embeddings.detach() + noise


def symmetric_divergence(left: Tensor, right: Tensor) -> Tensor:
    """Return KL(p‖q) + KL(q‖p) = Σ (p-q)(ln p - ln q) in nats, the batch's mean, for logits [B, C]."""
    p, q = (functional.log_softmax(logits.float(), dim=-1) for logits in (left, right))
    return ((p.exp() - q.exp()) * (p - q)).sum() / left.shape[0]


METHOD = R3F
