"""Sums that are begun before the plan: a GPU measures a model while Python decides what to do with it.

To plan for some hundreds of parameters takes about as long as to read seven billion values. Only what the
fused kernels can measure where it lies is begun, and nothing is said of what is wrong with it: the plan will.
What the plan leaves out was then measured for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from noisytune_cli.memory.in_place import enough_memory, is_exact, lies_flat
from noisytune_cli.memory.overlaps import has_memory
from noisytune_cli.memory.sharded import PLAIN
from noisytune_cli.noise.devices import cuda
from noisytune_cli.noise.devices.torch import operations
from noisytune_cli.noise.devices.torch.results import send_to_host
from noisytune_cli.noise.std import Moments

#: Tensors of the first batch that a device is given, so that it has something to do at once. The next are
#: larger and larger, since a launch takes Python's time too.
FIRST_BATCH = 16


class SumsAhead:
    """The sums of tensors that are under way on their devices, in batches; each tensor is known by itself."""

    def __init__(self, tensors: Iterable[object] = ()) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._sent: deque[tuple[list[Tensor], Callable[[], list[list[float]]]]] = deque()
        self._moments: dict[int, Moments] = {}
        waiting: dict[torch.device, list[Tensor]] = {}
        size = FIRST_BATCH
        for tensor in tensors:
            if isinstance(tensor, Tensor) and id(tensor) not in self._tensors and _can_go_ahead(tensor):
                self._tensors[id(tensor)] = tensor
                batch = waiting.setdefault(tensor.device, [])
                batch.append(tensor)
                if len(batch) == size:
                    self._begin(waiting.pop(tensor.device))
                    size *= 4
        for batch in waiting.values():
            self._begin(batch)

    def _begin(self, batch: list[Tensor]) -> None:
        from noisytune_cli.noise.devices.cuda import sums

        with torch.no_grad(), enough_memory():
            self._sent.append((batch, send_to_host(sums.sums(batch))))

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._tensors

    def moments(self, tensor: Tensor) -> Moments:
        """Return the moments of a tensor, waiting for its batch and those before it."""
        while id(tensor) not in self._moments:
            batch, rows = self._sent.popleft()
            with enough_memory():
                for each, row in zip(batch, rows(), strict=True):
                    self._moments[id(each)] = operations.moments_of(row, each)
        return self._moments[id(tensor)]


def _can_go_ahead(tensor: Tensor) -> bool:
    """Say whether a fused kernel can measure a tensor where it lies."""
    return (
        type(tensor) in PLAIN
        and not tensor.is_nested
        and tensor.layout == torch.strided
        and tensor.dtype in operations.NAMES
        and tensor.numel() > 0
        and has_memory(tensor)
        and is_exact(tensor.device)
        and lies_flat(tensor)
        and cuda.sums_exactly(tensor.device, tensor.dtype)
    )
