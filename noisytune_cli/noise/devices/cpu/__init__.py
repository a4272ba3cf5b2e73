"""The CPU: the compiled kernels (`library.py`) over tiles of stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.noise.devices import Device, Summary, unknown_device
from noisytune_cli.noise.devices.cpu import library
from noisytune_cli.noise.devices.cpu.rows import MIX_ROW, MOMENTS_ROW, NOISE_ROW, TERM, Rows
from noisytune_cli.noise.std import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from noisytune_cli.noise.stream import Noise


class Cpu:
    """The CPU device; it has no state."""

    def moments(self, tile: memoryview, dtype: str) -> Moments:
        """Return the float64 sums of a tile about the mean of its first values, or about zero."""
        count = len(tile) // FLOAT_DTYPES[dtype]
        rows = _moments_rows(_address(tile), count, 1)
        library.load().moments(dtype, rows, np.zeros(1, np.int64), 1)
        return _moments(rows, dtype)[0]

    def moments_rows(
        self, addresses: NDArray[np.int64], counts: NDArray[np.int64], dtype: str, *, keeps: object
    ) -> tuple[Rows, Callable[[], list[Moments]]]:
        """Return the calls that measure tiles of host memory, [n], and what then returns their moments.

        `keeps` holds that memory.
        """
        rows = _moments_rows(addresses, counts, len(addresses))
        return Rows(partial(library.load().moments, dtype), rows, keeps), partial(_moments, rows, dtype)

    def add_exact_sums(self, tile: memoryview, dtype: str, sums: NDArray[np.int64]) -> None:
        """Add a tile's values to exact sums."""
        library.load().exact(dtype, _address(tile), len(tile) // FLOAT_DTYPES[dtype], sums)

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
        """Write tile + noise to `out`, apart from the tile or, in the tile's dtype, the tile itself."""
        out_dtype = out_dtype or dtype
        count = _count(tile, out, dtype, out_dtype)
        at = _address(tile), _address(out), count, first
        kernels = library.load()
        if noise.is_single:
            rows = np.array([(*at, *noise.terms[0], 0, 0)], dtype=NOISE_ROW)
            add = kernels.noise
        else:
            terms = np.array([*noise.terms], TERM)
            rows = np.array([(*at, terms.ctypes.data, len(terms), noise.kept, 0, 0)], dtype=MIX_ROW)
            add = kernels.mix
        add(noise.distribution, dtype, out_dtype, rows, np.zeros(1, np.int64), 1)
        return int(rows["unchanged"][0]), int(rows["clamped"][0])

    def noise_rows(
        self,
        addresses: NDArray[np.int64],
        counts: NDArray[np.int64],
        dtype: str,
        *,
        noises: Sequence[Noise],
        of: NDArray[np.int64],
        firsts: NDArray[np.int64],
        sources: NDArray[np.int64] | None = None,
        keeps: object,
    ) -> Rows:
        """Return the calls that write tiles of host memory with their noise to `addresses`; arrays are [n].

        The tiles lie at `sources`, apart from these, or there already. `noises` are of one distribution, and
        all or none of them single; `of` are their indices. `keeps` holds that memory. The results are the
        rows' fields `unchanged` and `clamped`.
        """
        kernels, distribution = library.load(), noises[0].distribution
        single = noises[0].is_single
        rows = np.zeros(len(addresses), NOISE_ROW if single else MIX_ROW)
        rows["x"], rows["y"] = addresses if sources is None else sources, addresses
        rows["n"], rows["first"] = counts, firsts
        if single:
            terms = np.array([noise.terms[0] for noise in noises], TERM)[of]
            rows["stream"], rows["amplitude"] = terms["stream"], terms["amplitude"]
            return Rows(partial(kernels.noise, distribution, dtype, dtype), rows, keeps)
        each = [np.array([*noise.terms], TERM) for noise in noises]
        rows["terms"] = np.array([terms.ctypes.data for terms in each], np.uint64)[of]
        rows["count"] = np.array([len(terms) for terms in each], np.int64)[of]
        rows["kept"] = np.array([noise.kept for noise in noises])[of]
        return Rows(partial(kernels.mix, distribution, dtype, dtype), rows, (keeps, each))

    def convert(self, tile: memoryview, out: memoryview, dtype: str, out_dtype: str) -> int:
        """Write the tile in another dtype to `out`; return how many finite values overflowed."""
        count = _count(tile, out, dtype, out_dtype)
        return library.load().convert(dtype, out_dtype, _address(tile), _address(out), count)

    def compare(
        self, tile: memoryview, other: memoryview, dtype: str, other_dtype: str
    ) -> tuple[list[float], float, int]:
        """Return what two tiles of as many values are and differ by, x and y with d = y - x.

        That is Σ of |x|, |y|, |d|, x, d, x², y², d², d⁴ and xy, the largest |d|, and how many are equal.
        Where a value is not finite, Σd² is not, and the rest means nothing.
        """
        count = len(tile) // FLOAT_DTYPES[dtype]
        if len(other) != count * FLOAT_DTYPES[other_dtype]:  # the kernel would read past it
            raise ValueError("the tiles must have as many values")
        return library.load().change(dtype, other_dtype, _address(tile), _address(other), count)

    def summarize(self, tile: memoryview, dtype: str) -> Summary:
        """Return the statistics of a tile that moments do not hold."""
        return Summary(*library.load().summary(dtype, _address(tile), len(tile) // FLOAT_DTYPES[dtype]))


def open_device(name: str) -> Device:
    """Return the CPU device; UsageError where the name is not just `cpu`."""
    if name != "cpu":
        raise unknown_device(name)
    return Cpu()


def _moments_rows(addresses: Any, counts: Any, length: int) -> NDArray[Any]:
    rows = np.zeros(length, MOMENTS_ROW)
    rows["x"], rows["n"] = addresses, counts
    return rows


def _moments(rows: NDArray[Any], dtype: str) -> list[Moments]:
    """Return what is in measured rows."""
    return [
        Moments(count, pivot, (s1, low1), (s2, low2), bool(finite), dtype == "F64")
        for _, count, pivot, s1, low1, s2, low2, finite in rows.tolist()
    ]


def _address(tile: memoryview) -> int:
    return int(np.frombuffer(tile, np.uint8).ctypes.data)


def _count(tile: memoryview, out: memoryview, dtype: str, out_dtype: str) -> int:
    """Return the elements of a tile, which `out` must have room for."""
    count = len(tile) // FLOAT_DTYPES[dtype]
    if out.readonly or len(out) != count * FLOAT_DTYPES[out_dtype]:  # the kernel would write past it
        raise ValueError("out must be writable and have room for just the tile")
    return count
