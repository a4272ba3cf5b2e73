"""Devices: one file each; the file's name is the name a user types, or stands in `_SHARED` for several.

A device module offers `open_device(name) -> Device`. A device works on tiles: runs of stored bytes that lie
in host memory. It never decides anything: which tensors, which std and which amplitude are its caller's.
Every device gives the same bytes.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from noisytune_cli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from noisytune_cli.noise.std import Moments
    from noisytune_cli.noise.stream import Noise

#: Kinds of device that have no module of their own, and the one that serves them.
_SHARED = {"mps": "torch"}


class Summary(NamedTuple):
    """Statistics of one tile: extremes and Σ|x| (meaningless with a NaN inside), and counts of elements."""

    minimum: float
    maximum: float
    absolute_sum: float
    zeros: int
    nans: int
    infinities: int


class Device(Protocol):
    """Kernels over tiles of stored bytes (little-endian, any dtype of FLOAT_DTYPES). Thread-safe."""

    def moments(self, tile: memoryview, dtype: str) -> Moments:
        """Return the float64 sums of a tile about a pivot of its own."""

    def add_exact_sums(self, tile: memoryview, dtype: str, sums: NDArray[np.int64]) -> None:
        """Add a tile's values to exact sums (`moments.new_exact_sums`), which one thread at a time may do."""

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
        """Write tile + noise to `out`; return (unchanged, clamped) elements.

        `out` is apart from the tile or, in the tile's dtype, the tile itself.
        `first` is the logical index of the tile's first element. The sum is rounded once, to `out_dtype`
        (None: the tile's); what `convert` gives counts as unchanged.
        """

    def convert(self, tile: memoryview, out: memoryview, dtype: str, out_dtype: str) -> int:
        """Write the tile in another dtype to `out`, rounded once; return how many finite values overflowed.

        Those become infinite. Infinities stay, and every NaN becomes the target's one quiet NaN.
        """

    def summarize(self, tile: memoryview, dtype: str) -> Summary:
        """Return the statistics of a tile that moments do not hold."""


class DeviceModule(Protocol):
    """What a device module offers."""

    def open_device(self, name: str) -> Device:
        """Return the device that a name such as `cuda` or `cuda:1` stands for."""


def names() -> list[str]:
    """Return the names of all device modules, sorted, without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> DeviceModule:
    """Import the module of a device (`cuda:1` is of the module `cuda`); KeyError if there is none."""
    module = name.partition(":")[0]
    if module not in names():
        raise KeyError(name)
    return cast(DeviceModule, importlib.import_module(f"{__name__}.{module}"))


def open_device(name: str) -> Device:
    """Open the device a user names: `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises UsageError where there is no such name, or no such hardware here.
    """
    return load(module_of(name)).open_device(name)


def module_of(name: str) -> str:
    """Return the module of the device a user names; UsageError where there is none."""
    kind = name.partition(":")[0]
    module = kind if kind in names() else _SHARED.get(kind)
    if module is None:
        raise unknown_device(name)
    return module


def unknown_device(name: str) -> UsageError:
    """Return the error for a name that no device has."""
    return UsageError(
        "cannot use the device", why=f'"{name}" names none', next_step="Choose cpu, cuda, cuda:N or mps"
    )
