"""Stochastic weight averaging (Izmailov et al., UAI 2018): evaluate the mean of the weights along the way.

As a baseline in DENI's comparison (Pecher et al., 2024) it begins at a quarter of the steps. The learning
rate is the run's own, so that the average is all that differs from plain finetuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from noisytune_cli.study.methods import Method, Training, Value


class SWA(Method):
    """`start` is the share of the steps before the first one whose weights count (0.25)."""

    name = "swa"
    defaults: ClassVar[Mapping[str, Value]] = {"start": 0.25}
    one_model = True

    def __init__(self, **options: Value) -> None:
        super().__init__(**options)
        self.start = self.number("start", 0.0, 1.0)
        self._mean: list[Tensor] = []
        self._counted = 0
        self._average = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    def after_step(self, training: Training, step: int) -> None:
        """Take the weights after this step into the mean; those of the last step always count."""
        if step < min(int(self.start * training.steps), training.steps - 1):
            return
        weights = _trained(training)
        if not self._counted:
            self._mean = [weight.clone() for weight in weights]
        else:
            self._average(self._mean, weights, self._counted)
        self._counted += 1

    def finish(self, training: Training) -> None:
        """Put the mean in the weights' place."""
        for weight, mean in zip(_trained(training), self._mean, strict=True):
            weight.copy_(mean)


def _trained(training: Training) -> list[Tensor]:
    return [p.detach() for p in training.members[0].model.parameters() if p.requires_grad]


METHOD = SWA
