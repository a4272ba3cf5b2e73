"""CUDA GPUs, `cuda` and `cuda:N`: fused Triton kernels where they can run, torch operations otherwise.

A fused kernel has to prove itself the first time that a dtype and distribution ask for it, in place and from
another tensor, on values of both alignments, of whole and cut tiles, subnormal sums and sums that overflow
among them: its bits must be those of the NumPy reference. Where Triton, its compiler or these bits are
missing, and for what the kernels do not offer (sums rounded to another dtype), the torch operations, which
prove themselves likewise, do it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch

from noisytune_cli.noise import stream
from noisytune_cli.noise.devices import Device
from noisytune_cli.noise.devices.cpu import Cpu
from noisytune_cli.noise.devices.torch import Torch, open_torch, operations
from noisytune_cli.noise.std import round_std
from noisytune_cli.noise.stream import Noise

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from noisytune_cli.noise.std import Moments


class Cuda(Torch):
    """A CUDA device; what it has beside `Torch` are the fused kernels."""

    def _moments(self, values: Tensor) -> Moments:
        if not values.numel() or not sums_exactly(self.device, values.dtype):
            return super()._moments(values)
        from noisytune_cli.noise.devices.cuda import sums

        return operations.moments_of(sums.sums([values])[0].tolist(), values)

    def _add_noise(self, values: Tensor, out: Tensor, noise: Noise, first: int) -> Tensor:
        fits = out is values and values.numel()
        if not fits or not adds_exactly(self.device, values.dtype, noise.distribution, noise.is_single):
            return super()._add_noise(values, out, noise, first)
        from noisytune_cli.noise.devices.cuda import add
        from noisytune_cli.noise.devices.cuda.launch import Row

        return add.add_noise([Row(values, noise, first)])[0]


def open_device(name: str) -> Device:
    """Return the device that `cuda` or `cuda:N` names; UsageError where it names none, or none is here."""
    return open_torch(name, Cuda)


@functools.cache
def adds_exactly(device: torch.device, dtype: torch.dtype, distribution: str, is_single: bool) -> bool:
    """Say whether a fused kernel (that of one term, or the other) adds noise with the reference's bits."""
    if not _can_run(device):
        return False
    from noisytune_cli.noise.devices.cuda import add
    from noisytune_cli.noise.devices.cuda.launch import Row

    if not add.offers(distribution):
        return False
    terms = ((2**64 - 1, 0.3),) if is_single else ((2**64 - 1, 0.3), (1, -0.05))
    # Nearly half of the largest value that both the dtype and the amplitude, a float32, can hold.
    large = 0.496 * min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    label = operations.NAMES[dtype]
    try:
        for first in (2**63, 2**63 + 1):
            for scale in (1.0, large, 2.0**-12, 2.0**-126):
                scaled = [(stream.stream_words(s, "w"), float(np.float32(a * scale))) for s, a in terms]
                noise = Noise(distribution, tuple(scaled), 1.0 if is_single else 0.7)
                values = _samples(dtype, scale)
                expected, *counts = stream.mix(_stored(values), label, noise, first)
                base = values.to(device)
                rows = [Row(torch.zeros_like(base), noise, first, base), Row(base.clone(), noise, first)]
                rows = rows if scale >= 1.0 else rows[1:]
                if add.add_noise(rows).tolist() != [counts] * len(rows):
                    return False
                if any(_stored(row.values.cpu()).tobytes() != expected.tobytes() for row in rows):
                    return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever Triton, its compiler or the driver may raise, torch operations remain
        return False
    return True


@functools.cache
def sums_exactly(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the fused kernels give moments from which the std is what the CPU makes of the values."""
    if not _can_run(device):
        return False
    from noisytune_cli.noise.devices.cuda import sums

    values = _samples(dtype, 1.0)
    wild = values.clone()
    wild[-1] = float("nan")
    tile = values.view(torch.uint8).numpy().data
    try:
        # Of two alignments, so that each kernel is run.
        tensors = [values.to(device), wild.to(device), values.to(device)[1:]]
        rows = sums.sums(tensors).tolist()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # as above
        return False
    whole, with_nan, rest = (operations.moments_of(row, t) for row, t in zip(rows, tensors, strict=True))
    size = values.element_size()
    cpu, label = Cpu(), operations.NAMES[dtype]
    return (
        not with_nan.finite
        and whole.finite
        and rest.finite
        and round_std([whole]) == round_std([cpu.moments(tile, label)])
        and round_std([rest]) == round_std([cpu.moments(tile[size:], label)])
    )


def _can_run(device: torch.device) -> bool:
    """Say whether Triton is here and works on a kind of device."""
    if importlib.util.find_spec("triton") is None:
        return False
    from noisytune_cli.noise.devices.cuda.launch import INTERPRETED

    return device.type == ("cpu" if INTERPRETED else "cuda")


def _samples(dtype: torch.dtype, scale: float) -> Tensor:
    """Return values for more than two tiles in host memory."""
    from noisytune_cli.noise.devices.cuda.launch import TILE

    return (
        torch.linspace(-2.0, 2.0, 2 * TILE.value + 5, dtype=torch.float64, device="cpu").mul_(scale).to(dtype)
    )


def _stored(values: Tensor) -> NDArray[np.generic]:
    """Return values in host memory as the reference takes them."""
    return values.view(torch.uint8).numpy().view(stream.STORED[operations.NAMES[values.dtype]])
