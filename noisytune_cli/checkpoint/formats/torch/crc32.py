"""CRC-32 of whole records from ranges that come in any order, from any thread.

Each range is summed while it is in the cache; what no range covers is read at the end. Two sums are joined
as zlib's crc32_combine does: crc(AB) = crc(A) · x^(8·|B|) + crc(B) modulo the CRC's polynomial over GF(2).
"""

from __future__ import annotations

import bisect
import threading
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # reflected: the highest power of x is the lowest bit
_ONE, _X_TO_8 = 1 << 31, 1 << 23
_CHUNK = 1 << 20


class RangeSums:
    """The CRC-32 of ranges of one file; `fill(offset, length)` returns bytes that nobody has added."""

    def __init__(self, fill: Callable[[int, int], bytes | memoryview]) -> None:
        self._fill = fill
        self._ranges: dict[int, tuple[int, int]] = {}
        self._starts: list[int] | None = None  # sorted, until a range is added
        self._lock = threading.Lock()

    def has(self, start: int, length: int) -> bool:
        """Tell whether exactly this range was added."""
        known = self._ranges.get(start)
        return known is not None and known[0] == length

    def add(self, start: int, data: bytes | memoryview) -> None:
        """Note the bytes that lie at `start`; they replace a range that began there."""
        crc = zlib.crc32(data)
        with self._lock:
            self._ranges[start] = (len(data), crc)
            self._starts = None

    def touched(self, spans: Iterable[tuple[int, int]]) -> list[bool]:
        """Tell of each (start, end) whether a range begins in it."""
        starts = self._sorted()
        return [bisect.bisect_left(starts, a) < bisect.bisect_left(starts, b) for a, b in spans]

    def over(self, start: int, end: int) -> int:
        """Return the CRC-32 of the bytes from `start` to `end`, reading those not yet added."""
        starts = self._sorted()
        inside = starts[bisect.bisect_left(starts, start) : bisect.bisect_left(starts, end)]
        crc, place = 0, start
        for at in [*inside, end]:
            if at < place:
                continue
            while place < at:
                data = self._fill(place, min(at - place, _CHUNK))
                crc = zlib.crc32(data, crc)
                place += len(data)
            if at < end:
                length, other = self._ranges[at]
                if at + length <= end:
                    crc, place = combine(crc, other, length), at + length
        return crc

    def _sorted(self) -> list[int]:
        with self._lock:
            if self._starts is None:
                self._starts = sorted(self._ranges)
            return self._starts


def combine(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of AB from those of A and B, where B has `length` bytes."""
    return _multiply(_power(length), first) ^ second


@lru_cache(maxsize=256)
def _power(length: int) -> int:
    """Return x^(8·length) modulo the polynomial."""
    result, square = _ONE, _X_TO_8
    while length:
        if length & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        length >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    """Return the product of two polynomials over GF(2) modulo the CRC's."""
    product, bit = 0, _ONE
    while bit:
        if a & bit:
            product ^= b
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
        bit >>= 1
    return product
