"""CUDA GPUs, `cuda` and `cuda:N`: fused Triton kernels where they can run, torch operations otherwise.

A fused kernel has to prove itself the first time that a dtype (and distribution) asks for it, on values of
both alignments, of whole and cut tiles, subnormal sums and sums that overflow among them: its bits must be
those of the NumPy reference. Where Triton, its compiler or these bits are missing, and for what the kernels
do not offer (sums rounded to another dtype), the torch operations, which prove themselves likewise, do it.
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
from noisytune_cli.noise.devices.torch import NUMPY, Torch, open_torch, operations
from noisytune_cli.noise.std import round_std

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from noisytune_cli.noise.std import Moments
    from noisytune_cli.noise.stream import Noise


class Cuda(Torch):
    """A CUDA device; what it has beside `Torch` are the fused kernels."""

    def _moments(self, values: Tensor) -> Moments:
        if not values.numel() or not sums_exactly(self.device, values.dtype):
            return super()._moments(values)
        from noisytune_cli.noise.devices.cuda import sums

        return operations.moments_of(sums.sums([values])[0].tolist(), values)

    def _add_noise(self, values: Tensor, out: Tensor, noise: Noise, first: int) -> Tensor:
        fits = out is values and values.numel() and noise.is_single
        if not fits or not adds_exactly(self.device, values.dtype, noise.distribution):
            return super()._add_noise(values, out, noise, first)
        from noisytune_cli.noise.devices.cuda import add
        from noisytune_cli.noise.devices.cuda.launch import Row

        ((stream, amplitude),) = noise.terms
        return add.add_noise([Row(values, stream, first, amplitude)], noise.distribution)[0]


def open_device(name: str) -> Device:
    """Return the device that `cuda` or `cuda:N` names; UsageError where it names none, or none is here."""
    return open_torch(name, Cuda)


@functools.cache
def adds_exactly(device: torch.device, dtype: torch.dtype, distribution: str) -> bool:
    """Say whether the fused kernel can add noise of a distribution, with the bits of the reference."""
    if not _can_run(device):
        return False
    from noisytune_cli.noise.devices.cuda import add
    from noisytune_cli.noise.devices.cuda.launch import Row

    if not add.offers(distribution):
        return False
    seed, name = 2**64 - 1, "w"
    # Nearly half of the largest value that both the dtype and the amplitude, a float32, can hold.
    large = 0.496 * min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    try:
        for first in (2**63, 2**63 + 1):
            for scale in (1.0, large, 2.0**-12, 2.0**-126):
                values = _samples(dtype, scale)
                c = stream.coefficients(distribution, seed, name, first, values.numel())
                stored, label = _stored(values), operations.NAMES[dtype]
                expected, *counts = stream.add_noise(stored, label, c, np.float32(0.3 * scale))
                noised = values.to(device)
                row = Row(noised, stream.stream_words(seed, name), first, float(np.float32(0.3 * scale)))
                (got,) = add.add_noise([row], distribution).tolist()
                if got != counts or _stored(noised.cpu()).tobytes() != expected.tobytes():
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
    return values.view(torch.uint8).numpy().view(NUMPY[operations.NAMES[values.dtype]])
