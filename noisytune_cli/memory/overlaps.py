"""Where the values of tensors lie in memory, and whether two of them share some.

Storages are no help: NumPy's arrays come as a storage each, though one may be a view of another. What counts
are addresses. On devices whose pointers are no addresses (mps) storages are all there is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

#: Kinds of devices on which a tensor's pointer is an address.
_ADDRESSED = ("cpu", "cuda")

#: What to say of values that have none.
NO_MEMORY = "its memory was freed, or its values are held in other tensors"


def place(values: Tensor) -> tuple[Hashable, int]:
    """Return a key of the memory that values lie in, and the byte there at which they begin."""
    if values.device.type in _ADDRESSED:
        return values.device, values.data_ptr()
    start = int(values.storage_offset()) * values.element_size()
    return (values.device, values.untyped_storage().data_ptr()), start


def strides(values: Tensor) -> tuple[int, ...]:
    """Return the strides of values; 0 where there is nothing to step over."""
    return tuple(
        [0 if size == 1 else stride for size, stride in zip(values.shape, values.stride(), strict=True)]
    )


def has_memory(values: Tensor) -> bool:
    """Say whether the storage of values reaches as far as they do: it does not where it was freed.

    That of a tensor which wraps others, or which stands for one, says that it does and is nowhere.
    """
    if not values.numel():
        return True
    start = int(values.storage_offset()) * values.element_size()
    reaches = start + _extent(values) <= values.untyped_storage().nbytes()
    return reaches and (values.device.type not in _ADDRESSED or values.data_ptr() != 0)


def find_overlap(tensors: Sequence[Tensor]) -> int | None:
    """Return the index of a tensor that shares elements with another, or has one twice; None if none does.

    Where none of those that share is of floats, nothing changes, and it is no matter.
    """
    by_memory: dict[Hashable, list[tuple[int, int]]] = {}
    for i, values in enumerate(tensors):
        if values.numel():
            memory, start = place(values)
            by_memory.setdefault(memory, []).append((start, i))
    for starts in by_memory.values():
        for entangled in _entangled(tensors, starts):
            views = [tensors[i] for i in entangled]
            if not any(view.is_floating_point() for view in views):
                continue
            apart = len(views) == 1 and (views[0].is_contiguous() or _steps_over_itself(views[0]))
            if not apart and _share_elements(views):
                return entangled[0]
    return None


def _entangled(tensors: Sequence[Tensor], starts: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Yield the tensors whose extents in one memory overlap, in groups, many of one tensor.

    `starts` are where they begin, each with the tensor's index.
    """
    group: list[int] = []
    end = 0
    for start, i in sorted(starts):
        if group and start >= end:
            yield group
            group = []
        group.append(i)
        end = max(end, start + _extent(tensors[i]))
    if group:
        yield group


def _extent(values: Tensor) -> int:
    """Return the bytes from the first of values to the last, none of whose strides are negative."""
    if values.is_contiguous():
        return values.numel() * values.element_size()
    last = sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return (int(last) + 1) * values.element_size()


def _steps_over_itself(values: Tensor) -> bool:
    """Say whether each stride passes all that the smaller ones reach: then no element comes twice."""
    reached = 0
    for stride, size in sorted(zip(strides(values), values.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return False
            reached += (size - 1) * stride
    return True


def _share_elements(views: Sequence[Tensor]) -> bool:
    """Say whether views of one memory have an element in common, or one of them has it twice."""
    size = views[0].element_size()
    start = min(place(view)[1] for view in views)
    offsets = [place(view)[1] - start for view in views]
    if any(view.element_size() != size or offset % size for view, offset in zip(views, offsets, strict=True)):
        return True  # nobody lays tensors of several widths out so
    if any(
        stride == 0 < length - 1 for v in views for stride, length in zip(v.stride(), v.shape, strict=True)
    ):
        return True
    # A mark for each element from the first to the last: a byte, where the elements have two or more.
    end = max(offset + _extent(view) for view, offset in zip(views, offsets, strict=True))
    taken = torch.zeros(end // size, dtype=torch.bool, device="cpu")
    for view, offset in zip(views, offsets, strict=True):
        taken.as_strided(view.shape, view.stride(), offset // size).fill_(True)
    return int(torch.count_nonzero(taken)) < sum(view.numel() for view in views)
