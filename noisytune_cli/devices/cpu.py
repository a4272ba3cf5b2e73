"""The CPU: loops compiled by Numba over the stored bytes.

Each loop is compiled, or taken from the cache, the first time that a dtype (and distribution) needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli import distributions
from noisytune_cli.compiled import Loop, compile_loop
from noisytune_cli.devices import Device, Summary, unknown_device
from noisytune_cli.moments import Moments
from noisytune_cli.records import FLOAT_DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from noisytune_cli.stream import StreamWords
    from noisytune_cli.tables import Table

#: Values that a noise loop works on at a time: so few that its scratch fits the L1 cache, and a multiple of
#: what registers hold (`philox_vectors.WORDS`).
NOISE_BLOCK = 1152


class Cpu:
    """The CPU device; all its state is scratch space, one for each thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def moments(self, tile: memoryview, dtype: str) -> Moments:
        """Return the float64 sums of a tile about the mean of its first values, or about zero."""
        out = np.empty(6)
        count = len(tile) // FLOAT_DTYPES[dtype]
        _loop("moments", dtype)(_address(tile), count, out.ctypes.data)
        return _moments(out.tolist(), count, dtype)

    def moments_table(
        self, addresses: NDArray[np.int64], counts: NDArray[np.int64], dtype: str, *, keeps: object
    ) -> tuple[Table, Callable[[], list[Moments]]]:
        """Return the calls that measure tiles of host memory, [n], and what then returns their moments.

        `keeps` holds that memory.
        """
        from noisytune_cli.tables import Table

        out = np.empty((len(addresses), 6))
        table = Table(_loop("moments", dtype), (addresses, counts, _row_addresses(out)), out, keeps=keeps)

        def moments() -> list[Moments]:
            return [_moments(row, n, dtype) for row, n in zip(out.tolist(), counts.tolist(), strict=True)]

        return table, moments

    def add_exact_sums(self, tile: memoryview, dtype: str, sums: NDArray[np.int64]) -> None:
        """Add a tile's values to exact sums."""
        _loop("exact", dtype)(_address(tile), len(tile) // FLOAT_DTYPES[dtype], sums.ctypes.data)

    def add_noise(
        self,
        tile: memoryview,
        out: memoryview,
        dtype: str,
        out_dtype: str | None = None,
        *,
        distribution: str,
        stream: StreamWords,
        first: int,
        amplitude: float,
    ) -> tuple[int, int]:
        """Write tile + noise to `out`, apart from the tile or, in the tile's dtype, the tile itself."""
        count = _count(tile, out, dtype, out_dtype or dtype)
        counts = np.empty(2, np.int64)
        _noise_loop(distribution, dtype, out_dtype or dtype)(
            _address(tile),
            _address(out),
            count,
            first,
            *stream,
            amplitude,
            *self._scratch(),
            counts.ctypes.data,
        )
        unchanged, clamped = counts.tolist()
        return unchanged, clamped

    def noise_table(
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
    ) -> Table:
        """Return the calls that add noise to tiles of host memory where they lie.

        All are [n], but for `streams`, [n, 4]; `keeps` holds that memory. The results are i64 [n, 2], the
        (unchanged, clamped) of each.
        """
        from noisytune_cli.tables import Table

        found = np.zeros((len(addresses), 2), np.int64)
        words = streams.view(np.int64).T
        bits = amplitudes.view(np.uint32).astype(np.int64)
        scratch = (None, None, None)
        columns = (addresses, addresses, counts, firsts, *words, bits, *scratch, _row_addresses(found))
        return Table(_noise_loop(distribution, dtype, dtype), columns, found, self._scratch, keeps)

    def convert(self, tile: memoryview, out: memoryview, dtype: str, out_dtype: str) -> int:
        """Write the tile in another dtype to `out`; return how many finite values overflowed."""
        overflowed = np.empty(1, np.int64)
        count = _count(tile, out, dtype, out_dtype)
        _convert_loop(dtype, out_dtype)(_address(tile), _address(out), count, overflowed.ctypes.data)
        return int(overflowed[0])

    def summarize(self, tile: memoryview, dtype: str) -> Summary:
        """Return the statistics of a tile that moments do not hold."""
        out = np.empty(6)
        _loop("summary", dtype)(_address(tile), len(tile) // FLOAT_DTYPES[dtype], out.ctypes.data)
        low, high, absolute, zeros, nans, infinities = out.tolist()
        return Summary(low, high, absolute, int(zeros), int(nans), int(infinities))

    def _scratch(self) -> list[int]:
        """Return the addresses of this thread's room for words, coefficients and held values."""
        if not hasattr(self._local, "scratch"):
            types = (np.uint32, np.float32, np.float64)
            self._local.scratch = [np.zeros(NOISE_BLOCK, dtype) for dtype in types]
        return [array.ctypes.data for array in self._local.scratch]


def open_device(name: str) -> Device:
    """Return the CPU device; UsageError where the name is not just `cpu`."""
    if name != "cpu":
        raise unknown_device(name)
    return Cpu()


def _moments(row: list[float], count: int, dtype: str) -> Moments:
    """Return what a loop says of `count` values."""
    pivot, s1, low1, s2, low2, finite = row
    return Moments(count, pivot, (s1, low1), (s2, low2), bool(finite), dtype == "F64")


def _row_addresses(array: NDArray[Any]) -> NDArray[np.int64]:
    """Return the addresses of an array's rows."""
    return array.ctypes.data + np.arange(len(array)) * array.strides[0]


def _address(tile: memoryview) -> int:
    return int(np.frombuffer(tile, np.uint8).ctypes.data)


def _count(tile: memoryview, out: memoryview, dtype: str, out_dtype: str) -> int:
    """Return the elements of a tile, which `out` must have room for."""
    count = len(tile) // FLOAT_DTYPES[dtype]
    if out.readonly or len(out) != count * FLOAT_DTYPES[out_dtype]:  # the loop would write past it
        raise ValueError("out must be writable and have room for just the tile")
    return count


def _loop(kind: str, dtype: str) -> Loop:
    """Return a compiled loop that reads only."""

    def make() -> Callable[..., None]:
        from noisytune_cli import sums

        build = {"moments": sums.moments_loop, "exact": sums.exact_loop, "summary": sums.summary_loop}[kind]
        return build(dtype)

    return compile_loop(f"{kind}/{dtype}", "pip", make)


def _noise_loop(distribution: str, dtype: str, out_dtype: str) -> Loop:
    """Return the compiled noise loop of a distribution for a pair of dtypes."""

    def make() -> Callable[..., None]:
        from noisytune_cli import kernels

        return kernels.noise_loop(distributions.load(distribution), dtype, out_dtype, NOISE_BLOCK)

    return compile_loop(f"noise/{distribution}/{_pair(dtype, out_dtype)}", "ppiuuuuufpppp", make)


def _convert_loop(dtype: str, out_dtype: str) -> Loop:
    """Return the compiled loop that converts."""

    def make() -> Callable[..., None]:
        from noisytune_cli import kernels

        return kernels.convert_loop(dtype, out_dtype)

    return compile_loop(f"convert/{_pair(dtype, out_dtype)}", "ppip", make)


def _pair(dtype: str, out_dtype: str) -> str:
    return dtype if dtype == out_dtype else f"{dtype}/{out_dtype}"
