"""Measure tensors where they lie, and add noise to them in place.

Host memory goes through the compiled kernels without a copy, all tensors together. On a CUDA device a few
launches of fused kernels, or else torch operations, are queued for all tensors given before the first result
is fetched: so it is waited for once for the sums and once for the counts, whatever the number of tensors.
What cannot be worked on where it lies takes a detour, one tensor at a time: values that are not contiguous by
way of a contiguous copy; those of devices without float64 or of a kind not proven exact, and parts in several
runs on a device, by way of the host.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from noisytune_cli.engine import tiles
from noisytune_cli.engine.threads import default_threads
from noisytune_cli.errors import ResourceExhausted
from noisytune_cli.memory import host
from noisytune_cli.memory.sharded import Dose, LocalTensor
from noisytune_cli.noise.devices import cuda
from noisytune_cli.noise.devices.cpu import Cpu
from noisytune_cli.noise.devices.torch import operations
from noisytune_cli.noise.devices.torch.results import Queued, fetch, send
from noisytune_cli.noise.std import Moments, new_exact_sums

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Bytes of a tile in host memory: Python's part of the work on one is then below 1 %.
_TILE_BYTES = 4 << 20

_CPU = Cpu()


def measure(parts: Sequence[LocalTensor], threads: int | None = None) -> list[list[Moments]]:
    """Return the moments of each part; one Moments, or none if it is empty, of a sharded part."""
    found: list[list[Moments]] = [[] for _ in parts]
    on_device, flat_here, detour = _split(parts)
    count = threads or default_threads()
    with torch.no_grad(), enough_memory():
        queued = send(_queue_sums(parts, on_device))
        measured = host.measure({i: parts[i] for i in flat_here}, count)
        for i in detour:
            measured |= host.measure({i: _copied(parts[i])}, count)
        for i, moments in measured.items():
            found[i] = moments
        for i, row in fetch(queued):
            found[i] = [operations.moments_of(row, parts[i].values)]
    return found


def exact_sums(part: LocalTensor) -> NDArray[np.int64]:
    """Return the exact sums of a part."""
    sums = new_exact_sums()
    with torch.no_grad():
        values = host_values(part.values)
        for data, _ in tiles_of(values):
            _CPU.add_exact_sums(data, operations.NAMES[values.dtype], sums)
    return sums


def faint(part: LocalTensor, limit: float) -> int:
    """Return how many values of a part are within ±`limit`, as `tiles.faint` finds them.

    0 where they lie not flat here.
    """
    values = part.values
    if not values.numel() or not _is_flat_here(values):
        return 0
    dtype = operations.NAMES[values.dtype]
    return sum(tiles.faint(data, dtype, limit) for data, _ in tiles_of(values.view(-1)))


def begin_noise(doses: Sequence[Dose], threads: int | None = None) -> Callable[[], list[tuple[int, int]]]:
    """Add the noise of each dose to its part, which devices may still be at when this returns.

    Returns what waits for them and returns (unchanged, clamped) elements of each. From a base that lies where
    its part does, noise goes to the part in one pass; another one, and that of a detour, is copied there
    first.
    """
    counts: list[list[int]] = [[0, 0] for _ in doses]
    on_device, flat_here, detour = _split([dose.held for dose in doses])
    count = threads or default_threads()
    with torch.no_grad(), enough_memory(), _forgetting_copies():
        queued = send(_queue_noise(doses, on_device))
        _tell_autograd([doses[i].held.values for i in flat_here])
        added = host.add_noise({i: _near(doses[i]) for i in flat_here}, count)
        for i in detour:
            added |= _add_by_detour(i, _laid(doses[i]), count)
        for i, both in added.items():
            counts[i] = both

    def counted() -> list[tuple[int, int]]:
        with enough_memory():
            for i, row in fetch(queued):
                counts[i] = [int(count) for count in row]
        return [(unchanged, clamped) for unchanged, clamped in counts]

    return counted


def _split(parts: Sequence[LocalTensor]) -> tuple[list[int], list[int], list[int]]:
    """Return the indices of the parts to work on by their devices, flat in host memory, and by a detour."""
    on_device: list[int] = []
    flat_here: list[int] = []
    detour: list[int] = []
    for i, part in enumerate(parts):
        values = part.values
        if not values.numel():
            continue
        if len(part.runs) == 1 and is_exact(values.device):
            on_device.append(i)
        else:
            (flat_here if _is_flat_here(values) else detour).append(i)
    return on_device, flat_here, detour


def is_exact(device: torch.device) -> bool:
    """Say whether torch operations on a device have float64 and give the reference's bits."""
    return _is_exact_device(str(device))


@functools.cache
def _is_exact_device(name: str) -> bool:
    from noisytune_cli.noise.devices import torch as torch_device

    return bool(re.fullmatch(r"cuda(:\d+)?", name)) and torch_device.is_exact(
        torch_device.Torch(torch.device(name))
    )


def _queue_sums(parts: Sequence[LocalTensor], indices: Sequence[int]) -> Iterator[Queued]:
    """Measure parts on their devices."""
    fused: dict[torch.device, list[int]] = {}
    for i in indices:
        values = parts[i].values
        if lies_flat(values) and cuda.sums_exactly(values.device, values.dtype):
            fused.setdefault(values.device, []).append(i)
        else:
            yield [i], operations.sums([flat(values)])
    for group in fused.values():
        from noisytune_cli.noise.devices.cuda import sums

        yield group, sums.sums([parts[i].values for i in group])


