"""The kernels in NumPy, bit for bit those of `kernels.c`: for where that cannot be loaded, and for tests.

The functions have the same names and take the same arguments (`library.Kernels`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.noise import stream
from noisytune_cli.noise.devices.cpu.rows import TERM
from noisytune_cli.noise.std import BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Values at a time, which bounds the memory for their words and coefficients; a multiple of BLOCK.
_AT_A_TIME = 1 << 16

#: The lanes that values are added up in.
_LANES = 16

_taking = threading.Lock()


def noise(
    distribution: str,
    dtype: str,
    out_dtype: str,
    rows: NDArray[Any],
    following: NDArray[np.int64],
    most: int,
) -> None:
    """Add noise to rows."""
    for row in _taken(rows, following, most):
        words = tuple(row["stream"].tolist())
        _add(row, dtype, out_dtype, stream.Noise.of(distribution, words, float(row["amplitude"])))


def mix(
    distribution: str,
    dtype: str,
    out_dtype: str,
    rows: NDArray[Any],
    following: NDArray[np.int64],
    most: int,
) -> None:
    """Add mixtures to rows."""
    for row in _taken(rows, following, most):
        memory = (ctypes.c_char * (int(row["count"]) * TERM.itemsize)).from_address(int(row["terms"]))
        terms = tuple([(tuple(w.tolist()), float(a)) for w, a in np.frombuffer(memoryview(memory), TERM)])
        _add(row, dtype, out_dtype, stream.Noise(distribution, terms, float(row["kept"])))


def _add(row: Any, dtype: str, out_dtype: str, noise: stream.Noise) -> None:
    """Add noise to a row, and count."""
    x, y = _values(int(row["x"]), int(row["n"]), dtype), _values(int(row["y"]), int(row["n"]), out_dtype)
    row["unchanged"] = row["clamped"] = 0
    for at in range(0, len(x), _AT_A_TIME):
        tile = x[at : at + _AT_A_TIME]
        noised, unchanged, clamped = stream.mix(tile, dtype, noise, int(row["first"]) + at, out_dtype)
        y[at : at + len(tile)] = noised.view(y.dtype)
        row["unchanged"] += unchanged
        row["clamped"] += clamped


def moments(dtype: str, rows: NDArray[Any], following: NDArray[np.int64], most: int) -> None:
    """Measure rows."""
    for row in _taken(rows, following, most):
        x = _values(int(row["x"]), int(row["n"]), dtype)
        with np.errstate(all="ignore"):
            ((total, squares),) = _run_sums(x[:64], dtype, 0.0) or [(0.0, 0.0)]
            begun = min(64, len(x))
            row["pivot"] = total / begun if 2 * total * total > begun * squares else 0.0
            s1 = s2 = low1 = low2 = 0.0
            finite = True
            for at in range(0, len(x), _AT_A_TIME):
                tile = x[at : at + _AT_A_TIME]
                for first, second in _run_sums(tile, dtype, float(row["pivot"])):
                    s1, low1 = _compensated(s1, first, low1)
                    s2, low2 = _compensated(s2, second, low2)
                finite = finite and bool(np.isfinite(stream.upcast(tile, dtype)).all())
        row["s1"], row["low1"], row["s2"], row["low2"], row["finite"] = s1, low1, s2, low2, finite


def exact(dtype: str, x: int, n: int, sums: NDArray[np.int64]) -> None:
    """Add n values to exact sums."""
    values = _values(x, n, dtype)
    for at in range(0, n, _AT_A_TIME):
        bits = stream.upcast(values[at : at + _AT_A_TIME], dtype).astype(np.float64).view(np.int64)
        power, m = (bits >> 52) & 0x7FF, bits & ((1 << 52) - 1)
        m = np.where(power > 0, m | (1 << 52), m)
        power = np.maximum(power, 1)
        h, low, sign = m >> 27, m & ((1 << 27) - 1), np.where(bits < 0, -1, 1)
        columns = [sign * h, sign * low]
        for product in (h * h, h * low, low * low):
            columns += [product >> 27, product & ((1 << 27) - 1)]
        for j, column in enumerate(columns):
            np.add.at(sums[:, j], power, column)


def summary(dtype: str, x: int, n: int) -> tuple[float, float, float, int, int, int]:
    """Return (min, max, Σ|x|, zeros, NaNs, infinities) of n values."""
    values = _values(x, n, dtype)
    least, most, total, low = np.inf, -np.inf, 0.0, 0.0
    zeros = nans = infinities = 0
    with np.errstate(all="ignore"):
        for at in range(0, n, _AT_A_TIME):
            wide = stream.upcast(values[at : at + _AT_A_TIME], dtype).astype(np.float64)
            least = min(least, float(np.fmin.reduce(wide)))
            most = max(most, float(np.fmax.reduce(wide)))
            zeros += int(np.count_nonzero(wide == 0))
            nans += int(np.count_nonzero(np.isnan(wide)))
            infinities += int(np.count_nonzero(np.isinf(wide)))
            for absolute, _ in _run_sums(np.abs(wide), "F64", 0.0):
                total, low = _compensated(total, absolute, low)
    absolute_sum = total + low if np.isfinite(total) else total
    return least + 0.0, most + 0.0, absolute_sum, zeros, nans, infinities


def change(dtype: str, other: str, x: int, y: int, n: int) -> tuple[list[float], float, int]:
    """Return the sums over n pairs of values, the largest |y - x|, and how many are equal."""
    ours, theirs = _values(x, n, dtype), _values(y, n, other)
    sums, largest, equal = [0.0] * 10, 0.0, 0
    with np.errstate(all="ignore"):
        for at in range(0, n, _AT_A_TIME):
            a = stream.upcast(ours[at : at + _AT_A_TIME], dtype).astype(np.float64)
            b = stream.upcast(theirs[at : at + _AT_A_TIME], other).astype(np.float64)
            d = b - a
            q = d * d
            terms = [np.abs(a), np.abs(b), np.abs(d), a, d, a * a, b * b, q, q * q, a * b]
            for k, term in enumerate(terms):
                for run in _folded(_in_lanes(term)):
                    sums[k] += run
            largest = max(largest, float(np.abs(d).max()))
            equal += int(np.count_nonzero(d == 0.0))
    return sums, largest, equal


def convert(dtype: str, out_dtype: str, x: int, y: int, n: int) -> int:
    """Write n values in another dtype; return how many overflowed."""
    values, out = _values(x, n, dtype), _values(y, n, out_dtype)
    overflowed = 0
    for at in range(0, n, _AT_A_TIME):
        converted, lost = stream.convert(values[at : at + _AT_A_TIME], dtype, out_dtype)
        out[at : at + _AT_A_TIME] = converted.view(out.dtype)
        overflowed += lost
    return overflowed


def _taken(rows: NDArray[Any], following: NDArray[np.int64], most: int) -> Iterator[Any]:
    """Take up to `most` rows that no other thread has."""
    for _ in range(most):
        with _taking:
            at = int(following[0])
            following[0] += 1
        if at >= len(rows):
            return
        yield rows[at]


def _values(address: int, n: int, dtype: str) -> NDArray[Any]:
    """Return the n values that lie at an address."""
    if n == 0:
        return np.empty(0, stream.STORED[dtype])
    memory: Any = (ctypes.c_char * (n * FLOAT_DTYPES[dtype])).from_address(address)
    values: NDArray[Any] = np.frombuffer(memory, stream.STORED[dtype])
    return values


def _run_sums(x: NDArray[Any], dtype: str, pivot: float) -> list[tuple[float, float]]:
    """Return Σd and Σd², d = x - pivot, for each run of BLOCK values, in the order of kernels.c."""
    lanes = _in_lanes(stream.upcast(x, dtype).astype(np.float64) - pivot)
    return list(zip(_folded(lanes), _folded(lanes * lanes), strict=True))


def _in_lanes(d: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values as [runs, values of a lane, lanes], with zeros after the last."""
    padded = np.zeros(-(-len(d) // BLOCK) * BLOCK)
    padded[: len(d)] = d
    return padded.reshape(-1, BLOCK // _LANES, _LANES)


def _folded(lanes: NDArray[np.float64]) -> list[float]:
    """Return the sum of each run: down its lanes first, then across them."""
    sums = np.add.reduce(lanes, axis=1, initial=0.0)
    eight = sums[:, :8] + sums[:, 8:]
    four = eight[:, :4] + eight[:, 4:]
    folded: list[float] = ((four[:, 0] + four[:, 2]) + (four[:, 1] + four[:, 3])).tolist()
    return folded


def _compensated(a: float, b: float, low: float) -> tuple[float, float]:
    """Return a + b, and its rounding error added to `low`."""
    total = a + b
    part = total - a
    return total, low + ((a - (total - part)) + (b - part))
