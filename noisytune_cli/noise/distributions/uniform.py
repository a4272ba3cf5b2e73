"""The uniform noise of the NoisyTune paper: U(-λ/2, λ/2) · std(W).

The top 24 bits k of a word give c = (2k + 1 - 2^24) · 2^-25: exact in float32, symmetric about 0, never 0,
|c| < 1/2, evenly spaced. The amplitude is λ · std, so λ is the full width of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.noise.distributions import to_float32

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_BITS = 24
FLOAT64 = False

_ODD = np.int32(2**_BITS - 1)
_STEP = np.float32(2.0 ** -(_BITS + 1))


def coefficients(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return c in (-1/2, 1/2) for [n] u32 words."""
    k = (words >> np.uint32(8)).astype(np.int32)
    return (np.int32(2) * k - _ODD).astype(np.float32) * _STEP


def tensor_coefficients(words: Tensor) -> Tensor:
    """Return `coefficients` for [n] u32 words in an int64 tensor."""
    return ((words >> 8) * 2 - int(_ODD)).float() * float(_STEP)


def amplitude(lam: Any, std: float) -> Any:
    """Return float32(λ · std), the full width of the noise; infinite where float32 cannot hold it."""
    return to_float32(lam * float(std))


def absolute_amplitude(sigma: Any) -> Any:
    """Return float32(σ · √12): the full width of noise whose std is σ."""
    return to_float32(sigma * math.sqrt(12.0))


def overall_amplitude(found: Sequence[float]) -> float:
    """Return the full width of a sum of noises: Σ |a|."""
    return math.fsum(map(abs, found))


def noise_range(amplitude: float) -> dict[str, float]:
    """Return the bounds {low, high} of the noise."""
    return {"low": -abs(amplitude) / 2, "high": abs(amplitude) / 2}