def _queue_noise(doses: Sequence[Dose], indices: Sequence[int]) -> Iterator[Queued]:
    """Add noise to parts on their devices."""
    fused: dict[torch.device, list[int]] = {}
    for i in indices:
        values, noise = doses[i].held.values, doses[i].noise
        kind = values.device, values.dtype, noise.distribution, noise.is_single
        if lies_flat(values) and cuda.adds_exactly(*kind):
            fused.setdefault(values.device, []).append(i)
        else:
            yield [i], _add_on_device(doses[i]).view(1, -1)
    for group in fused.values():
        from noisytune_cli.noise.devices.cuda import add
        from noisytune_cli.noise.devices.cuda.launch import Row

        near = [_near(doses[i]) for i in group]
        _tell_autograd([dose.held.values for dose in near])
        yield (
            group,
            add.add_noise(
                [Row(dose.held.values, dose.noise, dose.held.runs[0].first, dose.base) for dose in near]
            ),
        )


def _add_by_detour(key: int, dose: Dose, threads: int) -> dict[int, list[int]]:
    with changing(dose.held.values) as values:
        copied = replace(dose, held=replace(dose.held, values=values))
        return host.add_noise({key: copied}, threads)


def _add_on_device(dose: Dose) -> Tensor:
    dose = _near(dose)
    values, (run,) = dose.held.values, dose.held.runs
    every = flat(values)
    with torch.inference_mode(True) if values.is_inference() else torch.no_grad():
        base = every if dose.base is None else dose.base
        counts = operations.add_noise(base, every, dose.noise, run.first)
        if not lies_flat(values):
            values.copy_(every.view(values.shape))
    return counts


def _near(dose: Dose) -> Dose:
    """Return a dose whose base, if it has one, lies on its part's device."""
    if dose.base is None or dose.base.device == dose.held.values.device:
        return dose
    return _laid(dose)


def _laid(dose: Dose) -> Dose:
    """Return a dose without a base: its part has the base's values."""
    if dose.base is None:
        return dose
    overwrite(dose.held.values, dose.base)
    return replace(dose, base=None)


def overwrite(target: Tensor, values: Tensor) -> None:
    """Give a tensor other values, [n] in row-major order, bit for bit."""
    # Autograd is a thread's own setting, and this may not be the caller's thread.
    with torch.inference_mode(True) if target.is_inference() else torch.no_grad(), _forgetting_copies():
        target.copy_(values.view(target.shape), non_blocking=values.is_pinned())


@contextmanager
def _forgetting_copies() -> Iterator[None]:
    """Have weights cast and computed anew after they were written to, or after an interrupt half-way.

    Inside its block autocast keeps a copy of each in the lower precision, `parametrize.cached` what a
    parametrization made of it, and neither looks whether that is right.
    """
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        getattr(parametrize, "_cache", {}).clear()  # torch has no function for it


def _tell_autograd(tensors: Sequence[Tensor]) -> None:
    """Count a change that torch will not see; tensors of inference mode count none.

    It comes before the change, which an interrupt may end half-way.
    """
    torch.autograd.graph.increment_version([values for values in tensors if not values.is_inference()])


@contextmanager
def changing(target: Tensor) -> Iterator[Tensor]:
    """Lend the `host_values` of a tensor to be changed; a copy is written back, unless an error is raised."""
    values = host_values(target)
    if _is_flat_here(target):
        _tell_autograd([target])
        with _forgetting_copies():
            yield values
    else:
        yield values
        overwrite(target, values)


def _is_flat_here(values: Tensor) -> bool:
    return values.device.type == "cpu" and lies_flat(values)


def lies_flat(values: Tensor) -> bool:
    """Say whether values lie in memory in row-major order, aligned and as they are."""
    return values.is_contiguous() and not values.is_neg() and values.data_ptr() % values.element_size() == 0


def flat(values: Tensor) -> Tensor:
    """Return values as [n] in row-major order: their own memory if they lie flat, else a copy."""
    if not lies_flat(values):
        values = torch.empty_like(values, memory_format=torch.contiguous_format).copy_(values)
    return values.view(-1)


def _copied(part: LocalTensor) -> LocalTensor:
    """Return a part with its values flat in host memory, [n]."""
    return replace(part, values=host_values(part.values))


def host_values(values: Tensor) -> Tensor:
    """Return values as [n] in host memory: their own, or a copy."""
    return flat(values.cpu())


def tiles_of(values: Tensor) -> Iterator[tuple[memoryview, int]]:
    """Yield the memory of each tile of values [n] in host memory, and the index of its first element."""
    memory = values.view(torch.uint8).numpy().data
    for at in range(0, len(memory), _TILE_BYTES):
        yield memory[at : at + _TILE_BYTES], at // values.element_size()


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn a device's running out of memory into the error the user sees."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceExhausted(
            "cannot add noise on the device",
            why="it is out of memory for the scratch space of one tensor",
            next_step="Free memory on it, or perturb the model before moving it there; load it again first",
        ) from error
