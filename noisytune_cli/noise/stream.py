"""Noise stream v1 in readable NumPy: the reference that every kernel is tested against.

Noise is a pure function of (seed, stream name, element index). There is no generator state: element `e`
takes word `e mod 4` of one Philox4x32-10 block whose counter is `e // 4` and whose key is the seed, so any
tensor, tile or single element can be computed alone, anywhere, in any order.

    sid        = BLAKE2b(utf8(name), digest_size=8) as a little-endian u64
    key        = (seed mod 2^32, seed >> 32)
    counter(i) = (i mod 2^32, i >> 32, sid mod 2^32, sid >> 32)
    word(e)    = Philox4x32-10(counter(e // 4), key)[e mod 4]

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The constants
below are that paper's. This stream is a contract with saved manifests: it never changes, only gains a v2.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from noisytune_cli.dtypes import LARGEST
from noisytune_cli.noise import distributions

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The stream's name in manifests.
STREAM = "philox4x32-10/v1"

#: NumPy's dtype for the stored values of each dtype; those of BF16 are its bits.
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

#: Key words 0 and 1 and counter words 2 and 3 of a stream.
StreamWords = tuple[int, int, int, int]


class Noise(NamedTuple):
    """What is done to a matrix: kept · x + Σ c_k · a_k, c_k the coefficients of a distribution.

    `terms` are (stream, amplitude) in the order that they are added up; an amplitude is a float32 value held
    in a Python float, and may be negative. Without terms the matrix is only shrunk.
    """

    distribution: str
    terms: tuple[tuple[StreamWords, float], ...]
    kept: float = 1.0

    @classmethod
    def of(cls, distribution: str, stream: StreamWords, amplitude: float) -> Noise:
        """Return the noise of one stream."""
        return cls(distribution, ((stream, amplitude),))

    @property
    def is_single(self) -> bool:
        """Whether it is the noise of one stream, and nothing else."""
        return len(self.terms) == 1 and self.kept == 1.0


#: Round multipliers and Weyl key increments of Philox4x32.
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF


def stream_id(name: str) -> int:
    """Return the u64 that stands for a stream name (UTF-8, no normalisation)."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


def stream_words(seed: int, name: str) -> StreamWords:
    """Return (key word 0, key word 1, counter word 2, counter word 3): all a kernel needs of a stream."""
    sid = stream_id(name)
    return *key_words(seed), sid & MASK, sid >> 32


