"""Who says what a tensor is: the order of evidence, strongest first.

    checkpoint   what the files say of themselves: declared.py; an adapter's config: adapter_layers.py
    model        a model built without weights: buffers_by_model.py
    structure    siblings that only exist together: structure.py, and rules of buffers.py that ask for one
    values       what a formula gives is not learned: computed.py; known once weights are read
    names        name and shape as known families have them: buffers.py

The strongest that says anything decides. A name that merely sounds like a buffer's decides nothing: it is a
doubt (`doubts.py`), which asks the model if it may, and else leaves the tensor a parameter, with a warning.
A model takes seconds to build, so with `auto` it is asked only where there is a doubt, or where values
contradict what a tensor was taken for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from noisytune_cli.checkpoint.config import library_of
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import UsageError
from noisytune_cli.plan.evidence import adapter_layers, declared, structure
from noisytune_cli.plan.evidence.buffers import find_buffers, stands_alone
from noisytune_cli.plan.evidence.computed import PLAIN, may_be
from noisytune_cli.plan.evidence.doubts import is_doubtful
from noisytune_cli.plan.evidence.structure import Kind, UnsurePair
from noisytune_cli.records import Declared, TensorSpec, ToldBy

if TYPE_CHECKING:
    from noisytune_cli.checkpoint.checkpoint import Checkpoint
    from noisytune_cli.checkpoint.composition import Model
    from noisytune_cli.plan.evidence.buffers_by_model import Answer

Decider = Literal["auto", "names", "model"]

#: What --buffers-from can be.
DECIDERS: tuple[str, ...] = get_args(Decider)

#: Why a buffer is one that the model knows as one.
REGISTERED = "registered as a buffer by its architecture"


@dataclass(frozen=True)
class Told:
    """What is known of the tensors before their values are.

    `buffers` are the names that are buffers, each with the reason; `by` says of each name that more than a
    plain name decided on, buffer or parameter, what did. `doubts` are names of a buffer's kind that nothing
    tells. `unsure` are pairs that the values may show to be buffers, `pairs` are declared ties.
    `models` are those that were not asked yet and may be: what comes before their names, and their configs.
    """

    buffers: Mapping[str, str]
    by: Mapping[str, ToldBy]
    doubts: frozenset[str] = frozenset()
    unsure: tuple[UnsurePair, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    models: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def tells(self, name: str) -> bool:
        """Say whether something stronger than values decided on a name."""
        return self.by.get(name, "names") != "names"

    def open_to_values(self, tensors: Iterable[TensorSpec]) -> set[str]:
        """Return the names of which the values may yet show that they are buffers."""
        pairs = [pair.names for pair in self.unsure if not any(map(self.tells, pair.names))]
        return {t.name for t in tensors if may_be(t) and not self.tells(t.name)}.union(*pairs)


def tell_checkpoint(source: Checkpoint, decider: str) -> Told:
    """Tell what is known of an open checkpoint's tensors (see `tell`), of each of its models alone.

    With `model` one that can be asked is enough: not every layer of a composition is a library's model.
    """
    parts: list[tuple[str, Told]] = []
    refused: list[UsageError] = []
    models, declares = source.models, source.declared
    for model in models:

        def told(model: Model, decider: str) -> Told:
            return tell(
                model.tensors,
                config=model.config,
                adapter=source.adapter_of(model),
                declares=_own(declares, model.prefix),
                decider=decider,
            )

        try:
            parts.append((model.prefix, told(model, decider)))
        except UsageError as error:
            refused.append(error)
            if len(refused) == len(models):
                raise refused[0] from None
            parts.append((model.prefix, told(model, "names")))
    return parts[0][1] if len(parts) == 1 and not parts[0][0] else _together(parts)


def _own(declares: Declared, prefix: str) -> Declared:
    """Return what the files of one of the models say, under its own names."""
    end = len(prefix)
    return replace(
        declares,
        buffers=frozenset(name[end:] for name in declares.buffers if name.startswith(prefix)),
        parameters=frozenset(name[end:] for name in declares.parameters if name.startswith(prefix)),
        pairs=tuple((a[end:], b[end:]) for a, b in declares.pairs if a.startswith(prefix)),
    )


def _together(parts: Sequence[tuple[str, Told]]) -> Told:
    """Return what is told of several models in one, each under its prefix."""
    return Told(
        buffers={at + name: why for at, told in parts for name, why in told.buffers.items()},
        by={at + name: by for at, told in parts for name, by in told.by.items()},
        doubts=frozenset(at + name for at, told in parts for name in told.doubts),
        unsure=tuple(pair.under(at) for at, told in parts for pair in told.unsure),
        pairs=tuple((at + a, at + b) for at, told in parts for a, b in told.pairs),
        models=tuple((at, config) for at, told in parts for _, config in told.models),
    )


def tell(
    tensors: Sequence[TensorSpec],
    *,
    config: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    declares: Declared | None = None,
    decider: str = "auto",
) -> Told:
    """Tell which tensors are buffers, as far as headers and configs say.

    UsageError for an unknown decider, and for `model` where no model can be asked.
    """
    if decider not in DECIDERS:
        raise UsageError(
            f"--buffers-from={decider}",
            why="there is no such source",
            next_step=f"Use one of: {', '.join(DECIDERS)}",
        )
    declares = declares or Declared()
    found = structure.look(tensors)
    told = _told_by_rules(tensors, config)
    told = _stronger(told, found.kinds, "structure")
    told = _stronger(told, adapter_layers.kinds_of(adapter, (t.name for t in tensors)), "checkpoint")
    told = _stronger(told, declared.look(tensors, declares), "checkpoint")
    told = replace(
        told,
        unsure=found.unsure,
        pairs=declares.pairs,
        models=(("", config),) if decider == "auto" and config and library_of(config) else (),
    )
    names = {tensor.name for tensor in tensors}
    could = [t for t in tensors if t.dtype in FLOAT_DTYPES and t.elements and t.name not in told.by]
    doubts = frozenset(t.name for t in could if is_doubtful(t, names))
    told = replace(told, doubts=doubts)
    could = [t for t in could if t.elements > 1 or t.name in doubts]
    if decider == "model":
        answer = _ask(tensors, config or {})
        if isinstance(answer, str):
            raise UsageError(
                "--buffers-from=model",
                why=f"no model can be asked: {answer}",
                next_step="Leave the option out, and use --exclude for what should get no noise",
            )
        return _with_answer(told, answer, "")
    if decider == "auto" and any(_asks(could, names)):
        return ask_model(told, tensors)
    return told


def ask_model(told: Told, tensors: Sequence[TensorSpec]) -> Told:
    """Return what is told once the models were asked that can be and were not asked yet."""
    for prefix, config in told.models:
        names = [t for t in tensors if t.name.startswith(prefix)]
        own = [replace(t, name=t.name[len(prefix) :]) for t in names]
        answer = _ask(own, config)
        if not isinstance(answer, str):
            told = _with_answer(told, answer, prefix)
    return replace(told, models=())


def _ask(tensors: Sequence[TensorSpec], config: Mapping[str, Any]) -> Answer | str:
    from noisytune_cli.plan.evidence import buffers_by_model  # few tensors are in doubt

    return buffers_by_model.ask(tensors, config)


def with_values(told: Told, computed: Mapping[str, str], settled: Iterable[str] = ()) -> Told:
    """Return what is told once values were looked at: `computed` names are buffers, unless told already.

    `settled` are names of which the values leave no doubt.
    """
    kinds: dict[str, tuple[Kind, str]] = {
        name: ("buffer", why) for name, why in computed.items() if not told.tells(name)
    }
    told = _stronger(told, kinds, "values")
    return replace(told, doubts=told.doubts.difference(computed, settled))


def _told_by_rules(tensors: Sequence[TensorSpec], config: Mapping[str, Any] | None) -> Told:
    """Return what the rules of known families tell; one that holds for a tensor alone is told by its name."""
    by_name = {tensor.name: tensor for tensor in tensors}
    buffers = find_buffers(tensors, config=config)
    by: dict[str, ToldBy] = {
        name: "names" if stands_alone(by_name[name], config=config) else "structure" for name in buffers
    }
    return Told(buffers, by)


def _stronger(told: Told, kinds: Mapping[str, tuple[Kind, str]], by: ToldBy) -> Told:
    """Return what is told with stronger evidence over it."""
    buffers = {name: why for name, why in told.buffers.items() if name not in kinds}
    buffers |= {name: why for name, (kind, why) in kinds.items() if kind == "buffer"}
    return replace(told, buffers=buffers, by={**told.by, **dict.fromkeys(kinds, by)})


def _with_answer(told: Told, answer: Answer, prefix: str) -> Told:
    """Return what is told with what a model knows: all but what the checkpoint says of itself."""
    known = {prefix + name: kind for name, kind in answer.kinds.items()}
    kinds: dict[str, tuple[Kind, str]] = {
        name: (kind, told.buffers.get(name, REGISTERED))
        for name, kind in known.items()
        if told.by.get(name) != "checkpoint"
    }
    ties = tuple((prefix + group[0], prefix + name) for group in answer.tied for name in group[1:])
    return replace(
        _stronger(told, kinds, "model"),
        doubts=told.doubts.difference(known),
        pairs=told.pairs + ties,
        models=(),
    )


def _asks(tensors: Iterable[TensorSpec], names: Collection[str]) -> Iterator[bool]:
    """Yield for each tensor whether its name may be a buffer's or a parameter's, so that a model is asked."""
    for tensor in tensors:
        module, _, last = tensor.name.rpartition(".")
        frozen = f"{module}.running_mean" in names and f"{module}.num_batches_tracked" not in names
        yield frozen or not PLAIN.fullmatch(last)
