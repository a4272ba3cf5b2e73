"""Weight noise during training, a baseline in DENI's comparison (Pecher et al., 2024).

Every so many steps, `W += √(v / step) · N(0, 1) · std(W)` with the tensor's current std. What gets noise is
what gets it in DENI: the head in full finetuning, everything trained where adapters are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from noisytune_cli.errors import UsageError
from noisytune_cli.plan.patterns import match_names
from noisytune_cli.study.methods import Method, Training, Value, plain_name


class WeightNoise(Method):
    """`v` is the variance before it decays (0.15); the others are shares of the run's steps.

    Noise comes after step `begin` (0.3) and from there every `every` (0.02: 25 of the paper's 1,250 steps)
    until `end` (0.9).
    """

    name = "weightnoise"
    draws = "always"
    defaults: ClassVar[Mapping[str, Value]] = {"v": 0.15, "begin": 0.3, "end": 0.9, "every": 0.02}
    one_model = True

    def __init__(self, **options: Value) -> None:
        super().__init__(**options)
        self.v = self.number("v")
        self.begin, self.end, self.every = (self.number(k, 0.0, 1.0) for k in ("begin", "end", "every"))

    def prepare(self, training: Training) -> None:
        """See that there is something to add noise to."""
        check_noised(self.name, training)

    def after_step(self, training: Training, step: int) -> None:
        """Add noise where it is due."""
        taken, steps = step + 1, training.steps
        begin, every = max(round(self.begin * steps), 1), max(round(self.every * steps), 1)
        if begin <= taken < round(self.end * steps) and (taken - begin) % every == 0:
            add_gaussian(training, training.members[0].model, math.sqrt(self.v / taken))


def add_gaussian(training: Training, model: nn.Module, scale: float) -> None:
    """Add scale · N(0, 1) · std(W) in place to what gets noise during training; one element has no std."""
    with torch.no_grad():
        for weight in noised(training, model):
            if weight.numel() > 1:
                noise = torch.empty_like(weight)
                noise.normal_(generator=training.generator_on(weight.device))
                weight.add_(noise * (scale * weight.std()))


def noised(training: Training, model: nn.Module) -> Iterator[Tensor]:
    """Yield what gets noise during training: all that is trained under peft, else the head.

    The head is what was freshly initialised; where nothing was, what `@head` names.
    """
    trained = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    head = training.fresh or match_names(["@head"], list(trained))[0]
    yield from (p for name, p in trained.items() if training.peft or name in head)


def check_noised(method: str, training: Training) -> None:
    """Raise UsageError where nothing would get noise."""
    if not any(True for _ in noised(training, training.model)):
        raise UsageError(
            f"{method} has nothing to add noise to",
            why="the model has no fresh parameters and none that are named as a head",
            next_step="Leave the method out, or use --lora, where all that is trained gets noise",
        )


METHOD = WeightNoise
