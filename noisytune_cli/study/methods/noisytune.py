"""NoisyTune (Wu et al., ACL 2022): noise on the pretrained weights, once, before finetuning.

`W' = W + U(-λ/2, λ/2) · std(W)`, added by `perturb_` with the run's noise seed. The noise is on what the
checkpoint brought: adapters never get any, and fresh parameters, of which the paper says nothing, only where
asked.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from typing import ClassVar

import torch

from noisytune_cli.memory.perturb import perturb_
from noisytune_cli.records import Manifest, Scope
from noisytune_cli.study.methods import Method, Training, Value


class NoisyTune(Method):
    """Noise before finetuning: λ 0.15, uniform, each matrix's own std (the paper's choice for GLUE).

    `exclude` holds patterns separated by commas, on the names that the model has without adapters; `fresh`
    puts noise on the freshly initialised head too. `manifest` is the record of the noise.
    """

    name = "noisytune"
    draws = "always"
    defaults: ClassVar[Mapping[str, Value]] = {
        "lambda": 0.15,
        "noise": "uniform",
        "scope": "matrix",
        "fresh": False,
        "exclude": "",
    }
    manifest: Manifest | None = None

    def __init__(self, **options: Value) -> None:
        super().__init__(**options)
        self.lam = self.number("lambda")
        self.noise = self.choice("noise", "uniform", "gaussian")
        self.scope: Scope = "global" if self.choice("scope", "matrix", "global") == "global" else "matrix"
        self.fresh = bool(self.options["fresh"])
        self.exclude = [pattern for pattern in str(self.options["exclude"]).split(",") if pattern]

    def prepare(self, training: Training) -> None:
        """Perturb the weights, and make them the anchor where the noised ones are to be it.

        Raises UsageError for a pattern that matches nothing, or where nothing is left to perturb.
        """
        parameters = dict(training.model.named_parameters())
        spared = parameters.keys() - training.anchor.keys() - (training.fresh if self.fresh else set())
        self.manifest = perturb_(
            training.model,
            self.lam,
            training.noise_seed,
            noise=self.noise,
            scope=self.scope,
            exclude=self.exclude,
            fresh_names=sorted(map(glob.escape, spared)),
        )
        with torch.no_grad():
            # Of a module that is trained beside adapters peft keeps the original, which is the base's and
            # has its noise, and trains a copy.
            for name, parameter in parameters.items():
                own = name.replace(".modules_to_save.default.", ".original_module.")
                if own != name:
                    parameter.copy_(training.model.get_parameter(own))
        if training.anchor_kind == "noised":
            training.anchor = {name: parameters[name].detach().clone() for name in training.anchor}


METHOD = NoisyTune
