"""Noise stream v1, the reference: published vectors, known answers, and rounding against exact arithmetic."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.noise import stream

DATA = Path(os.environ.get("NOISYTUNE_DATA") or Path(__file__).parents[3] / "shared" / "data")
VECTORS = DATA / "kat" / "philox4x32_10.txt"
DTYPES = sorted(FLOAT_DTYPES)

# Random123, kat_vectors.
CLASSIC = """
00000000 00000000 00000000 00000000 00000000 00000000   6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff   408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0   d16cfe09 94fdcceb 5001e420 24126ea1
"""

KNOWN = [
    (
        0,
        "w",
        "985868c7 addd6b23 dc73dde6 e5a64a01 46fed606 6335d7cc",
        [0.09509900212287903, 0.17915984988212585, 0.36114296317100525],
        [-0.43866566, -0.91957998, 0.43637553, -0.32949331],
    ),
    (
        42,
        "bert.encoder.layer.0.attention.self.query.weight",
        "924f7ca9 2a86fad8 399f10e0 6c9dd1c4 eefe6bf5 d78c5ebe",
        [0.07152536511421204, -0.33387789130210876, -0.2749166190624237],
        [0.53201979, 0.91424710, -1.53523135, 0.79096979],
    ),
    (
        2**64 - 1,
        "é",
        "f02fa432 cecaf827 e680a1eb a8c3fdf7 24cadc13 7f08664b",
        [0.43822696805000305, 0.3077845871448517, 0.4004002511501312],
        [0.12682612, -0.33382922, -0.24729091, -0.38558906],
    ),
]


def check_vectors(lines: list[str]) -> None:
    for line in lines:
        numbers = [int(field, 16) for field in line.split()]
        counter = np.array([numbers[:4]], dtype=np.uint64)
        assert stream.philox4x32(counter, (numbers[4], numbers[5])).tolist() == [numbers[6:]], line


def test_philox_classic_vectors() -> None:
    check_vectors(CLASSIC.strip().splitlines())


@pytest.mark.skipif(not VECTORS.is_file(), reason="needs the published vectors (NOISYTUNE_DATA)")
def test_philox_published_vectors() -> None:
    lines = VECTORS.read_text().splitlines()
    assert len(lines) >= 3
    check_vectors([line.removeprefix("philox4x32 10 ") for line in lines])


@pytest.mark.parametrize(("seed", "name", "words", "uniform", "gaussian"), KNOWN)
def test_known_answers(seed: int, name: str, words: str, uniform: list[float], gaussian: list[float]) -> None:
    assert stream.words(seed, name, 0, 6).tolist() == [int(w, 16) for w in words.split()]
    assert stream.coefficients("uniform", seed, name, 0, 3).tolist() == uniform
    assert stream.coefficients("gaussian", seed, name, 0, 4).tolist() == pytest.approx(gaussian, abs=1e-6)


def test_the_stream_is_named_for_its_version() -> None:
    assert stream.STREAM == "philox4x32-10/v1"


def test_names_are_not_normalised() -> None:
    assert stream.stream_id("\u00e9") != stream.stream_id("e\u0301")
    assert stream.stream_id("") != stream.stream_id("\0")


@settings(deadline=None)
@given(
    start=st.one_of(st.integers(0, 40), st.integers(2**34 - 40, 2**34 + 40), st.integers(2**62, 2**63)),
    count=st.integers(0, 40),
    distribution=st.sampled_from(["uniform", "gaussian"]),
)
def test_any_run_of_elements_is_a_slice_of_the_stream(start: int, count: int, distribution: str) -> None:
    before = start % 16
    whole = stream.coefficients(distribution, 7, "w", start - before, before + count + 5)
    part = stream.coefficients(distribution, 7, "w", start, count)
    assert part.tobytes() == whole[before : before + count].tobytes()


def test_counters_past_32_bits_use_the_second_word() -> None:
    block = 2**32 + 5
    k0, k1, s0, s1 = stream.stream_words(3, "w")
    expected = stream.philox4x32(np.array([[5, 1, s0, s1]], dtype=np.uint64), (k0, k1))
    assert stream.words(3, "w", 4 * block, 4).tolist() == expected[0].tolist()
    assert stream.words(3, "w", 4 * 5, 4).tolist() != expected[0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), amplitude=st.floats(2.0**-149, 2.0**127, width=32))
def test_rounding_is_that_of_exact_arithmetic(dtype: str, seed: int, amplitude: float) -> None:
    rng = np.random.default_rng(seed)
    stored = oracle.any_finite(rng, 30, dtype)
    c = (rng.random(30) - 0.5).astype(np.float32)
    out, unchanged, clamped = stream.add_noise(stored, dtype, c, np.float32(amplitude))
    x, y = oracle.values(stored, dtype), oracle.values(out, dtype)
    expected = [oracle.noised(v, float(w), amplitude, dtype) for v, w in zip(x, c, strict=True)]
    assert [Fraction(v) for v in y] == expected
    assert unchanged == sum(a.tobytes() == b.tobytes() for a, b in zip(stored, out, strict=True))
    assert clamped <= sum(abs(v) == oracle.LARGEST[dtype] for v in expected)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_half_and_every_tie_between_two_rounds_to_even(dtype: str) -> None:
    _, _, infinite = oracle.STORED[dtype]
    finite = np.arange(infinite, dtype=np.uint16)
    stored = finite.view(np.float16) if dtype == "F16" else finite
    x = stream.upcast(stored, dtype)
    middles = ((x[:-1].astype(np.float64) + x[1:]) / 2).astype(np.float32)
    even = np.where(finite[:-1] % 2 == 0, finite[:-1], finite[1:])
    above = np.nextafter(middles, np.float32(np.inf))
    below = np.nextafter(middles, np.float32(0))
    nothing = np.zeros(middles.size, oracle.STORED[dtype][0])
    # The midpoints between BF16 denormals are float32 values too, so all of them can be asked for.
    for wanted, coefficient in ((even, middles), (finite[1:], above), (finite[:-1], below)):
        out, _, clamped = stream.add_noise(nothing, dtype, coefficient, np.float32(1))
        assert np.array_equal(out.view(np.uint16), wanted)
        assert clamped == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_finite_value_stays_finite_and_is_counted(dtype: str, sign: float) -> None:
    largest = float(oracle.LARGEST[dtype])
    stored = oracle.encode([sign * largest, sign, 0.0, -0.0], dtype)
    amplitude = np.float32(65504.0 if dtype == "F16" else 3e38)
    c = np.array([sign * 6.0] * 4, np.float32)
    with np.errstate(all="raise", over="ignore"):
        out, unchanged, clamped = stream.add_noise(stored, dtype, c, amplitude)
    if dtype == "F64":  # float64(c) · float64(a) is far from its largest, and too small to move it
        assert oracle.values(out, dtype)[0] == sign * largest
        assert (unchanged, clamped) == (1, 0)
    else:
        assert oracle.values(out, dtype) == [sign * largest] * 4
        assert (unchanged, clamped) == (1, 4)


def test_minus_zero_follows_the_addition() -> None:
    zeros = np.array([-0.0, -0.0, 0.0], np.float32)
    # The first two products underflow to -0 and +0.
    out, unchanged, _ = stream.add_noise(
        zeros, "F32", np.array([-0.25, 0.25, -0.25], np.float32), np.float32(2.0**-149)
    )
    assert np.signbit(out).tolist() == [True, False, False]
    assert unchanged == 2


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['distribution']}-{c['dtype']}-{c['first']}")
def test_golden_digests(case: dict[str, object]) -> None:
    stored = oracle.ramp(str(case["dtype"]))
    first, seed = int(str(case["first"])), int(str(case["seed"]))
    c = stream.coefficients(str(case["distribution"]), seed, str(case["name"]), first, stored.size)
    out, _, _ = stream.add_noise(stored, str(case["dtype"]), c, np.float32(float(str(case["amplitude"]))))
    assert blake3(out.tobytes()).hexdigest() == case["digest"]
