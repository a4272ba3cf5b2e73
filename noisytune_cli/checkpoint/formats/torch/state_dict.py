"""Which tensors of a pickle are the model's weights, and what they are called.

A state dict is a dictionary that holds tensors under names. It may be the whole file, or lie in it: as
`state_dict` or `model`, in a Lightning checkpoint, beside an optimizer's state. Optimizers are known by their
shape (`state` and `param_groups`) or name, other training state by its name and by holding no matrix; all of
it is carried over unchanged. What holds matrices and is neither is told of.

A tensor is called by its key in the state dict, so that the same weights have the same names whatever is
around them; where two state dicts have a key in common, by the whole path. The copies that DeepSpeed keeps of
frozen weights are always called by theirs, so that the weights keep their names.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from noisytune_cli.checkpoint.formats.torch.globals import DType
from noisytune_cli.checkpoint.formats.torch.values import NoStateDict, PickleFault
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.escape import enumerate_some, is_text
from noisytune_cli.records import FROZEN_COPIES, Declared

_Leaf = TypeVar("_Leaf", bound="Stored")


class Stored(Protocol):
    """A tensor as it lies in what was unpickled."""

    @property
    def dtype(self) -> DType:
        """What its elements are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""


#: Deeper than any training loop nests its checkpoints.
_MAX_DEPTH = 16

#: Entries of all dictionaries looked at, one that lies in two places counted twice.
_MAX_ITEMS = 1_000_000

#: Characters of all their keys, and of the names made of them.
_MAX_CHARACTERS = 32 << 20

#: Where a training checkpoint keeps its model: beside such a key, loose tensors are no weights.
_MODELS = re.compile(r"(model_)?state(_dict)?|(model|net|network|module|params)(_ema|_state(_dict)?)?")

#: What else it keeps, by what its key holds and by the whole of it: never descended into.
_OPTIMIZER = re.compile(r"optim(?!al|ism|us|ized)")
_TRAINING = re.compile(
    r"callbacks|loops|criterion|(train_)?(loss|losses)|train(er|ing)?_state|data_?loader.*"
    r"|exp_avg(_sq)?|grads|gradients|adamw?(_state)?|replay_buffer",
    re.DOTALL,
)

#: What sign languages are written in.
_NO_LOSSES = frozenset(("gloss", "glosses"))

#: So are these, unless there is a matrix in them: an upsampler or a resampler is a model.
_WITHOUT_MATRICES = ("sched", "scaler", "scaling", "rng", "sampler", "metrics", "history")

#: An optimizer's state where a state dict was flattened before it was saved.
_FLAT_TRAINING = re.compile(r"(chained_\d+\.)?optim(izer)?\.(state|param_groups)\..*", re.DOTALL)

#: What optimizers of mixed precision call their own copy of the weights (DeepSpeed, Megatron, apex), how deep
#: in their state it lies, among how many entries; and its name where a state dict was flattened.
_MASTERS = re.compile(r"(single_partition_of_)?fp32_\w+|master_(params?|weights?)")
_MASTERS_DEPTH, _MASTERS_AMONG = 4, 64
_FLAT_MASTERS = re.compile(r"(chained_\d+\.)?optim(izer)?\.state\.(fp32_param|master_param)(?=\.)")

#: Of what lies beside the weights, how much is named.
_MAX_REST, _LONGEST_SHOWN = 1000, 60

#: A longer path is not kept beside the name.
_LONGEST_PATH = 1000

_MAKE_WHOLE = "Make whole weights of the shards with zero_to_fp32.py, which DeepSpeed puts beside them"

_NOT_A_STATE_DICT = "Save the model's state dict: torch.save(model.state_dict(), FILE)"


@dataclass(frozen=True)
class _Found(Generic[_Leaf]):
    """A tensor of a state dict: the dictionaries on the way to it, and its key in the innermost."""

    path: tuple[str, ...]
    key: str
    tensor: _Leaf

    @property
    def full_name(self) -> str:
        return ".".join((*self.path, self.key))


@dataclass(frozen=True)
class Weight(Generic[_Leaf]):
    """A weight: its name, the dictionaries that it is in, and its path where these say more than the name.

    `key` is what the innermost of them calls it.
    """

    name: str
    containers: tuple[str, ...]
    key: str
    path: str
    tensor: _Leaf


@dataclass(frozen=True)
class Unpickled(Generic[_Leaf]):
    """What was unpickled: the weights in its order, and the paths, joined by dots, below which there is none.

    `unclear` are those of the latter that hold matrices and are no training state, `masters` those that hold
    an optimizer's own copy of the weights.
    """

    weights: list[Weight[_Leaf]]
    beside: tuple[str, ...]
    unclear: tuple[str, ...]
    masters: tuple[str, ...] = ()

    def warnings(self, name: str) -> tuple[str, ...]:
        """Return what is to be said of a file `name` with this content."""
        said = []
        if self.unclear:
            said.append(
                f"{name}: the matrices in {enumerate_some(self.unclear)} are in no state dict of a model, so "
                "they are taken for no weights: they get no noise, and are neither averaged nor compared"
            )
        if self.masters:
            said.append(
                f"{name}: {enumerate_some(self.masters)} holds the optimizer's own copy of the weights, "
                "which stays as it is: to go on from the output, load its weights without that state"
            )
        return tuple(said)


