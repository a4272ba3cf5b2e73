"""The tensors of a model or a state dict in memory: their names, what they are, and which are one.

A module knows its parameters and its ties itself: two names of one storage, offset, shape and stride. In a
plain state dict the parameters are told from buffers as in a file, by names and shapes, and a known pair with
equal bytes is a tie. What has no values of its own to add noise to (sparse, quantised, on the meta device,
flattened or partitioned by a trainer) is refused whole, before anything is changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.records import TensorSpec
from noisytune_cli.sharded import Held, held_part

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
    torch.complex64: "C64",
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

#: What stands in the names of parameters that FSDP (not fully_shard) took over, flattened or not.
_FSDP = "_fsdp_wrapped_module."


@dataclass(frozen=True, slots=True)
class Resident:
    """One parameter in memory: `own` are its names in the model, `names` those in the checkpoint."""

    own: tuple[str, ...]
    names: tuple[str, ...]
    tensor: Tensor
    held: Held

    def specs(self) -> Iterator[TensorSpec]:
        """Yield the parameter as a header would describe it, once for each name."""
        dtype = _SPELLED.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch.").upper())
        nbytes = self.tensor.numel() * self.tensor.element_size()
        for name in self.names:
            yield TensorSpec(name, dtype, tuple(self.tensor.shape), "", 0, nbytes)


def residents_of(tensors: Iterable[tuple[str, object]], names: Names = None) -> list[Resident]:
    """Return the parameters among named tensors, ties once, in order of their first names.

    Raises InputInvalid for a tensor that has no values of its own, and for tensors that overlap; UsageError
    where `names` gives two parameters one name.
    """
    to_checkpoint = _renaming(names)
    found: dict[Hashable, tuple[list[str], Tensor, Held]] = {}
    for own, value in tensors:
        tensor = _checked(own, value)
        held = held_part(tensor, own)
        found.setdefault(_identity(tensor, held.values), ([], tensor, held))[0].append(own)
    residents = [
        Resident(tuple(own), tuple(dict.fromkeys(map(to_checkpoint, own))), tensor, held)
        for own, tensor, held in found.values()
    ]
    _refuse_shared_names(residents)
    _refuse_overlaps(residents)
    return residents


def same_bytes(a: Resident, b: Resident) -> bool:
    """Say whether two parameters of one dtype and shape are the same bytes; sharded ones are not."""
    if a.held.mesh is not None or b.held.mesh is not None:
        return a is b
    left, right = (r.held.values.contiguous().flatten().view(torch.uint8) for r in (a, b))
    return torch.equal(left, right.to(left.device))


def _renaming(names: Names) -> Callable[[str], str]:
    if names is None:
        return lambda name: name
    if isinstance(names, str):
        prefix = f"{names.removesuffix('.')}."
        return lambda name: name.removeprefix(prefix)
    if isinstance(names, Mapping):
        return lambda name: names.get(name, name)
    return names


def _checked(name: str, value: object) -> Tensor:
    """Return a tensor whose values can be changed in place, or refuse it."""
    if not isinstance(value, Tensor):
        raise InputInvalid(
            "not a state dict",
            tensor=name,
            why=f"its value is a {type(value).__name__}, not a tensor",
            next_step="Give the innermost dictionary, whose values are the tensors",
        )
    why = _FOREIGN["_is_flat_param"] if _FSDP in name else _why_not(value)
    if why is not None:
        raise InputInvalid(
            "cannot add noise in memory",
            tensor=name,
            why=why,
            next_step="Perturb the plain weights before they are converted or wrapped, or on disk",
        )
    return value


def _why_not(tensor: Tensor) -> str | None:
    from torch.nn.parameter import is_lazy
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_lazy(tensor):
        return "it is not initialised yet"
    if tensor.layout != torch.strided:
        return "it is sparse"
    if tensor.is_quantized:
        return "it is quantised"
    if tensor.is_meta:
        return "it is on the meta device, where tensors have no values"
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
    storage = (local.device, local.untyped_storage().data_ptr(), local.storage_offset())
    return *storage, tuple(tensor.shape), tuple(local.shape), local.stride(), local.dtype


def _refuse_shared_names(residents: Sequence[Resident]) -> None:
    owner: dict[str, Resident] = {}
    for resident in residents:
        for name in resident.names:
            if owner.setdefault(name, resident) is not resident:
                raise UsageError(
                    "names= gives two parameters one name",
                    why=f"{owner[name].own[0]} and {resident.own[0]} would both be {name}",
                    next_step="Map each parameter to a name of its own; names of fresh ones can stay",
                )


def _refuse_overlaps(residents: Sequence[Resident]) -> None:
    """Refuse views that share elements without being a tie: noise would reach these twice."""
    by_storage: dict[Hashable, list[Resident]] = {}
    for resident in residents:
        values = resident.held.values
        if values.numel():
            key = (values.device, values.untyped_storage().data_ptr())
            by_storage.setdefault(key, []).append(resident)
    for group in by_storage.values():
        extents = sorted(_extent(resident.held.values) for resident in group)
        apart = all(left[1] <= right[0] for left, right in itertools.pairwise(extents))
        dense = all(
            end - start == r.held.values.nbytes for r in group for start, end in [_extent(r.held.values)]
        )
        if not (apart and dense) and _share_elements([resident.held.values for resident in group]):
            raise InputInvalid(
                "tensors overlap in memory",
                tensor=group[0].own[0],
                why="it shares elements with another tensor or with itself, and is not the same parameter",
                next_step="Clone one of them first",
            )


def _extent(values: Tensor) -> tuple[int, int]:
    """Return the first byte of a view in its storage, and the byte after its last."""
    last = sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    start = int(values.storage_offset())
    return start * values.element_size(), (start + last + 1) * values.element_size()


def _share_elements(views: Sequence[Tensor]) -> bool:
    """Say whether views of one storage have an element in common, or one of them has it twice."""
    if len({view.element_size() for view in views}) > 1:
        return True  # nobody lays tensors of several widths out so
    places = torch.arange(views[0].untyped_storage().nbytes() // views[0].element_size(), device="cpu")
    all_places = torch.cat(
        [places.as_strided(v.shape, v.stride(), v.storage_offset()).flatten() for v in views]
    )
    return bool((torch.bincount(all_places) > 1).any())
