"""Noise distributions: one file each; the file's name is the name a user types.

A distribution module offers

    coefficients(words)           u32 words [n], n a multiple of 4 -> float32 noise of unit amplitude [n]
    amplitude(lam, std)           λ (or [n] of them) and std32 -> float32, to multiply the coefficients with
    absolute_amplitude(sigma)     σ, the noise's own std -> the same
    overall_amplitude(found)      the amplitudes of a sum of noises -> that of the sum, for its range
    noise_range(amplitude)        {low, high} or {noise_std}, as the manifest has them
    tensor_coefficients(words)    `coefficients` in torch's operations: int64 tensor -> float32 tensor
    FLOAT64                       whether `tensor_coefficients` needs a device with float64

`coefficients`, `tensor_coefficients` and what devices/cpu/kernels.c has for the distribution do the same
arithmetic in the same order, so they agree in every bit. The CPU draws what kernels.c has not with
`coefficients`.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

#: From here on a number is nearer to 2^128 than to the largest float32, and rounds to infinity.
PAST_FLOAT32 = 2.0**128 - 2.0**103


class Distribution(Protocol):
    """What a distribution module offers (see above)."""

    FLOAT64: bool

    def coefficients(self, words: NDArray[np.uint32]) -> NDArray[np.float32]: ...
    def amplitude(self, lam: Any, std: float) -> Any: ...
    def absolute_amplitude(self, sigma: Any) -> Any: ...
    def overall_amplitude(self, found: Sequence[float]) -> float: ...
    def noise_range(self, amplitude: float) -> dict[str, float]: ...
    def tensor_coefficients(self, words: Tensor) -> Tensor: ...


def to_float32(value: Any) -> Any:
    """Return the float32 nearest to a float64, or [n] to [n]; infinite where float32 cannot hold it."""
    import numpy as np

    if isinstance(value, np.ndarray):
        with np.errstate(over="ignore"):
            return value.astype(np.float32)
    return np.float32(value if abs(value) < PAST_FLOAT32 else math.copysign(math.inf, value))


@functools.cache  # what looks into the folder
def names() -> tuple[str, ...]:
    """Return the names of all distributions, sorted, without importing them."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


@functools.cache  # asked once a tensor
def load(name: str) -> Distribution:
    """Import a distribution by name; KeyError if there is none."""
    if name not in names():
        raise KeyError(name)
    return cast(Distribution, importlib.import_module(f"{__name__}.{name}"))
