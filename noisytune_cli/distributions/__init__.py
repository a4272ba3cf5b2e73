"""Noise distributions: one file each; the file's name is the name a user types.

A distribution module offers

    coefficients(words)           u32 words [n], n a multiple of 4 -> float32 noise of unit amplitude [n]
    amplitude(lam, std)           λ and std32 -> the float32 that multiplies the coefficients
    noise_range(amplitude)        {low, high} or {noise_std}, as the manifest has them
    fill(c, words)                `coefficients` as one loop over [n] arrays, in what Numba compiles
    PARTS                         the module's functions that `fill` calls
    tensor_coefficients(words)    `coefficients` in torch's operations: int64 tensor -> float32 tensor
    EVEN_BITS                     b where c is (2k + 1 - 2^b) · 2^-(b+1), k the top b bits of a word, b <= 24;
                                  else None
    FLOAT64                       whether `tensor_coefficients` needs a device with float64

`coefficients`, `fill` and `tensor_coefficients` do the same arithmetic in the same order, so they agree in
every bit.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

#: From here on a number is nearer to 2^128 than to the largest float32, and rounds to infinity.
PAST_FLOAT32 = 2.0**128 - 2.0**103


class Distribution(Protocol):
    """What a distribution module offers (see above)."""

    PARTS: tuple[Callable[..., Any], ...]
    EVEN_BITS: int | None
    FLOAT64: bool

    def coefficients(self, words: NDArray[np.uint32]) -> NDArray[np.float32]: ...
    def amplitude(self, lam: float, std: float) -> np.float32: ...
    def noise_range(self, amplitude: float) -> dict[str, float]: ...
    def fill(self, c: Any, words: Any) -> None: ...
    def tensor_coefficients(self, words: Tensor) -> Tensor: ...


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
