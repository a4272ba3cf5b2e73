"""Finetuning methods: one file each; the file's name is the name a user types.

A method module offers `METHOD`, a class that derives from `Method`. A method hooks into one training run, and
every hook does nothing by default. The run's loop, which is the engine's, is

    prepare; make_optimizer (None: the engine's AdamW); for every step:
        before_step; for every member: loss, backward, clip, optimizer, scheduler; after_step
    finish, then evaluation

so that `plain` is the class with no hook at all. How several are combined is in `combination`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from noisytune_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel

#: What an option of a method may be.
Value = float | int | str | bool

#: A batch: the model's inputs by name (input_ids [B, L], attention_mask [B, L]…) and `labels` [B].
Batch = Mapping[str, "Tensor"]


class Forward(Protocol):
    """The engine's forward pass: logits [B, C] in float32, under autocast where the device has it.

    `labels` never reach the model. An input given by name takes the place of the batch's; one that is None
    is left out.
    """

    def __call__(self, model: nn.Module, batch: Batch, /, **replaced: Tensor | None) -> Tensor: ...


class TaskLoss(Protocol):
    """The task's mean loss, a scalar, of logits [B, C] in float32 and labels [B]."""

    def __call__(self, logits: Tensor, labels: Tensor, /) -> Tensor: ...


class NewMember(Protocol):
    """The engine's way to make a model a member: an optimizer of the run's kind, at a constant rate."""

    def __call__(self, model: nn.Module, /) -> Member: ...


def plain_name(name: str) -> str:
    """Return a parameter's name as it is without a parametrization such as r4f's."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")


@dataclass(slots=True)
class Member:
    """One model in training, with an optimizer of its own; without a scheduler its rate is constant."""

    model: PreTrainedModel
    optimizer: Optimizer
    scheduler: LRScheduler | None


@dataclass(slots=True)
class Training:
    """One run as its methods see it; the engine makes it, `prepare` sees it without members.

    `anchor` holds the pretrained values by the names that `model.named_parameters()` has, with no freshly
    initialised parameter and no adapter in it; its tensors are shared between runs and never changed. It is
    of the original weights; where `anchor_kind` is "noised", noisytune puts its own there. `fresh` names
    the freshly initialised parameters. `steps` counts the optimizer's steps of the whole run, `warmup` is a
    share of them. `peft`: only adapters and the head are trained. `generator` is on the CPU, seeded with
    `noise_seed`, and the only randomness for a method's noise, which `generator_on` a device follows.
    """

    model: PreTrainedModel
    anchor: Mapping[str, Tensor]
    fresh: frozenset[str]
    regression: bool
    task_loss: TaskLoss
    steps: int
    learning_rate: float
    weight_decay: float
    warmup: float
    peft: bool
    init_seed: int
    order_seed: int
    noise_seed: int
    generator: torch.Generator
    new_member: NewMember
    forward: Forward
    members: list[Member] = field(default_factory=list)
    anchor_kind: Literal["original", "noised"] = "original"

    def generator_on(self, device: torch.device) -> torch.Generator:
        """Return a generator for `device`: the run's own on the CPU, else one that it seeds.

        To draw a large tensor on the CPU and copy it would take longer than a step.
        """
        if device.type == "cpu":
            return self.generator
        import torch

        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        return torch.Generator(device).manual_seed(seed)


class Method:
    """The base of all methods, and what `plain` is: hooks that do nothing.

    `defaults` are a method's options with the constants of its paper; an option has the type of its default.
    `draws` says when a run depends on the seed of noise: where it does not, runs that differ in that seed
    alone are one run. `one_model` says that the method works on one model and cannot follow several members.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Value]] = {}
    draws: ClassVar[Literal["never", "always", "classification"]] = "never"
    one_model: ClassVar[bool] = False

    def __init__(self, **options: Value) -> None:
        for key in options:
            check_key(type(self), key)
        self.options: dict[str, Value] = {**self.defaults, **options}

    def check(self, learning_rate: float) -> None:
        """Raise UsageError for a peak rate that the method cannot train at, before anything is trained."""

    def prepare(self, training: Training) -> None:
        """Perturb weights, wrap modules or install hooks, before there is an optimizer."""

    def make_optimizer(self, training: Training) -> Optimizer | None:
        """Return the optimizer of the one member, or None for the engine's."""
        return None

    def before_step(self, training: Training, step: int) -> None:
        """Come before a step, counted from 0; members may change here."""

    def loss(self, training: Training, member: Member, batch: Batch) -> Tensor:
        """Return one member's loss on a batch, a scalar: the task's."""
        return training.task_loss(training.forward(member.model, batch), batch["labels"])

    def after_step(self, training: Training, step: int) -> None:
        """Come after a step, counted from 0, of all members."""

    def finish(self, training: Training) -> None:
        """Leave models that can be evaluated, without hooks and wrappers."""

    def number(self, key: str, low: float = 0.0, high: float = float("inf")) -> float:
        """Return an option that must lie in [low, high]; UsageError where it does not."""
        value = float(self.options[key])
        if not low <= value <= high:
            raise UsageError(
                f"--set {self.name}.{key}={value:g}",
                why=f"it must be {f'at least {low:g}' if high == float('inf') else f'{low:g} to {high:g}'}",
                next_step=f"The default is {self.name}.{key}={self.defaults[key]}",
            )
        return value

    def choice(self, key: str, *choices: str) -> str:
        """Return an option that must be one of `choices`; UsageError where it is not."""
        value = str(self.options[key])
        if value not in choices:
            raise UsageError(
                f"--set {self.name}.{key}={value}",
                why="there is no such choice",
                next_step=f"Use one of: {', '.join(choices)}",
            )
        return value


def names() -> list[str]:
    """Return the names of all methods, sorted, without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> type[Method]:
    """Import a method by name; UsageError if there is none."""
    if name not in names():
        raise UsageError(
            f"no such method: {name}",
            why=f"the methods are {', '.join(names())}",
            next_step="Name one of them, or combine noisytune with one: noisytune+mixout",
        )
    method: type[Method] = importlib.import_module(f"{__name__}.{name}").METHOD
    return method


def check_key(method: type[Method], key: str) -> None:
    """Raise UsageError where a method has no such option."""
    if key not in method.defaults:
        known = ", ".join(f"{method.name}.{k}" for k in method.defaults)
        raise UsageError(
            f"--set {method.name}.{key}",
            why=f"{method.name} has no such option",
            next_step=f"Its options are: {known}" if known else f"Leave it out: {method.name} has none",
        )
