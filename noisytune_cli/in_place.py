"""Measure tensors where they lie, and add noise to them in place.

Host memory goes through the compiled loops without a copy, a CUDA device through torch operations queued
there, all of them before the first result is fetched: so a device is waited for once for the sums and once
for the counts, whatever the number of tensors. What cannot be worked on where it lies takes a detour, one
tensor at a time: values that are not contiguous by way of a contiguous copy; those of devices without
float64 or of a kind not proven exact, and parts in several runs on a device, by way of the host.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from noisytune_cli import torch_kernels
from noisytune_cli.crew import Crew, Hands, Pass, Task, default_threads
from noisytune_cli.devices.cpu import Cpu
from noisytune_cli.errors import ResourceExhausted
from noisytune_cli.moments import Moments, new_exact_sums
from noisytune_cli.sharded import Held
from noisytune_cli.stream import StreamWords

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Bytes of a tile in host memory: Python's part of the work on one is then below 1 %.
_TILE_BYTES = 4 << 20

_DTYPES = {dtype: name for name, dtype in torch_kernels.DTYPES.items()}

_CPU = Cpu()


@dataclass(frozen=True, slots=True)
class Dose:
    """The noise for one tensor: its part here, and the distribution, the stream and the amplitude."""

    held: Held
    distribution: str
    stream: StreamWords
    amplitude: float


def measure(parts: Sequence[Held], threads: int | None = None) -> list[list[Moments]]:
    """Return the moments of each part; one Moments, or none if it is empty, of a sharded part."""
    found: list[list[Moments]] = [[] for _ in parts]
    queued: list[tuple[int, Tensor]] = []
    with torch.no_grad(), _enough_memory():
        for i, part in enumerate(parts):
            if part.values.numel() and _stays_on_device(part):
                queued.append((i, _device_sums(_flat(part.values))))
        _on_host(
            [
                functools.partial(_measure, part.values, found[i], whole=part.mesh is not None)
                for i, part in enumerate(parts)
                if part.values.numel() and not _stays_on_device(part)
            ],
            threads,
        )
        for (i, _), sums in zip(queued, _fetch([sums for _, sums in queued]), strict=True):
            found[i] = [_device_moments(sums, parts[i].values)]
    return found


def exact_sums(part: Held) -> NDArray[np.int64]:
    """Return the exact sums of a part."""
    sums = new_exact_sums()
    with torch.no_grad():
        values = _host_values(part.values)
        for data, _ in _tiles(values, 0, values.numel()):
            _CPU.add_exact_sums(data, _DTYPES[values.dtype], sums)
    return sums


def add_noise(doses: Sequence[Dose], threads: int | None = None) -> list[tuple[int, int]]:
    """Add the noise of each dose to its part; return (unchanged, clamped) elements of each."""
    counts: list[list[int]] = [[0, 0] for _ in doses]
    queued: list[tuple[int, Tensor]] = []
    with torch.no_grad(), _enough_memory():
        for i, dose in enumerate(doses):
            if dose.held.values.numel() and _stays_on_device(dose.held):
                queued.append((i, _add_on_device(dose)))
        _on_host(
            [
                functools.partial(_add, dose, counts[i])
                for i, dose in enumerate(doses)
                if dose.held.values.numel() and not _stays_on_device(dose.held)
            ],
            threads,
        )
        for (i, _), fetched in zip(queued, _fetch([c for _, c in queued]), strict=True):
            counts[i] = [int(count) for count in fetched]
    return [(unchanged, clamped) for unchanged, clamped in counts]


def _stays_on_device(part: Held) -> bool:
    return len(part.runs) == 1 and _is_exact_device(str(part.values.device))


@functools.cache
def _is_exact_device(name: str) -> bool:
    """Say whether torch operations on a device have float64 and give the reference's bits."""
    from noisytune_cli.devices import torch as torch_device

    return bool(re.fullmatch(r"cuda(:\d+)?", name)) and torch_device.is_exact(
        torch_device.Torch(torch.device(name))
    )


def _fetch(results: Sequence[Tensor]) -> list[list[float]]:
    """Return small tensors of one length as lists, waiting for each device once."""
    fetched: list[list[float]] = [[] for _ in results]
    by_device: dict[torch.device, list[int]] = {}
    for i, result in enumerate(results):
        by_device.setdefault(result.device, []).append(i)
    for indices in by_device.values():
        for i, row in zip(indices, torch.stack([results[i] for i in indices]).tolist(), strict=True):
            fetched[i] = row
    return fetched


