"""R4F (Aghajanyan et al., ICLR 2021): R3F with a head that cannot stretch, `W / σ_max(W)`.

The paper bounds the whole head; the authors' code bounds its output projection only, and so does this. torch
follows σ_max by one step of power iteration in each forward pass.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import PreTrainedModel

from noisytune_cli.errors import InputInvalid
from noisytune_cli.study.methods import Training
from noisytune_cli.study.methods.r3f import R3F


class R4F(R3F):
    """R3F's loss and options; the head's output projection is under spectral norm while it is trained.

    torch cannot take the norm out of several copies of one layer, so there is one model.
    """

    name = "r4f"
    one_model = True

    def prepare(self, training: Training) -> None:
        """Put the output projection under spectral norm; the weights trained stay the same parameters."""
        projection = output_projection(training.model)
        # torch draws the first singular vectors from its global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=training.generator)))
            parametrizations.spectral_norm(projection)

    def finish(self, training: Training) -> None:
        """Leave W / σ_max(W) as the weight."""
        parametrize.remove_parametrizations(output_projection(training.model), "weight")


def output_projection(model: PreTrainedModel) -> nn.Linear:
    """Return the last trained linear layer with one output a label; InputInvalid where there is none."""
    outputs = model.config.num_labels
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.out_features == outputs
        and any(p.requires_grad for p in module.parameters())
    ]
    if not found:
        raise InputInvalid(
            f"r4f cannot bound the head of {type(model).__name__}",
            why=f"no linear layer that is trained has {outputs} outputs",
            next_step="Use r3f, which leaves the head alone",
        )
    return found[-1]


METHOD = R4F
