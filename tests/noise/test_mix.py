"""Noise of several seeds, negative amplitudes and shrunk values: the reference against the formula by hand,
and every device against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from blake3 import blake3
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


#: Of the bytes that the formula makes of `oracle.ramp` from element 5 on: they never change.
GOLDEN = {
    ("sign", "uniform", "F32"): "5c8e3ace20936a8ca66c6f3adf148f11",
    ("sign", "uniform", "F64"): "01253b33128df0c91539eafc7c8a14f9",
    ("sign", "uniform", "BF16"): "474abdc38f22dbaf9cd7a92708904128",
    ("sign", "uniform", "F16"): "05a529aa0ee630524df61655b1e3b74e",
    ("sign", "gaussian", "F32"): "53405051732e96ec8edb35173441247f",
    ("sign", "gaussian", "F64"): "929edbae91e9954b6a8af5128fd4fa7d",
    ("sign", "gaussian", "BF16"): "a6d6bcac1b332d747ea6ee8948bd0992",
    ("sign", "gaussian", "F16"): "acc6ed85661c4f7a5f7fb20a869a0f74",
    ("shrink", "uniform", "F32"): "475d11cf1f143ee0edec8726f21e897c",
    ("shrink", "uniform", "F64"): "a6e04bcfc3d420bc549df3ab90e8a7c7",
    ("shrink", "uniform", "BF16"): "de858704eb89cf23394000038548b13e",
    ("shrink", "uniform", "F16"): "d01bd2db17706f85a986dda4224f9c1a",
    ("shrink", "gaussian", "F32"): "f61574efc302ebd6b49b6f9589b56f1e",
    ("shrink", "gaussian", "F64"): "6b05d62c83e3b027277b5e831c09aa79",
    ("shrink", "gaussian", "BF16"): "dee1511c52316ba084d89f03a5acf3a7",
    ("shrink", "gaussian", "F16"): "66f8de5d360f44e3d1d38d8e8c9e33b6",
    ("mix", "uniform", "F32"): "96bd61eebbecca8848a57ec48c5a70d7",
    ("mix", "uniform", "F64"): "4decec1fa0410ce288aaed07737a6e08",
    ("mix", "uniform", "BF16"): "70adac833d5a37bd2cd85a32ca4a1091",
    ("mix", "uniform", "F16"): "96d8145e48d5fcc1dbd7c0f879d02c6e",
    ("mix", "gaussian", "F32"): "3035a7871d124f98e10d46789e96157c",
    ("mix", "gaussian", "F64"): "5011e885e92700187174d8839729ca3b",
    ("mix", "gaussian", "BF16"): "ab3bca72e542f349d5deaa843ed48953",
    ("mix", "gaussian", "F16"): "9d23233b3f5d780eb19bd23d5a3db631",
    ("mix-shrink", "uniform", "F32"): "c4038871930037b7b10c07ab2d14af9f",
    ("mix-shrink", "uniform", "F64"): "59cb628a3781f6e763cc6fc4dfffaeb0",
    ("mix-shrink", "uniform", "BF16"): "7f4d5a7421dd9d72b5f81755fff33837",
    ("mix-shrink", "uniform", "F16"): "687e748757ba38adc2ce37643e795731",
    ("mix-shrink", "gaussian", "F32"): "c4c1564d0585954b8840708231ea412f",
    ("mix-shrink", "gaussian", "F64"): "61e3ff679697904d131f5e4e69cbefa0",
    ("mix-shrink", "gaussian", "BF16"): "564d3ac7febe062baa72ffdf0a10efad",
    ("mix-shrink", "gaussian", "F16"): "b0ab1cb3b317bd534ad22f3b494c4088",
    ("shrink-only", "uniform", "F32"): "28fe900d87d3b7ef048c4a5d2744beec",
    ("shrink-only", "uniform", "F64"): "1985f2da36bc99ea601d5ee6eefd3f4e",
    ("shrink-only", "uniform", "BF16"): "b07cff0dae34fab7e8a98c158e8d35ed",
    ("shrink-only", "uniform", "F16"): "4601be186870d931e168a71f751cd85f",
    ("shrink-only", "gaussian", "F32"): "28fe900d87d3b7ef048c4a5d2744beec",
    ("shrink-only", "gaussian", "F64"): "1985f2da36bc99ea601d5ee6eefd3f4e",
    ("shrink-only", "gaussian", "BF16"): "b07cff0dae34fab7e8a98c158e8d35ed",
    ("shrink-only", "gaussian", "F16"): "4601be186870d931e168a71f751cd85f",
}
CASES = {
    "sign": (TERMS[1:2], 1.0),
    "shrink": (TERMS[:1], 0.5),
    "mix": (TERMS, 1.0),
    "mix-shrink": (TERMS, 0.3),
    "shrink-only": ((), 0.7),
}


@pytest.mark.parametrize(("case", "distribution", "dtype"), GOLDEN)
def test_golden_digests(case: str, distribution: str, dtype: str) -> None:
    stored, noise = oracle.ramp(dtype), noise_of(distribution, *CASES[case])
    out = bytearray(stored.nbytes)
    devices.open_device("cpu").add_noise(oracle.tile(stored), memoryview(out), dtype, noise=noise, first=5)
    assert blake3(out).hexdigest()[:32] == GOLDEN[case, distribution, dtype]
