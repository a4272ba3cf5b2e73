"""Tensors of which a process may hold only a part: DTensors, as FSDP2 and tensor parallelism make them.

Noise depends on an element's index in the whole tensor, so a part needs to know only where its elements
belong: its runs. That needs no communication. A std of the whole does: every process's moments, gathered for
all tensors at once by one all-reduce for each sharded dimension of a mesh (so one in all under FSDP2). They
are gathered, not added up: each process then rounds the same parts to the same std.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from noisytune_cli.errors import InputInvalid
from noisytune_cli.noise.std import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from noisytune_cli.noise.stream import Noise

#: The classes of tensors that are nothing but their own values, as those of nearly all are.
PLAIN = (Tensor, torch.nn.Parameter)

#: The numbers of one part's moments as they travel; a float64 holds each of them exactly.
_MOMENTS_ROW = 7


@dataclass(frozen=True, slots=True)
class LocalRun:
    """`count` elements from `start` of a local tensor, which are elements `first`… of the whole one."""

    start: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """The part of a tensor that this process holds, without autograd; `mesh` is None where that is all of it.

    `shards` are the mesh's dimensions that the tensor is sharded over.
    """

    values: Tensor
    runs: tuple[LocalRun, ...]
    mesh: Any = None
    shards: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Dose:
    """The noise for one tensor, and its part here.

    `base` are the values that it is added to, [n], where these are not the part's own, which are overwritten.
    """

    held: LocalTensor
    noise: Noise
    base: Tensor | None = None


def held_part(tensor: Tensor, name: str) -> LocalTensor:
    """Return what this process holds of a tensor; InputInvalid where a placement is not understood."""
    if type(tensor) in PLAIN or not hasattr(tensor, "placements"):
        return LocalTensor(tensor.detach(), (LocalRun(0, 0, tensor.numel()),))
    return _held_part(tensor, name)


def _held_part(tensor: Any, name: str) -> LocalTensor:
    """Return what this process holds of a DTensor."""
    with torch.no_grad():
        local = tensor.to_local().detach()
    shards = tuple(d for d, placement in enumerate(tensor.placements) if not placement.is_replicate())
    indices = _indices(tensor, name)
    if tuple(len(i) for i in indices) != tuple(local.shape):
        raise _not_understood(name, "its local part has another shape than its placements say")
    return LocalTensor(local, tuple(runs_of(tuple(tensor.shape), indices)), tensor.device_mesh, shards)


def _indices(tensor: Any, name: str) -> list[NDArray[np.int64]]:
    """Return for each dimension of a DTensor the indices that this process holds."""
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    indices = [torch.arange(size, device="cpu") for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    for mesh_dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise _not_understood(name, f"its placement is {placement}")
        if coordinate is None:
            raise _not_understood(name, "this process is not one of its mesh")
        dimension = placement.dim
        shaped = indices[dimension].view([-1 if d == dimension else 1 for d in range(tensor.ndim)])
        # The placement splits the indices as it split the tensor, whatever kind of shard it is.
        pieces, _ = placement._split_tensor(
            shaped, tensor.device_mesh.size(mesh_dimension), with_padding=False, contiguous=True
        )
        indices[dimension] = pieces[coordinate[mesh_dimension]].flatten()
    return [index.numpy() for index in indices]


def runs_of(shape: tuple[int, ...], indices: Sequence[NDArray[np.int64]]) -> Iterator[LocalRun]:
    """Yield the runs of the part of a tensor that holds `indices` of each dimension, in row-major order."""
    if not all(len(index) for index in indices):
        return
    partial = [d for d, index in enumerate(indices) if len(index) < shape[d]]
    if not partial:
        yield LocalRun(0, 0, math.prod(shape))
        return
    last = partial[-1]
    inner = math.prod(shape[last + 1 :])
    strides = [math.prod(shape[d + 1 :]) for d in range(last)]
    breaks = np.flatnonzero(np.diff(indices[last]) != 1) + 1
    segments = [(int(piece[0]), len(piece)) for piece in np.split(indices[last], breaks)]
    start = 0
    for outer in itertools.product(*(index.tolist() for index in indices[:last])):
        offset = sum(i * stride for i, stride in zip(outer, strides, strict=True))
        for first, count in segments:
            yield LocalRun(start, offset + first * inner, count * inner)
            start += count * inner


def _not_understood(name: str, why: str) -> InputInvalid:
    return InputInvalid(
        "cannot tell which part of the tensor is here",
        tensor=name,
        why=why,
        next_step="Perturb the model before it is distributed, or shard it with fully_shard",
    )


def share_moments(parts: Sequence[LocalTensor], moments: Sequence[Sequence[Moments]]) -> list[list[Moments]]:
    """Return for each tensor the moments of all its parts, the same in the same order on every process.

    A sharded part comes with one Moments. All processes of a mesh must call this with the same tensors.
    """
    shared = [list(own) for own in moments]
    for indices in _by_mesh(parts).values():
        mesh, shards = parts[indices[0]].mesh, parts[indices[0]].shards
        own = torch.tensor([_row(moments[i]) for i in indices], dtype=torch.float64)
        everyones = _gather(own, mesh, shards).tolist()
        for place, i in enumerate(indices):
            wide = parts[i].values.dtype == torch.float64
            rows = [rank[place] for rank in everyones]
            shared[i] = [_moments(row, wide) for row in rows if row[0]]
    return shared


def share_verdicts(parts: Sequence[LocalTensor], verdicts: Sequence[bool]) -> list[bool]:
    """Return for each tensor whether a verdict holds of all its parts, the same on every process.

    All processes of a mesh must call this with the same tensors.
    """
    shared = list(verdicts)
    for indices in _by_mesh(parts).values():
        part = parts[indices[0]]
        no = torch.tensor([not verdicts[i] for i in indices], dtype=torch.int64).to(part.mesh.device_type)
        _all_reduce(no, part.mesh, part.shards)
        for i, count in zip(indices, no.tolist(), strict=True):
            shared[i] = count == 0
    return shared


def share_exact_sums(parts: Sequence[LocalTensor], sums: Mapping[int, NDArray[np.int64]]) -> None:
    """Add up the exact sums of the parts of each tensor, in place; `sums` are keyed by the part's index."""
    for indices in _by_mesh([parts[i] for i in sums]).values():
        keys = [list(sums)[i] for i in indices]
        part = parts[keys[0]]
        total = torch.from_numpy(np.stack([sums[key] for key in keys])).to(part.mesh.device_type)
        _all_reduce(total, part.mesh, part.shards)
        for key, summed in zip(keys, total.cpu().numpy(), strict=True):
            sums[key][:] = summed