def key_words(seed: int) -> tuple[int, int]:
    """Return the words of a seed's key, with which those of its streams begin."""
    return seed & MASK, seed >> 32


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return the Philox4x32-10 blocks of counters: [n, 4] words held in u64 -> [n, 4] u32 words."""
    mask = np.uint64(MASK)
    high = np.uint64(32)
    c0, c1, c2, c3 = (counter[:, j].copy() for j in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = np.uint64(M0) * c0, np.uint64(M1) * c2
        c0, c1 = (p1 >> high) ^ c1 ^ np.uint64(k0), p1 & mask
        c2, c3 = (p0 >> high) ^ c3 ^ np.uint64(k1), p0 & mask
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def words(seed: int, name: str, start: int, count: int) -> NDArray[np.uint32]:
    """Return words `start` … `start + count - 1` of a stream, as [count] u32."""
    return _words(stream_words(seed, name), start, count)


def _words(stream: StreamWords, start: int, count: int) -> NDArray[np.uint32]:
    k0, k1, s0, s1 = stream
    first, last = start // 4, (start + count + 3) // 4
    i = np.arange(last - first, dtype=np.uint64) + np.uint64(first)
    counter = np.empty((last - first, 4), dtype=np.uint64)
    counter[:, 0], counter[:, 1] = i & np.uint64(MASK), i >> np.uint64(32)
    counter[:, 2], counter[:, 3] = s0, s1
    return philox4x32(counter, (k0, k1)).ravel()[start - 4 * first :][:count]


def coefficients(distribution: str, seed: int, name: str, start: int, count: int) -> NDArray[np.float32]:
    """Return the noise of unit amplitude for elements `start` … `start + count - 1`, as [count] float32."""
    return draw(distribution, stream_words(seed, name), start, count)


def draw(distribution: str, stream: StreamWords, start: int, count: int) -> NDArray[np.float32]:
    """Return `coefficients` of the stream with these words."""
    first, last = start // 4 * 4, (start + count + 3) // 4 * 4
    drawn = distributions.load(distribution).coefficients(_words(stream, first, last - first))
    return drawn[start - first :][:count]


def upcast(stored: NDArray[np.generic], dtype: str) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return stored values as float32 (float64 for F64); BF16 is stored as u16, the others as themselves."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F64":
        return stored.astype(np.float64)
    return stored.astype(np.float32)


def values(data: memoryview, dtype: str) -> NDArray[np.float64]:
    """Return the values of stored bytes."""
    with np.errstate(invalid="ignore"):  # a NaN that signals is a NaN too
        return upcast(np.frombuffer(data, STORED[dtype]), dtype).astype(np.float64)


def add_noise(
    stored: NDArray[np.generic],
    dtype: str,
    coefficient: NDArray[np.float32],
    amplitude: np.float32,
    out_dtype: str | None = None,
) -> tuple[NDArray[np.generic], int, int]:
    """Return (noised stored values, elements left unchanged, elements clamped); stored values are finite.

    The sum is two roundings in float32 (float64 for F64), then one nearest-even to `out_dtype` (None: that of
    the stored values). A result past its largest finite value is clamped to it, or to that of float32 where
    the sum was computed in float32. An element that is what `convert` gives is unchanged.
    """
    return _add(stored, dtype, _scaled(coefficient, dtype, float(amplitude)), out_dtype or dtype)


def mix(
    stored: NDArray[np.generic], dtype: str, noise: Noise, first: int, out_dtype: str | None = None
) -> tuple[NDArray[np.generic], int, int]:
    """Return what `add_noise` does, of values from element `first` on with any noise.

    With x in float32 (in float64 where the values are F64) and one rounding for each operation:
    t_k = c_k · a_k, acc = ((t_1 + t_2) + …), y = kept · x + acc. An element is unchanged that kept · x would
    be too.
    """
    total = None
    for words, amplitude in noise.terms:
        drawn = draw(noise.distribution, words, first, len(stored))
        term = _scaled(drawn, dtype, amplitude)
        total = term if total is None else total + term
    return _add(stored, dtype, total, out_dtype or dtype, noise.kept)


def _scaled(
    coefficient: NDArray[np.float32], dtype: str, amplitude: float
) -> NDArray[np.float32] | NDArray[np.float64]:
    with np.errstate(over="ignore"):  # an overflow is what the clamp is for
        if dtype == "F64":
            return coefficient.astype(np.float64) * np.float64(amplitude)
        return coefficient * np.float32(amplitude)


def _add(
    stored: NDArray[np.generic],
    dtype: str,
    total: NDArray[np.float32] | NDArray[np.float64] | None,
    out_dtype: str,
    kept: float = 1.0,
) -> tuple[NDArray[np.generic], int, int]:
    with np.errstate(over="ignore", under="ignore"):
        x = upcast(stored, dtype)
        if kept != 1.0:
            x = x * x.dtype.type(kept)
        y = x if total is None else x + total
        rounded = _round_to(y, out_dtype)
        largest = np.asarray(min(LARGEST[out_dtype], float(np.finfo(y.dtype).max)), dtype=y.dtype)
        clamped = ~np.isfinite(upcast(rounded, out_dtype))
        rounded = np.where(clamped, _round_to(np.copysign(largest, y), out_dtype), rounded)
        plain = stored if out_dtype == dtype and kept == 1.0 else _round_to(x, out_dtype)
    bits = np.dtype(f"u{rounded.dtype.itemsize}")
    unchanged = int(np.count_nonzero(rounded.view(bits) == plain.view(bits)))
    return rounded, unchanged, int(np.count_nonzero(clamped))


def convert(stored: NDArray[np.generic], dtype: str, out_dtype: str) -> tuple[NDArray[np.generic], int]:
    """Return (stored values in another dtype, how many finite ones overflowed to infinity).

    One rounding, nearest-even; infinities stay, and every NaN becomes the target's quiet NaN without a sign.
    """
    x = upcast(stored, dtype)
    with np.errstate(over="ignore"):
        rounded = _round_to(np.where(np.isnan(x), np.asarray(0, x.dtype), x), out_dtype)
    overflowed = np.isfinite(x) & np.isinf(upcast(rounded, out_dtype))
    # NumPy's own NaN is the quiet one, and BF16's is its upper half.
    nan = np.asarray(0x7FC0, np.uint16) if out_dtype == "BF16" else np.asarray(np.nan, rounded.dtype)
    return np.where(np.isnan(x), nan, rounded), int(np.count_nonzero(overflowed))


def _round_to(y: NDArray[np.float32] | NDArray[np.float64], dtype: str) -> NDArray[np.generic]:
    """Round float32 (float64) values once to a stored dtype, nearest-even, overflowing to infinity."""
    if dtype == "BF16":
        bits = _round_to_odd(y).view(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        return ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return y.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype], copy=False)


def _round_to_odd(y: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float32]:
    """Cut float64 off to float32, and set the last bit where something was lost (float32 stays as it is).

    That bit keeps what a second rounding, to a much shorter dtype, has to know: so the two are one rounding.
    """
    nearest = y.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32) - (np.abs(back) > np.abs(y)).astype(np.uint32)
    odd: NDArray[np.float32] = (bits | (back != y).astype(np.uint32)).view(np.float32)
    return odd
