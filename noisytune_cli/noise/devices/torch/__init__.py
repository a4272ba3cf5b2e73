"""GPUs through plain torch operations: `mps`; for tests, any torch device as `torch:NAME`.

A tile goes through a staging buffer of its thread (pinned for CUDA, so that the GPU copies it by itself) to
the device and back. Moments and noise are computed there. Exact sums, which are rarely needed, and the
statistics of `inspect` are the CPU's, and so is all that needs float64 where the device has none (mps).

A device has to prove itself when it is opened: it draws and rounds a little noise, and the bits must be those
of the NumPy reference. Hardware or a driver that is not exact is refused, so it can never reach an output.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from noisytune_cli.errors import ResourceExhausted, UsageError
from noisytune_cli.noise import distributions, stream
from noisytune_cli.noise.devices import Device, Summary, unknown_device
from noisytune_cli.noise.devices.cpu import Cpu
from noisytune_cli.noise.devices.torch import operations
from noisytune_cli.noise.stream import Noise

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from noisytune_cli.noise.std import Moments


class Torch:
    """A torch device; its state is one staging buffer for each thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.has_float64 = device.type != "mps"
        self._cpu = Cpu()
        self._local = threading.local()

    def moments(self, tile: memoryview, dtype: str) -> Moments:
        """Return the float64 sums of a tile about the mean of its first values."""
        if not self.has_float64:
            return self._cpu.moments(tile, dtype)
        with self._enough_memory():
            return self._moments(self._to_device(tile, dtype))

    def add_exact_sums(self, tile: memoryview, dtype: str, sums: NDArray[np.int64]) -> None:
        """Add a tile's values to exact sums, on the CPU."""
        self._cpu.add_exact_sums(tile, dtype, sums)

    def add_noise(
        self,
        tile: memoryview,
        out: memoryview,
        dtype: str,
        out_dtype: str | None = None,
        *,
        noise: Noise,
        first: int,
    ) -> tuple[int, int]:
        """Write tile + noise to `out`; return (unchanged, clamped) elements."""
        needs_float64 = "F64" in (dtype, out_dtype) or distributions.load(noise.distribution).FLOAT64
        if needs_float64 and not self.has_float64:
            return self._cpu.add_noise(tile, out, dtype, out_dtype, noise=noise, first=first)
        with self._enough_memory():
            self._staging(max(len(tile), len(out)))
            values = self._to_device(tile, dtype)
            noised = values
            if out_dtype not in (None, dtype):
                noised = torch.empty_like(values, dtype=operations.DTYPES[out_dtype])
            counts = self._add_noise(values, noised, noise, first)
            staging = self._staging(noised.nbytes)
            staging.copy_(noised.view(torch.uint8))
            unchanged, clamped = counts.tolist()
        np.frombuffer(out, np.uint8)[:] = staging.numpy()
        return unchanged, clamped

    def convert(self, tile: memoryview, out: memoryview, dtype: str, out_dtype: str) -> int:
        """Write the tile in another dtype to `out`, on the CPU: it costs less than the way to the device."""
        return self._cpu.convert(tile, out, dtype, out_dtype)

    def summarize(self, tile: memoryview, dtype: str) -> Summary:
        """Return the statistics of a tile that moments do not hold, from the CPU."""
        return self._cpu.summarize(tile, dtype)

    def _moments(self, values: Tensor) -> Moments:
        """Return the moments of values on the device."""
        sums: list[float] = operations.block_sums(values).tolist()
        return operations.moments(sums, values.numel(), wide=values.dtype == torch.float64)

    def _add_noise(self, values: Tensor, out: Tensor, noise: Noise, first: int) -> Tensor:
        """Write values + noise to `out`, which may be the values themselves; return [unchanged, clamped]."""
        return operations.add_noise(values, out, noise, first)

    def _to_device(self, tile: memoryview, dtype: str) -> Tensor:
        """Return a tile's values on the device; the copy may still be under way."""
        # By way of NumPy, because torch warns of buffers that are read-only.
        staging = self._staging(len(tile))
        staging.numpy()[:] = np.frombuffer(tile, np.uint8)
        # The caller fetches a result before it is done, so the buffer is free again when its thread returns.
        return staging.view(operations.DTYPES[dtype]).to(self.device, non_blocking=staging.is_pinned())

    def _staging(self, size: int) -> Tensor:
        """Return the first `size` bytes of this thread's staging buffer."""
        held: Tensor | None = getattr(self._local, "staging", None)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.device.type == "cuda")
            self._local.staging = held
        return held[:size]

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        """Turn the device's running out of memory into the error the user sees."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ResourceExhausted(
                f"cannot compute on {self.device}",
                why="the device is out of memory",
                next_step="Free memory on it or use --device=cpu, then run again",
            ) from error


def open_device(name: str) -> Device:
    """Return the device that `mps` names; after `torch:`, that or `cpu` (the default), `cuda`, `cuda:N`.

    Raises UsageError where the name is none of these, or where this machine lacks the device.
    """
    return open_torch(name, Torch)


def open_torch(name: str, kind_of_device: Callable[[torch.device], Torch]) -> Torch:
    """Return a torch device by name, as an object that has proven to be exact; UsageError as above."""
    kind, _, rest = name.partition(":")
    spelling = (rest or "cpu") if kind == "torch" else name
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", spelling):
        raise unknown_device(name)
    device = torch.device(spelling)
    missing = why_missing(device)
    if missing is not None:
        raise UsageError(
            f"cannot use the device {name}",
            why=missing,
            next_step="Use --device=cpu, which gives the same bytes",
        )
    opened = kind_of_device(device)
    if not is_exact(opened):
        raise UsageError(
            f"cannot use the device {name}",
            why="its arithmetic is not exact, so the output could not be reproduced",
            next_step="Use --device=cpu, and please report it with the versions of PyTorch and of the driver",
        )
    return opened


def why_missing(device: torch.device) -> str | None:
    """Say why this machine cannot offer a device, or None where it can."""
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "PyTorch finds no Metal GPU here"
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            return "PyTorch finds no CUDA GPU here, or was built without CUDA"
        if device.index is not None and device.index >= count:
            return f"PyTorch finds {count} CUDA GPUs here, numbered from 0"
    return None


def is_exact(device: Torch) -> bool:
    """Say whether a device adds noise to a few thousand values as the NumPy reference does."""
    name, seed, first, count = "w", 2**64 - 1, 2**63 + 1, 4099
    values = torch.linspace(-2.0, 2.0, count, dtype=torch.float32, device="cpu")
    checks = [(d, d, distribution) for d in ("F32", "F16", "BF16") for distribution in distributions.names()]
    # Other pairs are these roundings again, after sums that are checked above.
    checks += [(dtype, out, "uniform") for dtype in ("F32", "F64") for out in stream.STORED if out != dtype]
    for dtype, out_dtype, distribution in checks:
        as_bytes = values.to(operations.DTYPES[dtype]).view(torch.uint8).numpy()
        c = stream.coefficients(distribution, seed, name, first, count)
        stored = as_bytes.view(stream.STORED[dtype])
        expected, *counts = stream.add_noise(stored, dtype, c, np.float32(0.3), out_dtype)
        out = np.empty(expected.nbytes, np.uint8)
        noise = Noise.of(distribution, stream.stream_words(seed, name), float(np.float32(0.3)))
        got = device.add_noise(as_bytes.data, out.data, dtype, out_dtype, noise=noise, first=first)
        if list(got) != counts or out.tobytes() != expected.tobytes():
            return False
    return True