def _device_sums(values: Tensor) -> Tensor:
    """Return float64 [pivot, finite, Σd, Σd², and what rounding took from these two] of [n] values.

    The sums of blocks are added in pairs, with compensation: so few numbers have to leave the device.
    """
    sums = torch_kernels.block_sums(values)
    high = sums[2:].view(2, -1)
    low = torch.zeros_like(high)
    while high.shape[1] > 1:
        if high.shape[1] % 2:
            high, low = (torch.nn.functional.pad(t, (0, 1)) for t in (high, low))
        a, b = high[:, 0::2], high[:, 1::2]
        high = a + b
        part = high - a
        low = low[:, 0::2] + low[:, 1::2] + ((a - (high - part)) + (b - part))
    return torch.cat((sums[:2], high.flatten(), low.flatten()))


def _device_moments(sums: Sequence[float], values: Tensor) -> Moments:
    pivot, finite, s1, s2, low1, low2 = sums
    wide = values.dtype == torch.float64
    return Moments(values.numel(), pivot, (s1, low1), (s2, low2), finite == 1.0, wide)


def _add_on_device(dose: Dose) -> Tensor:
    values, (run,) = dose.held.values, dose.held.runs
    flat = _flat(values)
    with torch.inference_mode(True) if values.is_inference() else torch.no_grad():
        counts = torch_kernels.add_noise(
            flat,
            flat,
            distribution=dose.distribution,
            stream=dose.stream,
            first=run.first,
            amplitude=dose.amplitude,
        )
        if not _lies_flat(values):
            values.copy_(flat.view(values.shape))
    return counts


def _on_host(tasks: Sequence[Task], threads: int | None) -> None:
    if tasks:
        Crew(tasks, tile_bytes=0, slab_bytes=0).run(threads or default_threads())


def _measure(values: Tensor, found: list[Moments], hands: Hands, *, whole: bool) -> None:
    """Append the moments of a tensor's tiles, or of all of it as one."""
    values = _host_values(values)
    dtype = _DTYPES[values.dtype]
    tiles = [_memory(values)] if whole else [data for data, _ in _tiles(values, 0, values.numel())]
    moments: list[Moments | None] = [None] * len(tiles)

    def tile(_: Hands, index: int) -> None:
        moments[index] = _CPU.moments(tiles[index], dtype)

    hands.crew.share(Pass(len(tiles), tile), hands)
    found += [m for m in moments if m is not None]


def _add(dose: Dose, counts: list[int], hands: Hands) -> None:
    """Add noise to a part, run by run, and its (unchanged, clamped) elements to `counts`."""
    target = dose.held.values
    values = _host_values(target)
    dtype = _DTYPES[values.dtype]
    tiles = [
        (data, run.first + at) for run in dose.held.runs for data, at in _tiles(values, run.start, run.count)
    ]
    done = [(0, 0)] * len(tiles)

    def tile(_: Hands, index: int) -> None:
        data, first = tiles[index]
        done[index] = _CPU.add_noise(
            data,
            data,
            dtype,
            distribution=dose.distribution,
            stream=dose.stream,
            first=first,
            amplitude=dose.amplitude,
        )

    hands.crew.share(Pass(len(tiles), tile), hands)
    # Autograd is a thread's own setting, and this is not the caller's thread.
    with torch.inference_mode(True) if target.is_inference() else torch.no_grad():
        if _lies_flat(target) and target.device.type == "cpu":
            torch.autograd.graph.increment_version(target)  # torch did not see the values change
        else:
            target.copy_(values.view(target.shape))
    for unchanged, clamped in done:
        counts[0] += unchanged
        counts[1] += clamped


def _lies_flat(values: Tensor) -> bool:
    """Say whether values lie in memory in row-major order, aligned and as they are."""
    return values.is_contiguous() and not values.is_neg() and values.data_ptr() % values.element_size() == 0


def _flat(values: Tensor) -> Tensor:
    """Return values as [n] in row-major order: their own memory if they lie flat, else a copy."""
    if not _lies_flat(values):
        values = torch.empty_like(values, memory_format=torch.contiguous_format).copy_(values)
    return values.view(-1)


def _host_values(values: Tensor) -> Tensor:
    """Return values as [n] in host memory: their own, or a copy."""
    return _flat(values.cpu())


def _memory(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def _tiles(values: Tensor, start: int, count: int) -> Iterator[tuple[memoryview, int]]:
    """Yield the memory of each tile of `count` elements from `start`, and how far from `start` it begins."""
    size = values.element_size()
    memory = _memory(values)[start * size : (start + count) * size]
    for at in range(0, len(memory), _TILE_BYTES):
        yield memory[at : at + _TILE_BYTES], at // size


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn a device's running out of memory into the error the user sees."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceExhausted(
            "cannot add noise on the device",
            why="it is out of memory for the scratch space of one tensor",
            next_step="Free memory on it, or perturb the model before moving it there; load it again first",
        ) from error
