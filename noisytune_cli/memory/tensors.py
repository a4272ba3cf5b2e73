"""The tensors of a model or a state dict in memory: their names, what they are, and which are one.

A module knows its parameters and its ties itself: two names of one storage, offset, shape and stride. In a
plain state dict the parameters are told from buffers as in a file, by names and shapes, and a known pair with
equal bytes is a tie. What has no values of its own to add noise to (sparse, quantised, on the meta device,
flattened or partitioned by a trainer) is refused whole, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.escape import is_text
from noisytune_cli.memory.overlaps import NO_MEMORY, find_overlap, has_memory, place, strides
from noisytune_cli.memory.sharded import PLAIN, LocalTensor, held_part, share_verdicts
from noisytune_cli.records import TensorSpec

#: How module names become the names in the checkpoint: a map, a function, or a prefix to take away.
Names = Mapping[str, str] | Callable[[str], str] | str | None

_SPELLED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex32: "C32",
    torch.complex64: "C64",
    torch.complex128: "C128",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}

#: What marks a parameter whose values are codes or lie elsewhere, and what to say of it.
_FOREIGN = {
    "quant_state": "its values are the codes of a quantised weight",
    "SCB": "its values are the codes of a quantised weight",
    "ds_id": "DeepSpeed holds its values in partitions",
    "_is_flat_param": "FSDP holds its values flattened; fully_shard does not",
}

#: Values of a parameter that are looked at before all are.
_FIRST = 16

#: What stands in the names of parameters that FSDP (not fully_shard) took over, flattened or not.
_FSDP = "_fsdp_wrapped_module."


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """One parameter in memory: `own` are its names in the model, `names` those in the checkpoint.

    Of one that is kept, `held` is a copy, and not `tensor`'s own values.
    """

    own: tuple[str, ...]
    names: tuple[str, ...]
    tensor: Tensor
    held: LocalTensor
    is_kept: bool = False

    def specs(self) -> Iterator[TensorSpec]:
        """Return the parameter as a header would describe it, once for each name."""
        return (spec_of(name, self.tensor) for name in self.names)


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """Return a tensor as a header would describe it."""
    dtype = _SPELLED.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())
    return TensorSpec(name, dtype, tuple(tensor.shape), "", 0, tensor.numel() * tensor.element_size())


def live_tensors_of(tensors: Iterable[tuple[str, object]], names: Names = None) -> list[LiveTensor]:
    """Return the parameters among named tensors, ties once, in order of their first names.

    Raises InputInvalid for a tensor that has no values of its own, and for tensors that overlap; UsageError
    where `names` changes no name, or gives two parameters one.
    """
    tensors = list(tensors)
    to_checkpoint = _renaming(names, [own for own, _ in tensors])
    found: dict[Hashable, tuple[list[str], Tensor, LocalTensor]] = {}
    for own, value in tensors:
        tensor = _checked(own, value)
        held = held_part(tensor, own)
        if not has_memory(held.values):
            raise _cannot_add(own, NO_MEMORY)
        found.setdefault(_identity(tensor, held.values), ([], tensor, held))[0].append(own)
    live_tensors = [
        LiveTensor(tuple(own), tuple(dict.fromkeys(map(to_checkpoint, own))), tensor, held)
        for own, tensor, held in found.values()
    ]
    _refuse_shared_names(live_tensors)
    _refuse_overlaps(live_tensors)
    return live_tensors


def first_bytes(live: LiveTensor) -> bytes:
    """Return what tells most parameters from others: the bytes of a few values, none of a sharded one.

    All processes that share parameters must compare the same of them, so none may see more than another.
    """
    values = live.held.values
    if live.held.shards or not values.numel():
        return b""
    while values.dim() > 1:
        values = values[0]
    return values.reshape(-1)[:_FIRST].contiguous().view(torch.uint8).cpu().numpy().tobytes()


def same_bytes(a: LiveTensor, b: LiveTensor) -> bool:
    """Say whether two parameters of one dtype and shape are the same bytes; those sharded unlike are not.

    Sharded ones take an all-reduce.
    """
    if _sharding(a) != _sharding(b):
        return False
    left, right = (r.held.values.contiguous().flatten().view(torch.uint8) for r in (a, b))
    return share_verdicts([a.held], [torch.equal(left, right.to(left.device))])[0]


def _sharding(live: LiveTensor) -> object:
    tensor: Any = live.tensor
    return (tensor.device_mesh, tensor.placements) if live.held.shards else None


def _renaming(names: Names, own: Sequence[str]) -> Callable[[str], str]:
    """Return what turns the model's names into the checkpoint's; UsageError where it fits none of them."""
    if names is None:
        return lambda name: name
    if isinstance(names, str):
        prefix = f"{names.removesuffix('.')}."
        if own and not any(name.startswith(prefix) for name in own):
            raise _fits_none(names, f"no parameter's name begins with {prefix}", own)
        return lambda name: name.removeprefix(prefix)
    if isinstance(names, Mapping):
        if own and names.keys().isdisjoint(own):
            raise _fits_none("{…}", "none of its keys is a parameter's name", own)
        renamed = {name: names.get(name, name) for name in own}
    elif callable(names):
        renamed = {name: names(name) for name in own}
    else:
        raise UsageError(
            f"names={names!r}",
            why="it is no map, no function and no prefix to take away",
            next_step="Give one of these, such as names='bert'",
        )
    for name, value in renamed.items():
        if not isinstance(value, str) or not is_text(value):
            raise UsageError(
                f"names= gives {value!r} for {name}",
                why="it is no name",
                next_step="Give a str for each name",
            )
    return renamed.__getitem__


def _fits_none(names: str, why: str, own: Sequence[str]) -> UsageError:
    return UsageError(
        f"names={names}: it changes no name",
        why=f"{why}; the first is {own[0]}",
        next_step="Leave it out where the model's names are the checkpoint's, or spell it as they are",
    )


def _checked(name: str, value: object) -> Tensor:
    """Return a tensor whose values can be changed in place, or refuse it."""
    if not isinstance(name, str) or not is_text(name):
        raise InputInvalid(
            "not a state dict",
            why=f"{name!r} is no tensor's name",
            next_step="Give the dictionary whose keys are the tensors' names",
        )
    if not isinstance(value, Tensor):
        raise InputInvalid(
            "not a state dict",
            tensor=name,
            why=f"its value is a {type(value).__name__}, not a tensor",
            next_step="Give the innermost dictionary, whose values are the tensors",
        )
    why = _FOREIGN["_is_flat_param"] if _FSDP in name else _why_not(value)
    if why is not None:
        raise _cannot_add(name, why)
    return value


def _cannot_add(name: str, why: str) -> InputInvalid:
    return InputInvalid(
        "cannot add noise in memory",
        tensor=name,
        why=why,
        next_step="Perturb the plain weights before they are converted or wrapped, or on disk",
    )


def _why_not(tensor: Tensor) -> str | None:
    plain = type(tensor) in PLAIN
    if not plain and is_lazy(tensor):
        return "it is not initialised yet"
    if tensor.is_nested:
        return "it is nested"
    if tensor.layout != torch.strided:
        return "it is sparse"
    if tensor.is_quantized:
        return "it is quantised"
    if tensor.is_meta:
        return "it is on the meta device, where tensors have no values"
    if plain and not tensor.__dict__:
        return None  # no mark, as on nearly all
    for mark, why in _FOREIGN.items():
        if hasattr(tensor, mark):
            return why
    if is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "placements"):
        return f"it is a {type(tensor).__name__}, whose values are not its own storage"
    return None


def _identity(tensor: Tensor, local: Tensor) -> Hashable:
    """Return what is equal for two names of one parameter and for nothing else."""
    if local.numel() == 0:
        return id(tensor)  # no storage tells empty tensors apart
    return place(local), tuple(tensor.shape), tuple(local.shape), strides(local), local.dtype


def _refuse_shared_names(live_tensors: Sequence[LiveTensor]) -> None:
    owner: dict[str, LiveTensor] = {}
    for live in live_tensors:
        for name in live.names:
            if owner.setdefault(name, live) is not live:
                raise UsageError(
                    "names= gives two parameters one name",
                    why=f"{owner[name].own[0]} and {live.own[0]} would both be {name}",
                    next_step="Map each parameter to a name of its own; names of fresh ones can stay",
                )


def _refuse_overlaps(live_tensors: Sequence[LiveTensor]) -> None:
    """Refuse views that share elements without being a tie: noise would reach these twice."""
    found = find_overlap([live.held.values for live in live_tensors])
    if found is not None:
        raise InputInvalid(
            "tensors overlap in memory",
            tensor=live_tensors[found].own[0],
            why="it shares elements with another tensor or with itself, and is not the same parameter",
            next_step="Clone one of them first",
        )