def _by_mesh(parts: Sequence[LocalTensor]) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
    """Sort the indices of sharded parts by the processes that share them."""
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for i, part in enumerate(parts):
        if part.mesh is not None and part.shards:
            groups.setdefault((part.mesh, part.shards), []).append(i)
    return groups


def _gather(own: Tensor, mesh: Any, shards: Sequence[int]) -> Tensor:
    """Return [processes, *own.shape]: what each process along the sharded dimensions of a mesh has."""
    sizes = [mesh.size(d) for d in shards]
    slot = 0
    for d, size in zip(shards, sizes, strict=True):
        slot = slot * size + mesh.get_local_rank(d)
    everyones = torch.zeros((math.prod(sizes), *own.shape), dtype=own.dtype)
    everyones[slot] = own
    everyones = everyones.to(mesh.device_type)
    # All slots but one are zeros everywhere, and adding zero changes no number.
    _all_reduce(everyones, mesh, shards)
    return everyones.cpu()


def _all_reduce(tensor: Tensor, mesh: Any, shards: Sequence[int]) -> None:
    for d in shards:
        torch.distributed.all_reduce(tensor, group=mesh.get_group(d))


def _row(moments: Sequence[Moments]) -> list[float]:
    """Return a part's moments as numbers; a count of 0 stands for an empty part."""
    if not moments:
        return [0.0] * _MOMENTS_ROW
    (m,) = moments
    if not m.finite:
        return [float(m.count), *[0.0] * (_MOMENTS_ROW - 1)]  # a NaN would not stay in its slot
    return [float(m.count), m.pivot, *m.s1, *m.s2, 1.0]


def _moments(row: Sequence[float], wide: bool) -> Moments:
    count, pivot, s1, s1_low, s2, s2_low, finite = row
    return Moments(int(count), pivot, (s1, s1_low), (s2, s2_low), finite == 1.0, wide)