def sort_content(root: object, leaf: type[_Leaf]) -> Unpickled[_Leaf]:
    """Return what was unpickled, sorted; raises PickleFault. `leaf` is what tensors are there."""
    if isinstance(root, leaf):
        raise NoStateDict("it holds one tensor without a name, not a state dict", _NOT_A_STATE_DICT)
    if type(root) is not dict:
        kind = "a list" if type(root) in (list, tuple) else "no dictionary"
        raise NoStateDict(f"at its top level is {kind}, not a state dict", _NOT_A_STATE_DICT)
    if _is_optimizer(root):
        raise NoStateDict(
            "it is an optimizer's state, not a model's", "Name the file with the model's weights"
        )
    search = _Search(leaf)
    found = list(search.walk(root, (), frozenset()))
    _refuse_shards(root, found)
    names = [item.full_name if item.path == (FROZEN_COPIES,) else item.key for item in found]
    if len(set(names)) < len(names):
        if sum(len(part) for item in found for part in (*item.path, item.key)) > _MAX_CHARACTERS:
            raise PickleFault("its tensors' names are too long")
        names = [item.full_name for item in found]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise PickleFault(f"two of its tensors have the name {twice[0]}")
    if not all(map(is_text, names)):
        raise PickleFault("a tensor's name holds half of a surrogate pair")
    weights = [
        Weight(name, item.path, item.key, _telling(item), item.tensor)
        for name, item in zip(names, found, strict=True)
    ]
    return Unpickled(weights, *search.rest(root, {id(item.tensor) for item in found}), _masters(root))


def _masters(root: Mapping[object, object]) -> tuple[str, ...]:
    """Return the paths under which an optimizer of mixed precision keeps the weights that it steps."""
    found: dict[str, None] = {}
    todo: list[tuple[tuple[str, ...], object]] = [
        ((key,), value) for key, value in root.items() if type(key) is str and _is_of_training(key, value)
    ]
    for path, value in todo:
        if len(todo) > _MAX_REST or type(value) is not dict:
            continue
        for key, inner in itertools.islice(value.items(), _MASTERS_AMONG):
            here = (*path, key[:_LONGEST_SHOWN] if type(key) is str else "…")
            if type(key) is str and inner and _MASTERS.fullmatch(key):
                found[".".join(here)] = None
            elif len(path) < _MASTERS_DEPTH:
                todo.append((here, inner))
    flat = (_FLAT_MASTERS.match(key) for key in root if type(key) is str)
    return tuple(found | dict.fromkeys(match[0] for match in flat if match))


def _refuse_shards(root: Mapping[object, object], found: Sequence[_Found[_Leaf]]) -> None:
    """Raise PickleFault where DeepSpeed's weights, or its copies of frozen ones, are shards (ZeRO-3)."""
    groups = root.get("param_shapes")
    shapes = {
        k: v
        for group in (groups if type(groups) is list else [groups])
        if type(group) is dict
        for k, v in group.items()
    }
    for item in found:
        shape = shapes.get(item.key) if item.path == ("module",) else None
        if type(shape) is tuple and 0 in item.tensor.shape and 0 not in shape:
            raise PickleFault(
                f"{item.full_name} is empty: the shards of DeepSpeed's ZeRO-3 lie in its other files",
                _MAKE_WHOLE,
            )
    whole = {item.key: item.tensor for item in found if item.path == ("module",)}
    for item in found:
        one = whole.get(item.key, item.tensor) if item.path == (FROZEN_COPIES,) else item.tensor
        if (one.shape, one.dtype.name) != (item.tensor.shape, item.tensor.dtype.name):
            raise PickleFault(
                f"{item.full_name} is not the whole {item.key}, but a shard of DeepSpeed's ZeRO-3",
                _MAKE_WHOLE,
            )


def _telling(found: _Found[_Leaf]) -> str:
    """Return the path of a weight without the containers that merely say that a model is in them."""
    said = [part for part in found.path if "ema" in part or not is_model(part)]
    return ".".join((*said, found.key))[:_LONGEST_PATH] if said else ""


def is_model(name: str) -> bool:
    """Say whether a dictionary or module is called what says no more than that a model is in it."""
    return _MODELS.fullmatch(name) is not None


def is_loss(name: str) -> bool:
    """Say whether a dictionary or module is called a loss; what such a one remembers is no weight."""
    words = (word for word in name.split("_") if word not in _NO_LOSSES)
    return any(word.endswith(("loss", "losses", "criterion", "criterions")) for word in words)


