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

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import UsageError
from noisytune_cli.plan.evidence import adapter_layers, declared, structure
from noisytune_cli.plan.evidence.buffers import find_buffers, stands_alone
from noisytune_cli.plan.evidence.computed import PLAIN, may_be
from noisytune_cli.plan.evidence.doubts import is_doubtful
from noisytune_cli.plan.evidence.structure import Kind, OrderedPair
from noisytune_cli.records import Declared, TensorSpec, ToldBy

if TYPE_CHECKING:
    from noisytune_cli.checkpoint.checkpoint import Checkpoint
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
    tells. `unsure` are pairs that the values may show to be statistics, `pairs` are declared ties.
    `ask_model` says that a model was not asked yet, and may be.
    """

    buffers: Mapping[str, str]
    by: Mapping[str, ToldBy]
    doubts: frozenset[str] = frozenset()
    unsure: tuple[OrderedPair, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    ask_model: bool = False
    config: Mapping[str, Any] | None = None

    def tells(self, name: str) -> bool:
        """Say whether something stronger than values decided on a name."""
        return self.by.get(name, "names") != "names"

    def open_to_values(self, tensors: Iterable[TensorSpec]) -> set[str]:
        """Return the names of which the values may yet show that they are buffers."""
        pairs = [pair.names for pair in self.unsure if not any(map(self.tells, pair.names))]
        return {t.name for t in tensors if may_be(t) and not self.tells(t.name)}.union(*pairs)


def tell_checkpoint(source: Checkpoint, decider: str) -> Told:
    """Tell what is known of an open checkpoint's tensors (see `tell`)."""
    return tell(
        source.tensors,
        config=source.config,
        adapter=source.adapter,
        declares=source.declared,
        decider=decider,
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
            f"--buffers-from {decider}",
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
        config=config,
        ask_model=decider == "auto" and bool((config or {}).get("architectures")),
    )
    names = {tensor.name for tensor in tensors}
    could = [t for t in tensors if _could_take_noise(t) and t.name not in told.by]
    told = replace(told, doubts=frozenset(t.name for t in could if is_doubtful(t, names)))
    if decider == "model":
        answer = _ask(tensors, config or {})
        if isinstance(answer, str):
            raise UsageError(
                "--buffers-from model",
                why=f"no model can be asked: {answer}",
                next_step="Leave the option out, and use --exclude for what should get no noise",
            )
        return _with_answer(told, answer)
    if decider == "auto" and any(_asks(could, names)):
        return ask_model(told, tensors)
    return told


def ask_model(told: Told, tensors: Sequence[TensorSpec]) -> Told:
    """Return what is told once the model was asked, where there is one and it was not asked yet."""
    if not told.ask_model:
        return told
    answer = _ask(tensors, told.config or {})
    return replace(told, ask_model=False) if isinstance(answer, str) else _with_answer(told, answer)


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


def _with_answer(told: Told, answer: Answer) -> Told:
    """Return what is told with what a model knows: all but what the checkpoint says of itself."""
    kinds: dict[str, tuple[Kind, str]] = {
        name: (kind, told.buffers.get(name, REGISTERED))
        for name, kind in answer.kinds.items()
        if told.by.get(name) != "checkpoint"
    }
    ties = tuple((group[0], name) for group in answer.tied for name in group[1:])
    return replace(
        _stronger(told, kinds, "model"),
        doubts=told.doubts.difference(answer.kinds),
        pairs=told.pairs + ties,
        ask_model=False,
    )


def _could_take_noise(tensor: TensorSpec) -> bool:
    return tensor.dtype in FLOAT_DTYPES and tensor.elements > 1


def _asks(tensors: Iterable[TensorSpec], names: Collection[str]) -> Iterator[bool]:
    """Yield for each tensor whether its name may be a buffer's or a parameter's, so that a model is asked."""
    for tensor in tensors:
        module, _, last = tensor.name.rpartition(".")
        frozen = f"{module}.running_mean" in names and f"{module}.num_batches_tracked" not in names
        yield frozen or not PLAIN.fullmatch(last)
