"""DENI, a delayed ensemble with noisy interpolation (Pecher et al., Findings of EMNLP 2024).

One model is trained. Twice on the way it becomes ten for a while: nine noised copies with optimizers of their
own, on the same batches, whose mean it then is (noisy interpolation, `√(v/step) · N(0,1) · std(W)`). Near
the end it becomes ten for good (delayed ensemble, `√v`, undecayed), which predict by majority vote. This is
the intended algorithm: the released code evaluates the one model in place of every member.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from noisytune_cli.errors import UsageError
from noisytune_cli.study.methods import Method, Training, Value
from noisytune_cli.study.methods.weightnoise import add_gaussian, check_noised

#: What happens before a step: copies are made, or merged into their mean, or made for good.
Event = Literal["clone", "merge", "ensemble"]


class DENI(Method):
    """`members` (10) models, `v` (0.15) the variance of the noise; the others are shares of the run's steps.

    Copies are made from `begin` (0.3) until `end` (0.6) once `interval` (0.1) has passed since the last
    change, and merged after another; at `final` (0.9) they are made for good. Full finetuning puts noise on
    the head only, peft on all that is trained.
    """

    name = "deni"
    draws = "always"
    defaults: ClassVar[Mapping[str, Value]] = {
        "members": 10,
        "v": 0.15,
        "begin": 0.3,
        "end": 0.6,
        "interval": 0.1,
        "final": 0.9,
    }

    def __init__(self, **options: Value) -> None:
        super().__init__(**options)
        self.members = int(self.number("members", 2))
        self.v = self.number("v")
        shares = [self.number(key, 0.0, 1.0) for key in ("begin", "end", "interval", "final")]
        self.begin, self.end, self.interval, self.final = shares
        if not (self.begin <= self.end and self.end + self.interval <= self.final + 1e-9):
            raise UsageError(
                f"deni's schedule {self.begin:g}, {self.end:g}, {self.interval:g}, {self.final:g}",
                why="begin may not be after end, nor end + interval after final",
                next_step="The defaults are 0.3, 0.6, 0.1, 0.9",
            )
        self._events: dict[int, Event] = {}

    def prepare(self, training: Training) -> None:
        """Lay down the schedule."""
        check_noised(self.name, training)
        self._events = schedule(training.steps, self.begin, self.end, self.interval, self.final)

    def before_step(self, training: Training, step: int) -> None:
        """Make copies or merge them where the schedule says so."""
        event = self._events.get(step)
        if event in ("merge", "ensemble"):
            merge(training)
        if event == "clone":
            self._clone(training, math.sqrt(self.v / max(step, 1)))
        elif event == "ensemble":
            self._clone(training, math.sqrt(self.v))

    def _clone(self, training: Training, scale: float) -> None:
        base = training.members[0].model
        for _ in range(self.members - 1):
            # What is frozen is never written to, so the copies share it.
            frozen = {id(p): p for p in base.parameters() if not p.requires_grad}
            clone = copy.deepcopy(base, frozen)
            add_gaussian(training, clone, scale)
            training.members.append(training.new_member(clone))


def schedule(steps: int, begin: float, end: float, interval: float, final: float) -> dict[int, Event]:
    """Return what happens before which step of a run; all but `steps` are shares of it.

    For 1,250 steps and the paper's shares: clone at 375 and 625, merge at 500 and 750, ensemble at 1,125.
    """
    first, last, wait = round(begin * steps), round(end * steps), max(round(interval * steps), 1)
    events: dict[int, Event] = {}
    changed, cloned = 0, False
    ensemble = min(round(final * steps), steps - 1)
    for step in range(ensemble):
        due = step - changed >= wait
        if due and (cloned or first <= step < last):
            events[step] = "merge" if cloned else "clone"
            changed, cloned = step, not cloned
    return {**events, ensemble: "ensemble"}


def merge(training: Training) -> None:
    """Make the first member the mean of all, and let the others go; it keeps its optimizer's state."""
    models: list[nn.Module] = [member.model for member in training.members]
    with torch.no_grad():
        for first, *others in zip(*(model.parameters() for model in models), strict=True):
            if others and first.requires_grad:
                first.copy_(torch.stack([first, *others]).mean(dim=0))
    del training.members[1:]


METHOD = DENI
