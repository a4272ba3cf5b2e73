"""Methods as a user types them: `noisytune+mixout` with `--set mixout.p=0.8` becomes one thing with hooks.

The order of the names means nothing: noisytune comes first, for its noise is there before anything else looks
at the weights, and the others follow by name. What one method wraps last is unwrapped first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from noisytune_cli.errors import UsageError
from noisytune_cli.study.methods import Batch, Member, Method, Training, Value, check_key, load, names

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

#: noisytune's options that are the study's own: they make the grid of its runs.
FLAGS = {f"noisytune.{name}": f"--{name}" for name in ("lambda", "noise", "scope")}

_WORDS = {"true": True, "false": False}
_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}


class MethodCombination:
    """One or more methods that act as one; the hooks are those of `Method`.

    `name` is canonical, so that two spellings of one combination are one run; `options` holds every option
    in force by its full name, defaults included.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = tuple(methods)
        self.name = "+".join(method.name for method in self.methods)
        self.options: dict[str, Value] = {
            f"{method.name}.{key}": value for method in self.methods for key, value in method.options.items()
        }
        own = [method for method in self.methods if type(method).loss is not Method.loss]
        self._loss = own[0] if own else self.methods[0]

    def check(self, learning_rate: float) -> None:
        """Raise UsageError for a peak rate that one of the methods cannot train at."""
        for method in self.methods:
            method.check(learning_rate)

    def prepare(self, training: Training) -> None:
        """Prepare each method in order."""
        for method in self.methods:
            method.prepare(training)

    def make_optimizer(self, training: Training) -> Optimizer | None:
        """Return the optimizer of the one method that makes one, or None for the engine's."""
        made = (method.make_optimizer(training) for method in self.methods)
        return next((optimizer for optimizer in made if optimizer is not None), None)

    def before_step(self, training: Training, step: int) -> None:
        """Come before a step, counted from 0."""
        for method in self.methods:
            method.before_step(training, step)

    def loss(self, training: Training, member: Member, batch: Batch) -> Tensor:
        """Return one member's loss on a batch, a scalar."""
        return self._loss.loss(training, member, batch)

    def after_step(self, training: Training, step: int) -> None:
        """Come after a step, counted from 0."""
        for method in self.methods:
            method.after_step(training, step)

    def finish(self, training: Training) -> None:
        """Finish each method, the last one first."""
        for method in reversed(self.methods):
            method.finish(training)


def combine(text: str, settings: Mapping[str, Value] | None = None) -> MethodCombination:
    """Return new methods, for one run, from a name such as `noisytune+mixout`.

    `settings` are options by full name (`read_settings`); those of other methods are left aside. UsageError
    for an unknown name, a value out of range, or methods that do not go together.
    """
    classes = _checked(text, [load(name) for name in text.split("+")])
    return MethodCombination(
        [
            method(
                **{
                    key.removeprefix(f"{method.name}."): value
                    for key, value in (settings or {}).items()
                    if key.startswith(f"{method.name}.")
                }
            )
            for method in classes
        ]
    )


def drawn_seeds(*, fresh: bool, noise: bool) -> tuple[str, ...]:
    """Return the seeds, by their names in a record, that a run's numbers follow from.

    `fresh` says whether anything is drawn from that of initialisation, `noise` whether from that of noise.
    """
    return (*["init_seed"] * fresh, "order_seed", *["noise_seed"] * noise)


def draws(text: str, *, regression: bool) -> bool:
    """Return whether runs of a method such as `noisytune+mixout` depend on the seed of noise.

    A method that is no longer there, in an old journal, is taken for one that does not.
    """
    known = set(names())
    found = {load(name).draws for name in text.split("+") if name in known}
    return "always" in found or ("classification" in found and not regression)


def read_settings(texts: Iterable[str]) -> dict[str, Value]:
    """Return options by full name from `METHOD.KEY=VALUE`, each of its default's type; the last one counts.

    UsageError names the key, and lists the known ones where there is no such key.
    """
    settings: dict[str, Value] = {}
    for text in texts:
        full, equals, value = text.partition("=")
        name, dot, key = full.partition(".")
        if not (equals and dot):
            raise UsageError(
                f"--set {text}",
                why="an option of a method is written METHOD.KEY=VALUE",
                next_step="For example --set r3f.lambda=0.7",
            )
        method = load(name)
        check_key(method, key)
        if full in FLAGS:
            raise UsageError(
                f"--set {text}",
                why="the study's runs are made of it, so it has an option of its own",
                next_step=f"Use {FLAGS[full]} {value}",
            )
        settings[full] = _typed(full, value, method.defaults[key])
    return settings


def _typed(full: str, text: str, default: Value) -> Value:
    """Return `text` as a value of the default's type."""
    kind = type(default)
    try:
        value: Value = _WORDS[text.lower()] if kind is bool else kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        raise UsageError(
            f"--set {full}={text}",
            why=f"it must be {_KINDS[kind]}",
            next_step=f"The default is {full}={default}",
        ) from None
    return value


def _checked(text: str, classes: Sequence[type[Method]]) -> list[type[Method]]:
    """Return the methods in the order in which they act; UsageError where they do not go together."""
    ordered = sorted(classes, key=lambda method: (method.name != "noisytune", method.name))
    found = {method.name: method for method in ordered}
    why = None
    if len(found) < len(ordered):
        why = "it names one method twice"
    elif "plain" in found and len(found) > 1:
        why = "plain is finetuning without any method"
    else:
        for hook, does in (("loss", "changes the loss"), ("make_optimizer", "brings its own optimizer")):
            rivals = [m.name for m in ordered if getattr(m, hook) is not getattr(Method, hook)]
            if len(rivals) > 1:
                why = f"each of {' and '.join(rivals)} {does}"
        alone = [m.name for m in ordered if m.one_model]
        if "deni" in found and alone:
            why = f"deni trains several models, and {alone[0]} works on one"
    if why is not None:
        raise UsageError(
            f"methods do not go together: {text}", why=why, next_step="Study them as methods of their own"
        )
    return ordered
