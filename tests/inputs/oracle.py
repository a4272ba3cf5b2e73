"""Numbers by exact rational arithmetic: what stream.py, std.py and the kernels are checked against.

Shares no code with them. A float is a fraction; rounding is done on integers, from a dtype's precision, its
smallest step and its largest value. Slow, and meant to be obviously right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

#: dtype -> (bits of precision, exponent of the smallest positive value).
FORMATS = {"F64": (53, -1074), "F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}

#: dtype -> largest finite value.
LARGEST = {
    "F64": Fraction(2**53 - 1) * 2**971,
    "F32": Fraction(2**24 - 1) * 2**104,
    "F16": Fraction(65504),
    "BF16": Fraction(2**8 - 1) * 2**120,
}

#: dtype -> (NumPy's dtype for the stored values, for their bits, the bits of infinity).
STORED = {
    "F64": (np.dtype("<f8"), np.dtype("<u8"), 0x7FF0000000000000),
    "F32": (np.dtype("<f4"), np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<f2"), np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), np.dtype("<u2"), 0x7F80),
}


def nearest(value: Fraction, dtype: str) -> Fraction | float:
    """Return the number of a dtype nearest to a value, ties to even; ±inf past the largest."""
    precision, smallest = FORMATS[dtype]
    magnitude = abs(value)
    if magnitude == 0:
        return Fraction(0)
    # 2^exponent <= magnitude < 2^(exponent + 1)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    step = Fraction(2) ** max(exponent - precision + 1, smallest)
    rounded = round(magnitude / step) * step  # Fraction rounds ties to even
    if rounded > LARGEST[dtype]:
        return math.inf if value > 0 else -math.inf
    return rounded if value > 0 else -rounded


def noised(x: float, c: float, a: float, dtype: str, out_dtype: str | None = None) -> Fraction:
    """Return x + c · a as noise stream v1 rounds it to `out_dtype` (None: its own), clamped."""
    wide = "F64" if dtype == "F64" else "F32"
    out_dtype = out_dtype or dtype
    limit = min(LARGEST[wide], LARGEST[out_dtype])
    y: Fraction | float = Fraction(c) * Fraction(a)
    roundings = (
        lambda product: nearest(product, wide),
        lambda product: nearest(Fraction(x) + product, wide),
        lambda total: nearest(total, out_dtype),
    )
    for rounding in roundings:
        y = rounding(y)
        if isinstance(y, float):
            return limit if y > 0 else -limit
    assert isinstance(y, Fraction)
    return y


def std32(values: Iterable[float]) -> float:
    """Return the float32 nearest to the exact unbiased standard deviation."""
    exact = [v.as_integer_ratio() for v in values]
    unit = max(denominator for _, denominator in exact)
    whole = [numerator * (unit // denominator) for numerator, denominator in exact]
    n, total = len(whole), sum(whole)
    squares = sum(v * v for v in whole)
    # std = sqrt(numerator / denominator) / unit
    return sqrt32(Fraction(n * squares - total * total, n * (n - 1) * unit * unit))


def sqrt32(square: Fraction) -> float:
    """Return the float32 nearest to the square root of a fraction, ties to even."""
    # An integer root of over 100 bits, with a last bit for "and a little more", rounds as the root does.
    shift = max(0, 110 - (square.numerator.bit_length() - square.denominator.bit_length()) // 2)
    scaled = square * 4**shift
    root = math.isqrt(math.floor(scaled))
    inexact = Fraction(root * root) != scaled
    return float(nearest(Fraction(2 * root + inexact, 2 ** (shift + 1)), "F32"))


def values(stored: np.ndarray, dtype: str) -> list[float]:
    """Return stored values as Python floats, decoded from their bits."""
    if dtype != "BF16":
        return [float(v) for v in stored.tolist()]
    return [float(v) for v in (stored.astype(np.uint64) << np.uint64(16)).astype(np.uint32).view(np.float32)]


def encode(numbers: Iterable[float], dtype: str) -> np.ndarray:
    """Return the stored values nearest to finite numbers, which must not overflow."""
    out = np.array([float(nearest(Fraction(v), dtype)) for v in numbers])
    if dtype == "BF16":
        return (out.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return out.astype(STORED[dtype][0])


def any_finite(rng: np.random.Generator, count: int, dtype: str) -> np.ndarray:
    """Return stored values of all kinds: any finite bits, from zeros and denormals to the largest."""
    stored, bits, infinite = STORED[dtype]
    drawn = rng.integers(0, np.iinfo(bits).max, count, dtype=bits, endpoint=True)
    drawn[(drawn & bits.type(infinite)) == infinite] &= bits.type(infinite ^ np.iinfo(bits).max)
    special = np.array([0, infinite - 1, 1, infinite >> 1], dtype=bits)
    negative = special | bits.type(1 << (8 * bits.itemsize - 1))
    chosen = rng.random(count) < 0.1
    drawn[chosen] = rng.choice(np.concatenate([special, negative]), int(chosen.sum()))
    return drawn.view(stored)


def weights(
    rng: np.random.Generator, count: int, dtype: str, centre: float = 0.0, width: float = 0.02
) -> np.ndarray:
    """Return stored values like a weight matrix's."""
    drawn = rng.normal(centre, width, count)
    if dtype == "BF16":
        return (drawn.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return drawn.astype(STORED[dtype][0])


def tile(stored: np.ndarray) -> memoryview:
    """Return the bytes of stored values, as a device takes them."""
    return memoryview(np.ascontiguousarray(stored).view(np.uint8))


def ramp(dtype: str) -> np.ndarray:
    """Return the 5,000 stored values that the golden digests begin with: exact in every dtype."""
    spread = (np.arange(5000, dtype=np.int64) * 37) % 255 - 127
    return encode((spread * 2.0**-9).tolist(), dtype)
