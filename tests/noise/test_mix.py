"""Noise of several seeds, negative amplitudes and shrunk values: the reference against the formula by hand,
and every device against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from levels import LEVELS, cpu_at
from numpy.typing import NDArray

from noisytune_cli.noise import devices, distributions, stream

DTYPES = ("F32", "F64", "BF16", "F16")
DISTRIBUTIONS = distributions.names()
NAME = "layer.weight"
TERMS = ((17, 0.001), (2**64 - 1, -0.25), (3, 0.0078125), (0, 1.5))


def noise_of(distribution: str, terms: Any, kept: float = 1.0) -> stream.Noise:
    words = tuple((stream.stream_words(seed, NAME), float(np.float32(a))) for seed, a in terms)
    return stream.Noise(distribution, words, kept)


def by_hand(
    stored: NDArray[np.generic], dtype: str, distribution: str, terms: Any, kept: float, first: int
) -> NDArray[Any]:
    """The formula, one rounding for each operation, in the type that x is widened to."""
    wide: Any = np.float64 if dtype == "F64" else np.float32
    y = stream.upcast(stored, dtype)
    if kept != 1.0:
        y = wide(kept) * y
    total = None
    for seed, amplitude in terms:
        c = stream.coefficients(distribution, seed, NAME, first, stored.size).astype(wide)
        term = c * wide(np.float32(amplitude))
        total = term if total is None else (total + term).astype(wide)
    return y if total is None else (y + total).astype(wide)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.3, 0.0])
@pytest.mark.parametrize("terms", [TERMS, TERMS[:1], TERMS[1:2], ()], ids=["four", "one", "negative", "none"])
def test_the_reference_is_the_formula(distribution: str, dtype: str, kept: float, terms: Any) -> None:
    stored = oracle.weights(np.random.default_rng(5), 1003, dtype)
    expected = by_hand(stored, dtype, distribution, terms, kept, 7)
    out, unchanged, clamped = stream.mix(stored, dtype, noise_of(distribution, terms, kept), 7)
    assert out.tobytes() == expected.tobytes()
    assert clamped == 0
    plain = by_hand(stored, dtype, distribution, (), kept, 7)
    assert unchanged == np.count_nonzero((expected == plain) & (np.signbit(expected) == np.signbit(plain)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_term_is_the_single_noise(distribution: str, dtype: str) -> None:
    stored = oracle.weights(np.random.default_rng(5), 999, dtype)
    c = stream.coefficients(distribution, 17, NAME, 3, stored.size)
    expected, *counts = stream.add_noise(stored, dtype, c, np.float32(0.001))
    out, *got = stream.mix(stored, dtype, noise_of(distribution, TERMS[:1]), 3)
    assert (out.tobytes(), got) == (expected.tobytes(), counts)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_every_level_has_the_bits_of_the_reference(
    level: str, distribution: str, dtype: str, out_dtype: str
) -> None:
    with cpu_at(level) as cpu:
        for terms, kept in ((TERMS, 1.0), (TERMS, 0.7), (TERMS[:1], 0.5), ((), 0.9)):
            for first, count in ((0, 4096), (5, 1), (2**40 + 3, 777), (1, 130)):
                check(cpu, dtype, out_dtype, noise_of(distribution, terms, kept), first, count)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_torch_has_the_bits_of_the_reference(distribution: str, dtype: str, out_dtype: str) -> None:
    device = devices.open_device("torch:cpu")
    for terms, kept in ((TERMS, 1.0), (TERMS, 0.7), ((), 0.9)):
        check(device, dtype, out_dtype, noise_of(distribution, terms, kept), 6, 1001)


def check(device: Any, dtype: str, out_dtype: str, noise: stream.Noise, first: int, count: int) -> None:
    stored = oracle.weights(np.random.default_rng(count), count, dtype)
    if dtype != "F64" and out_dtype != "F64":
        # Some that overflow: the largest values of the dtype.
        stored[: count // 7] = stored.dtype.type(
            {"F32": np.finfo(np.float32).max, "BF16": 0x7F7F, "F16": 65504.0}[dtype]
        )
    expected, *counts = stream.mix(stored, dtype, noise, first, out_dtype)
    out = bytearray(expected.nbytes)
    got = device.add_noise(oracle.tile(stored), memoryview(out), dtype, out_dtype, noise=noise, first=first)
    assert (bytes(out), list(got)) == (expected.tobytes(), counts)


def test_a_mixture_in_place() -> None:
    device = devices.open_device("cpu")
    stored = oracle.weights(np.random.default_rng(1), 5003, "BF16")
    expected, *counts = stream.mix(stored, "BF16", noise_of("gaussian", TERMS, 0.5), 2)
    held = bytearray(stored.tobytes())
    got = device.add_noise(
        memoryview(held), memoryview(held), "BF16", noise=noise_of("gaussian", TERMS, 0.5), first=2
    )
    assert (bytes(held), list(got)) == (expected.tobytes(), counts)
