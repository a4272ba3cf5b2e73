"""Every device, every pair of dtypes: one rounding to the target, the bits of exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import oracle
import pytest

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.noise import stream
from noisytune_cli.noise.devices import Device

PAIRS = [pair for pair in itertools.product(sorted(FLOAT_DTYPES), repeat=2) if pair[0] != pair[1]]
NARROWING = [
    (dtype, out_dtype) for dtype, out_dtype in PAIRS if oracle.LARGEST[dtype] > oracle.LARGEST[out_dtype]
]

pairs = pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=lambda dtype: dtype)


def hard_values(dtype: str, out_dtype: str) -> np.ndarray:
    """Return values of `dtype` at and beside the midpoints of `out_dtype`, at its ends, and of any size.

    A step beside a midpoint may be a float64's last bit, which is lost on the way through float32.
    """
    rng = np.random.default_rng(7)
    stored, bits, infinite = oracle.STORED[out_dtype]
    lows = np.concatenate(
        [np.arange(6, dtype=bits), rng.integers(0, infinite - 2, 400, dtype=bits), [bits.type(infinite - 2)]]
    ).astype(bits)
    exact = [Fraction(v) for v in oracle.values(lows.view(stored), out_dtype)]
    above = [Fraction(v) for v in oracle.values((lows + bits.type(1)).view(stored), out_dtype)]
    largest = oracle.LARGEST[out_dtype]
    ends = [largest, largest + (largest - exact[-1]) / 2]  # the last of them is where infinity begins
    points = [(low + high) / 2 for low, high in zip(exact, above, strict=True)] + ends
    fitting = [v for v in points if v <= oracle.LARGEST[dtype]]
    middle = oracle.encode([*fitting, *(-v for v in fitting)], dtype)
    own_stored, own_bits, _ = oracle.STORED[dtype]
    near = middle.view(own_bits)
    around = [near - own_bits.type(1), near, near + own_bits.type(1)]
    hard = np.concatenate([*around, oracle.any_finite(rng, 500, dtype).view(own_bits)])
    hard = hard[(hard & own_bits.type(oracle.STORED[dtype][2])) != own_bits.type(oracle.STORED[dtype][2])]
    return hard.view(own_stored)


def expected_conversion(values: np.ndarray, dtype: str, out_dtype: str) -> tuple[list[float], int]:
    """Return what exact arithmetic makes of stored values, and how many overflow."""
    rounded = [float(oracle.nearest(Fraction(v), out_dtype)) for v in oracle.values(values, dtype)]
    return rounded, sum(math.isinf(v) for v in rounded)


def convert(device: Device, values: np.ndarray, dtype: str, out_dtype: str) -> tuple[np.ndarray, int]:
    """Convert on a device; the bytes around the output must stay as they are."""
    nbytes = values.size * FLOAT_DTYPES[out_dtype]
    room = np.full(nbytes + 16, 0xA5, np.uint8)
    overflowed = device.convert(oracle.tile(values), memoryview(room)[8 : 8 + nbytes], dtype, out_dtype)
    assert set(room[:8].tolist() + room[8 + nbytes :].tolist()) == {0xA5}
    return room[8 : 8 + nbytes].copy().view(oracle.STORED[out_dtype][0]), overflowed


@pairs
def test_the_reference_rounds_once_to_the_nearest(dtype: str, out_dtype: str) -> None:
    values = hard_values(dtype, out_dtype)
    got, overflowed = stream.convert(values, dtype, out_dtype)
    expected, lost = expected_conversion(values, dtype, out_dtype)
    assert oracle.values(got, out_dtype) == expected
    assert overflowed == lost
    assert (lost > 0) == ((dtype, out_dtype) in NARROWING)


@pairs
def test_devices_convert_as_the_reference(device: Device, dtype: str, out_dtype: str) -> None:
    values = hard_values(dtype, out_dtype)
    expected, lost = stream.convert(values, dtype, out_dtype)
    got, overflowed = convert(device, values, dtype, out_dtype)
    assert got.tobytes() == expected.tobytes()
    assert overflowed == lost


@pairs
def test_nan_and_infinity_stay(device: Device, dtype: str, out_dtype: str) -> None:
    stored, bits, infinite = oracle.STORED[dtype]
    sign = 1 << (8 * bits.itemsize - 1)
    special = [
        infinite,
        infinite | sign,
        infinite + 1,
        infinite | sign | 1,
        infinite | (infinite >> 1),
        0,
        sign,
    ]
    got, overflowed = convert(device, np.array(special, bits).view(stored), dtype, out_dtype)
    _, out_bits, out_infinite = oracle.STORED[out_dtype]
    out_sign = 1 << (8 * out_bits.itemsize - 1)
    quiet = {"F64": 0x7FF8000000000000, "F32": 0x7FC00000, "BF16": 0x7FC0, "F16": 0x7E00}[out_dtype]
    assert got.view(out_bits).tolist() == [out_infinite, out_infinite | out_sign, *[quiet] * 3, 0, out_sign]
    assert overflowed == 0
    assert (
        got.tobytes() == stream.convert(np.array(special, bits).view(stored), dtype, out_dtype)[0].tobytes()
    )


@pairs
def test_the_reference_rounds_the_noisy_sum_once(dtype: str, out_dtype: str) -> None:
    values = hard_values(dtype, out_dtype)
    small = min(float(oracle.LARGEST["F16"]), 2.0**-10)
    for amplitude in (small, 2.0**-40, 300.0):
        c = stream.coefficients("uniform", 3, "w", 0, values.size)
        out, unchanged, clamped = stream.add_noise(values, dtype, c, np.float32(amplitude), out_dtype)
        exact = zip(oracle.values(values, dtype), c.tolist(), strict=True)
        expected = [float(oracle.noised(x, k, amplitude, dtype, out_dtype)) for x, k in exact]
        assert oracle.values(out, out_dtype) == expected
        plain = [float(oracle.nearest(Fraction(v), out_dtype)) for v in oracle.values(values, dtype)]
        signs = [math.copysign(1, v) for v in oracle.values(out, out_dtype)]
        stayed = sum(
            a == b and (a != 0 or s == math.copysign(1, v))
            for a, b, s, v in zip(expected, plain, signs, oracle.values(values, dtype), strict=True)
        )
        assert unchanged == stayed
        limit = float(min(oracle.LARGEST[out_dtype], oracle.LARGEST["F64" if dtype == "F64" else "F32"]))
        assert clamped <= sum(abs(v) == limit for v in expected)


# How a sum is rounded does not depend on what was drawn, so a few pairs do for the second distribution.
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "distribution"),
    [(*pair, "uniform") for pair in PAIRS]
    + [("F64", "BF16", "gaussian"), ("F32", "F16", "gaussian"), ("BF16", "F32", "gaussian")],
    ids=lambda text: text,
)
def test_devices_add_noise_as_the_reference(
    device: Device, dtype: str, out_dtype: str, distribution: str
) -> None:
    values = np.concatenate(
        [hard_values(dtype, out_dtype), oracle.weights(np.random.default_rng(1), 3001, dtype)]
    )
    for amplitude, first in ((0.003, 5), (2.0**-30, 2**34 - 9), (60000.0, 1), (2.0**127, 0)):
        c = stream.coefficients(distribution, 9, "w", first, values.size)
        expected, *counts = stream.add_noise(values, dtype, c, np.float32(amplitude), out_dtype)
        out = np.empty(values.size * FLOAT_DTYPES[out_dtype], np.uint8)
        got = device.add_noise(
            oracle.tile(values),
            memoryview(out),
            dtype,
            out_dtype,
            noise=stream.Noise.of(distribution, stream.stream_words(9, "w"), float(np.float32(amplitude))),
            first=first,
        )
        assert out.tobytes() == expected.tobytes()
        assert list(got) == counts
        assert np.isfinite(stream.upcast(out.view(oracle.STORED[out_dtype][0]), out_dtype)).all()


def test_a_sum_in_float32_stays_in_its_range_in_float64(device: Device) -> None:
    largest = np.full(64, np.finfo(np.float32).max)
    out = np.empty(64, np.float64)
    _, clamped = device.add_noise(
        oracle.tile(largest),
        oracle.tile(out),
        "F32",
        "F64",
        noise=stream.Noise.of("uniform", stream.stream_words(0, "w"), 2.0**126),
        first=0,
    )
    assert 10 < clamped < 60
    assert out.max() == float(np.finfo(np.float32).max)


@pytest.mark.parametrize("wrong", [31, 33])
def test_room_for_another_size_is_refused(device: Device, wrong: int) -> None:
    with pytest.raises(ValueError, match="room"):
        device.convert(memoryview(bytes(64)), memoryview(bytearray(wrong)), "F32", "BF16")
