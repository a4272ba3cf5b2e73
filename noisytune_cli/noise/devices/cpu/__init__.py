"""The CPU: the compiled kernels (`library.py`) over tiles of stored bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.noise.devices import Device, Summary, unknown_device
from noisytune_cli.noise.devices.cpu import library
from noisytune_cli.noise.devices.cpu.rows import Rows
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
            rows = np.array([(*at, *noise.terms[0], 0, 0)], dtype=library.NOISE_ROW)
            add = kernels.noise
        else:
            terms = np.array([*noise.terms], library.TERM)
            rows = np.array([(*at, terms.ctypes.data, len(terms), noise.kept, 0, 0)], dtype=library.MIX_ROW)
            add = kernels.mix
        add(noise.distribution, dtype, out_dtype, rows, np.zeros(1, np.int64), 1)
        return int(rows["unchanged"][0]), int(rows["clamped"][0])

    def noise_rows(
        self,
        addresses: NDArray[np.int64],
        counts: NDArray[np.int64],
        dtype: str,
        *,
        distribution: str,
        streams: NDArray[np.uint64],
        firsts: NDArray[np.int64],
        amplitudes: NDArray[np.float32],
        keeps: object,
    ) -> Rows:
        """Return the calls that add noise to tiles of host memory where they lie.

        All are [n], but for `streams`, [n, 4]; `keeps` holds that memory. The results are the rows' fields
        `unchanged` and `clamped`.
        """
        rows = np.zeros(len(addresses), library.NOISE_ROW)
        rows["x"] = rows["y"] = addresses
        rows["n"], rows["first"], rows["stream"], rows["amplitude"] = counts, firsts, streams, amplitudes
        return Rows(partial(library.load().noise, distribution, dtype, dtype), rows, keeps)

    def convert(self, tile: memoryview, out: memoryview, dtype: str, out_dtype: str) -> int:
        """Write the tile in another dtype to `out`; return how many finite values overflowed."""
        count = _count(tile, out, dtype, out_dtype)
        return library.load().convert(dtype, out_dtype, _address(tile), _address(out), count)

    def summarize(self, tile: memoryview, dtype: str) -> Summary:
        """Return the statistics of a tile that moments do not hold."""
        return Summary(*library.load().summary(dtype, _address(tile), len(tile) // FLOAT_DTYPES[dtype]))


def open_device(name: str) -> Device:
    """Return the CPU device; UsageError where the name is not just `cpu`."""
    if name != "cpu":
        raise unknown_device(name)
    return Cpu()


def _moments_rows(addresses: Any, counts: Any, length: int) -> NDArray[Any]:
    rows = np.zeros(length, library.MOMENTS_ROW)
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
