"""The compiled kernels (`kernels.c`): found, loaded at the level of this CPU, and called.

The library is built with the package (`build.py`). Where there is none that loads here, the NumPy reference
does its work: the same bits, many times slower.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from noisytune_cli.errors import NoisytuneWarning, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What kernels.c calls the dtypes and the distributions, by number.
DTYPES = ("F32", "F64", "BF16", "F16")
DISTRIBUTIONS = ("uniform", "gaussian")

#: The variable that names a level other than the CPU's highest: one of `LEVELS`, or `numpy`.
LEVEL_VARIABLE = "NOISYTUNE_CPU_LEVEL"
#: What `noisytune_level` returns for each level: that of x86-64, by the psABI's names, or arm64's only one.
LEVELS = {"neon": 1, "v2": 2, "v3": 3, "v4": 4}
_NUMPY = "numpy"

_PATH = Path(__file__).with_name("kernels.so")


class Kernels(Protocol):
    """The kernels; what each does is said in kernels.c. Addresses are ints, dtypes names."""

    def noise(
        self,
        distribution: str,
        dtype: str,
        out_dtype: str,
        rows: NDArray[Any],
        following: NDArray[np.int64],
        most: int,
    ) -> None:
        """Add noise to NOISE_ROW rows, from `following[0]` on, up to `most` of them."""

    def mix(
        self,
        distribution: str,
        dtype: str,
        out_dtype: str,
        rows: NDArray[Any],
        following: NDArray[np.int64],
        most: int,
    ) -> None:
        """Add mixtures to MIX_ROW rows in the same way."""

    def moments(self, dtype: str, rows: NDArray[Any], following: NDArray[np.int64], most: int) -> None:
        """Measure MOMENTS_ROW rows in the same way."""

    def exact(self, dtype: str, x: int, n: int, sums: NDArray[np.int64]) -> None:
        """Add n values to exact sums."""

    def summary(self, dtype: str, x: int, n: int) -> tuple[float, float, float, int, int, int]:
        """Return (min, max, Σ|x|, zeros, NaNs, infinities) of n values."""

    def change(self, dtype: str, other: str, x: int, y: int, n: int) -> tuple[list[float], float, int]:
        """Return sums over n pairs of values, the largest |y - x|, and how many are equal."""

    def convert(self, dtype: str, out_dtype: str, x: int, y: int, n: int) -> int:
        """Write n values in another dtype; return how many overflowed."""


class _Change(ctypes.Structure):
    _fields_ = (("sums", ctypes.c_double * 10), ("largest", ctypes.c_double), ("equal", ctypes.c_int64))


class _Summary(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("minimum", "maximum", "absolute_sum")),
        *((name, ctypes.c_int64) for name in ("zeros", "nans", "infinities")),
    )


class Library:
    """The kernels of the compiled library at one level. The GIL is released while one runs."""

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        address, number, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        taking = address, number, address, number

        def function(name: str, *arguments: Any, returns: Any = None) -> Any:
            found = library[f"{name}_{level}"]
            found.argtypes, found.restype = arguments, returns
            return found

        self._adding = {name: function(name, kind, kind, kind, *taking) for name in ("noise", "mix")}
        self._moments = function("moments", kind, *taking)
        self._exact = function("exact", kind, address, number, address)
        self._summary = function("summary", kind, address, number, address)
        self._change = function("change", kind, kind, address, address, number, address)
        self._convert = function("convert", kind, kind, address, address, number, returns=number)

    def noise(self, distribution: str, dtype: str, out_dtype: str, *taking: Any) -> None:
        """Add noise; of a distribution that kernels.c has not, in NumPy."""
        self._add("noise", distribution, dtype, out_dtype, *taking)

    def mix(self, distribution: str, dtype: str, out_dtype: str, *taking: Any) -> None:
        """Add mixtures, likewise."""
        self._add("mix", distribution, dtype, out_dtype, *taking)

    def _add(
        self,
        kernel: Literal["noise", "mix"],
        distribution: str,
        dtype: str,
        out_dtype: str,
        rows: NDArray[Any],
        following: NDArray[np.int64],
        most: int,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            from noisytune_cli.noise.devices.cpu import reference

            getattr(reference, kernel)(distribution, dtype, out_dtype, rows, following, most)
            return
        kinds = DISTRIBUTIONS.index(distribution), DTYPES.index(dtype), DTYPES.index(out_dtype)
        self._adding[kernel](*kinds, rows.ctypes.data, len(rows), following.ctypes.data, most)

    def moments(self, dtype: str, rows: NDArray[Any], following: NDArray[np.int64], most: int) -> None:
        """Measure."""
        self._moments(DTYPES.index(dtype), rows.ctypes.data, len(rows), following.ctypes.data, most)

    def exact(self, dtype: str, x: int, n: int, sums: NDArray[np.int64]) -> None:
        """Add to exact sums."""
        self._exact(DTYPES.index(dtype), x, n, sums.ctypes.data)

    def summary(self, dtype: str, x: int, n: int) -> tuple[float, float, float, int, int, int]:
        """Summarize."""
        found = _Summary()
        self._summary(DTYPES.index(dtype), x, n, ctypes.byref(found))
        return (
            found.minimum,
            found.maximum,
            found.absolute_sum,
            found.zeros,
            found.nans,
            found.infinities,
        )

    def change(self, dtype: str, other: str, x: int, y: int, n: int) -> tuple[list[float], float, int]:
        """Compare."""
        found = _Change()
        self._change(DTYPES.index(dtype), DTYPES.index(other), x, y, n, ctypes.byref(found))
        return list(found.sums), found.largest, found.equal

    def convert(self, dtype: str, out_dtype: str, x: int, y: int, n: int) -> int:
        """Convert."""
        return int(self._convert(DTYPES.index(dtype), DTYPES.index(out_dtype), x, y, n))


@functools.cache
def load() -> Kernels:
    """Return what `choose` chose the first time."""
    return choose()


def choose() -> Kernels:
    """Return the kernels at this CPU's level, or that of NOISYTUNE_CPU_LEVEL; NumPy's with a warning.

    UsageError where the variable names a level that this CPU has not.
    """
    wanted = os.environ.get(LEVEL_VARIABLE, "")
    if wanted == _NUMPY:
        return _reference()
    has: dict[str, Library] = {}
    try:
        library = ctypes.CDLL(os.fspath(_PATH))
        has = {level: Library(library, level) for level in levels(library)}
    except (OSError, AttributeError) as error:
        if "failed to map" in str(error) or "cannot allocate memory" in str(error).lower():
            raise MemoryError from error
        why = str(error) if _PATH.exists() else f"{_PATH} is missing"
    else:
        why = "this CPU is older than x86-64-v2"
    if wanted and wanted not in has:
        raise UsageError(
            f"cannot use the CPU's level {wanted!r}",
            why=f"{LEVEL_VARIABLE} must be one of {', '.join([*has, _NUMPY])} here",
            next_step="Unset it to use the highest",
        )
    if not has:
        warnings.warn(
            f"the compiled kernels cannot be used ({why}): NumPy does their work, with the same results, "
            "many times slower. Install noisytune again for this machine to have them",
            NoisytuneWarning,
            stacklevel=1,
        )
        return _reference()
    return has[wanted] if wanted else [*has.values()][-1]


def levels(library: ctypes.CDLL) -> list[str]:
    """Return the levels that the library has and this CPU too, lowest first."""
    highest = library["noisytune_level"]()
    lowest = 1 if platform.machine() in ("aarch64", "arm64") else 2
    return [name for name, number in LEVELS.items() if lowest <= number <= highest]


def _reference() -> Kernels:
    from noisytune_cli.noise.devices.cpu import reference

    return reference