def declared_by(root: object, weights: Sequence[Weight[_Leaf]]) -> Declared:
    """Return what a training checkpoint says of its weights: DeepSpeed's lists, and who wrote it.

    DeepSpeed's names are those inside `module`; its copy of a frozen weight is one with that weight.
    What lies in a dictionary of a loss's own is its state, as DINO's centre is, unless there are layers.
    """
    assert type(root) is dict  # or `sort_content` had refused it
    names = {weight.name: weight.name for weight in weights}
    names |= {weight.key: weight.name for weight in weights if weight.containers == ("module",)}

    def known(value: object) -> frozenset[str]:
        items: Iterable[object] = value if isinstance(value, list | tuple | dict) else ()
        return frozenset(names[item] for item in items if type(item) is str and item in names)

    shapes, shared = root.get("param_shapes"), root.get("shared_params")
    groups = [*(shapes if type(shapes) is list else [shapes]), root.get("frozen_param_shapes")]
    pairs = [*(shared.items() if type(shared) is dict else shared if type(shared) is list else ())]
    pairs += [(w.key, w.name) for w in weights if w.containers == (FROZEN_COPIES,)]
    layered = {w.containers for w in weights if w.key.endswith("weight") and len(w.tensor.shape) > 1}
    losses = [w for w in weights if any(map(is_loss, w.containers)) and w.containers not in layered]
    return Declared(
        buffers=known(root.get("buffer_names")) | {weight.name for weight in losses},
        parameters=frozenset().union(*map(known, groups)),
        pairs=tuple((names[a], names[b]) for pair in pairs if len(known(pair)) == 2 for a, b in [pair]),
        lightning="pytorch-lightning_version" in root,
    )


class _Search(Generic[_Leaf]):
    """A walk through nested dictionaries that ends, however often they hold each other."""

    def __init__(self, leaf: type[_Leaf]) -> None:
        self._leaf = leaf
        self._left = _MAX_ITEMS
        self._characters = _MAX_CHARACTERS
        #: Which entries of which dictionaries were followed.
        self._followed: set[tuple[int, str]] = set()

    def walk(
        self, mapping: Mapping[object, object], path: tuple[str, ...], above: frozenset[int]
    ) -> Iterator[_Found[_Leaf]]:
        """Yield the weights in a dictionary and those below it."""
        self._left -= 1 + len(mapping)
        if len(path) > _MAX_DEPTH or id(mapping) in above or self._left < 0:
            raise PickleFault("its dictionaries are nested too deep")
        self._characters -= sum(len(key) for key in mapping if type(key) is str)
        if self._characters < 0:
            raise PickleFault("its tensors' names are too long")
        above |= {id(mapping)}
        below = {
            key: list(self.walk(value, (*path, key), above))
            for key, value in mapping.items()
            if type(key) is str and type(value) is dict and not self._is_training_state(key, value)
        }
        self._followed.update((id(mapping), key) for key in below)
        in_training = any(found and is_model(key) for key, found in below.items())
        for key, value in mapping.items():
            if type(key) is not str:
                continue
            if isinstance(value, self._leaf) and not in_training and not _FLAT_TRAINING.fullmatch(key):
                yield _Found(path, key, value)
            elif key in below:
                yield from below[key]

    def rest(self, root: Mapping[object, object], ours: set[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the paths below which there is no weight, after the walk, and which of them are unclear."""
        unclear: list[str] = []

        def look(mapping: Mapping[object, object], path: tuple[str, ...]) -> tuple[bool, list[str]]:
            # It goes where the walk went, which has an end; another entry may lead back to above.
            found = False
            rest: list[str] = []
            for key, value in mapping.items():
                if id(value) in ours:
                    found = True
                    continue
                here = (*path, key[:_LONGEST_SHOWN] if type(key) is str else "…")
                below: tuple[bool, list[str]] = False, []
                if type(value) is dict and (id(mapping), key) in self._followed:
                    below = look(value, here)
                elif not _is_of_training(key, value) and self._holds_matrix(value):
                    unclear.append(".".join(here))
                found |= below[0]
                if len(rest) < _MAX_REST:
                    rest += below[1] if below[0] else [".".join(here)]
            return found, rest

        return tuple(look(root, ())[1]), tuple(dict.fromkeys(unclear))

    def _is_training_state(self, key: str, value: Mapping[object, object]) -> bool:
        if _is_of_training(key, value):
            return True
        return any(part in key for part in _WITHOUT_MATRICES) and not self._holds_matrix(value)

    def _holds_matrix(self, value: object) -> bool:
        """Say whether a value is or holds, however deep, a tensor of several axes that could get noise."""
        todo, seen = [value], {id(value)}
        while todo and self._left > 0:
            one = todo.pop()
            if isinstance(one, self._leaf) and len(one.shape) > 1 and one.dtype.name in FLOAT_DTYPES:
                return True
            held: Collection[object] = ()
            if isinstance(one, dict):
                held = one.values()
            elif isinstance(one, list | tuple):
                held = one
            self._left -= 1 + len(held)
            new = {id(part): part for part in held if id(part) not in seen}
            seen.update(new)
            todo += new.values()
        return False


def _is_of_training(key: object, value: object) -> bool:
    """Say whether a value is known for training state by its key or its shape."""
    named = type(key) is str and (_OPTIMIZER.search(key) or _TRAINING.fullmatch(key))
    return bool(named) or (type(value) is dict and _is_optimizer(value))


def _is_optimizer(mapping: Mapping[object, object]) -> bool:
    return "state" in mapping and "param_groups" in mapping
