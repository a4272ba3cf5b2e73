"""Every device, by name, against the reference and exact arithmetic: the same bits on all of them."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.noise import devices, distributions, stream
from noisytune_cli.noise.devices import Device
from noisytune_cli.noise.std import BLOCK, RELATIVE_ERROR, new_exact_sums

DTYPES = sorted(FLOAT_DTYPES)
DISTRIBUTIONS = distributions.names()
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())

#: First elements that matter: within a counter, and where an i32, a u32 and a counter's low word run over.
FIRSTS = st.one_of(st.integers(0, 9), *(st.integers(2**e - 3000, 2**e + 5) for e in (31, 32, 34, 40)))
AMPLITUDES = st.one_of(
    st.floats(2.0**-149, 2.0**-120, width=32),
    st.floats(2.0**-20, 2.0**-1, width=32),
    st.floats(2.0**100, float(np.finfo(np.float32).max), width=32),
)


def add_noise(
    device: Device, stored: np.ndarray, dtype: str, distribution: str, seed: int, first: int, amplitude: float
) -> tuple[np.ndarray, int, int]:
    """Add noise from stream "w" on a device; the bytes around the output must stay as they are."""
    size = stored.itemsize
    room = np.full(stored.nbytes + 2 * size, 0xA5, np.uint8)
    before = stored.tobytes()
    unchanged, clamped = device.add_noise(
        oracle.tile(stored),
        memoryview(room)[size : size + stored.nbytes],
        dtype,
        noise=stream.Noise.of(distribution, stream.stream_words(seed, "w"), amplitude),
        first=first,
    )
    assert stored.tobytes() == before
    assert set(room[:size].tolist() + room[size + stored.nbytes :].tolist()) == {0xA5}
    return np.frombuffer(room[size : size + stored.nbytes].tobytes(), stored.dtype), unchanged, clamped


def reference(
    stored: np.ndarray, dtype: str, distribution: str, seed: int, first: int, amplitude: float
) -> tuple[np.ndarray, int, int]:
    """Do the same in NumPy."""
    c = stream.coefficients(distribution, seed, "w", first, stored.size)
    out, unchanged, clamped = stream.add_noise(stored, dtype, c, np.float32(amplitude))
    return out.view(stored.dtype), unchanged, clamped


def same(left: tuple[np.ndarray, int, int], right: tuple[np.ndarray, int, int]) -> bool:
    return left[0].tobytes() == right[0].tobytes() and left[1:] == right[1:]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(
    values=st.integers(0, 2**32),
    count=st.one_of(st.integers(0, 20), st.integers(2030, 2070), st.integers(0, 9000)),
    seed=st.integers(0, 2**64 - 1),
    first=FIRSTS,
    amplitude=AMPLITUDES,
)
def test_noise_is_the_references_on_any_values(
    device: Device,
    dtype: str,
    distribution: str,
    values: int,
    count: int,
    seed: int,
    first: int,
    amplitude: float,
) -> None:
    stored = oracle.any_finite(np.random.default_rng(values), count, dtype)
    arguments = (stored, dtype, distribution, seed, first, amplitude)
    assert same(add_noise(device, *arguments), reference(*arguments))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_the_references_on_weights(device: Device, dtype: str, distribution: str) -> None:
    stored = oracle.weights(np.random.default_rng(1), 100_003, dtype)
    arguments = (stored, dtype, distribution, 42, 2**32 - 50_001, float(np.float32(0.003)))
    assert same(add_noise(device, *arguments), reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_elements_are_counted(device: Device, dtype: str) -> None:
    largest = float(oracle.LARGEST[dtype])
    stored = oracle.encode([largest, -largest, 1.0, 0.0] * 700, dtype)
    amplitude = 65504.0 if dtype == "F16" else float(np.finfo(np.float32).max)
    arguments = (stored, dtype, "uniform", 9, 1, amplitude)
    out, unchanged, clamped = add_noise(device, *arguments)
    assert np.isfinite(oracle.values(out, dtype)).all()
    assert same((out, unchanged, clamped), reference(*arguments))
    assert clamped == 0 if dtype == "F64" else 500 < clamped < 900  # half of the 1,400 extremes go outwards


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_minus_zero_and_denormals(device: Device, dtype: str, distribution: str) -> None:
    tiny = 2.0 ** oracle.FORMATS[dtype][1]
    stored = oracle.encode([-0.0, 0.0, tiny, -tiny, 3 * tiny, -7 * tiny] * 500, dtype)
    if dtype == "BF16":  # the oracle's zero has no sign
        stored[::6] = 0x8000
    else:
        stored[::6] = -0.0
    for amplitude in (2.0**-149, 2.0**-148, 2.0**-133, 2.0**-126, 2.0**-24, 2.0**-14):
        arguments = (stored, dtype, distribution, 4, 3, amplitude)
        assert same(add_noise(device, *arguments), reference(*arguments))


def test_products_and_sums_are_rounded_apart(device: Device) -> None:
    # x = -float32(c · a) leaves exactly nothing, unless the two operations are fused.
    amplitude = float(np.float32(0.1))
    for distribution in DISTRIBUTIONS:
        c = stream.coefficients(distribution, 5, "w", 0, 5000)
        product = c * np.float32(amplitude)
        exact = c.astype(np.float64) * amplitude  # 48 bits hold the product of two float32 numbers
        assert np.count_nonzero(exact != product) > 4000  # so a fused one would show
        out, _, _ = add_noise(device, -product, "F32", distribution, 5, 0, amplitude)
        assert not out.any()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['distribution']}-{c['dtype']}-{c['first']}")
def test_golden_digests(device: Device, case: dict[str, object]) -> None:
    stored = oracle.ramp(str(case["dtype"]))
    out = np.empty_like(stored)
    words = stream.stream_words(int(str(case["seed"])), str(case["name"]))
    device.add_noise(
        oracle.tile(stored),
        oracle.tile(out),
        str(case["dtype"]),
        noise=stream.Noise.of(str(case["distribution"]), words, float(str(case["amplitude"]))),
        first=int(str(case["first"])),
    )
    assert blake3(out.tobytes()).hexdigest() == case["digest"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_tiles_and_threads_do_not_matter(device: Device, dtype: str, distribution: str) -> None:
    stored = oracle.weights(np.random.default_rng(2), 30_000, dtype)
    whole, unchanged, clamped = add_noise(device, stored, dtype, distribution, 1, 0, 0.25)
    for length in (1003, 2048, 7001):

        def one_tile(at: int, length: int = length) -> tuple[np.ndarray, int, int]:
            return add_noise(device, stored[at : at + length], dtype, distribution, 1, at, 0.25)

        with ThreadPoolExecutor(5) as threads:
            parts = list(threads.map(one_tile, range(0, stored.size, length)))
        assert b"".join(part[0].tobytes() for part in parts) == whole.tobytes()
        assert (sum(part[1] for part in parts), sum(part[2] for part in parts)) == (unchanged, clamped)


@pytest.mark.parametrize("room", [memoryview(bytes(8)), memoryview(bytearray(4)), memoryview(bytearray(12))])
def test_an_output_that_does_not_fit_is_refused(device: Device, room: memoryview) -> None:
    with pytest.raises(ValueError, match=r"tile|read-only|broadcast"):
        device.add_noise(
            memoryview(bytes(8)),
            room,
            "F32",
            noise=stream.Noise.of("uniform", (0, 0, 0, 0), 1.0),
            first=0,
        )


def bounded(device: Device, stored: np.ndarray, dtype: str) -> None:
    """Check the claimed bound on the error of both sums."""
    got = device.moments(oracle.tile(stored), dtype)
    d = [Fraction(v) - Fraction(got.pivot) for v in oracle.values(stored, dtype)]
    s1, s2 = (Fraction(high) + Fraction(low) for high, low in (got.s1, got.s2))
    squares, bound = sum(v * v for v in d), Fraction(RELATIVE_ERROR)
    assert (got.count, got.finite, got.wide) == (stored.size, True, dtype == "F64")
    assert abs(s1 - sum(d)) <= bound * sum(abs(v) for v in d)
    assert abs(s2 - squares) <= bound * squares


def adversaries() -> dict[str, np.ndarray]:
    """Return float64 values that make sums lose bits: in one direction, to cancellation, to a bad pivot."""
    n = 3 * BLOCK + 17
    up = np.full(n, 1.0)
    up[64:] = 1 + 2.0**-27 + 2.0**-52  # its square, and each sum of squares, is cut the same way
    growing = np.cumsum(np.full(n, 0.1))
    outlier = np.full(n, 2.0**-30)
    outlier[0] = 2.0**40
    hidden = np.where(np.arange(n) % 2 == 0, 1e8, -1e8) + np.arange(n) * 1e-6
    far = 1e4 + np.random.default_rng(1).normal(0, 1e-3, n)
    return {"up": up, "growing": growing, "outlier": outlier, "hidden": hidden, "far": far}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(adversaries()))
def test_the_error_bound_holds_for_hostile_values(device: Device, dtype: str, name: str) -> None:
    numbers = adversaries()[name]
    if dtype == "F16":
        numbers = numbers / max(1.0, np.abs(numbers).max() / 60_000)
    bounded(device, oracle.encode(numbers.tolist(), dtype), dtype)


@pytest.mark.parametrize("power", [53, 27])
def test_what_each_block_adds_is_not_lost_to_one_large_value(device: Device, power: int) -> None:
    blocks = 4096
    stored = np.zeros((blocks + 1) * BLOCK, np.float32)
    stored[100] = 2.0**power
    stored[BLOCK + 100 :: BLOCK] = 1.0  # less than half a step of either sum, each
    got = device.moments(oracle.tile(stored), "F32")
    pivot, n = Fraction(got.pivot), stored.size
    first, second = 2**power + blocks, 4**power + blocks
    s1, s2 = (Fraction(high) + Fraction(low) for high, low in (got.s1, got.s2))
    bound = Fraction(RELATIVE_ERROR)
    assert abs(s1 - (first - n * pivot)) <= bound * (first + n * abs(pivot))
    assert abs(s2 - (second - 2 * pivot * first + n * pivot * pivot)) <= bound * second


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 3000), magnitude=st.integers(-20, 12))
def test_the_error_bound_holds(device: Device, dtype: str, seed: int, count: int, magnitude: int) -> None:
    rng = np.random.default_rng(seed)
    bounded(device, oracle.weights(rng, count, dtype, rng.normal(0, 1), 2.0**magnitude), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 63, 64, 2999])
def test_one_value_that_is_not_finite_is_found(device: Device, dtype: str, bad: float, at: int) -> None:
    numbers = np.random.default_rng(0).normal(0, 1, 3000).astype(np.float32)
    numbers[at] = bad
    stored = (
        (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        if dtype == "BF16"
        else numbers.astype(oracle.STORED[dtype][0])
    )
    assert not device.moments(oracle.tile(stored), dtype).finite
    got = device.summarize(oracle.tile(stored), dtype)
    assert (got.nans, got.infinities) == ((1, 0) if np.isnan(bad) else (0, 1))
    if not np.isnan(bad):
        assert bad in (got.minimum, got.maximum)
        assert got.absolute_sum == np.inf


def test_large_float64_values_are_finite(device: Device) -> None:
    stored = np.array([1.7e308, -1.7e308] * 100 + [1.7e308] * 100)
    assert device.moments(oracle.tile(stored), "F64").finite


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_nan_of_a_half_is_one(device: Device, dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    magnitude, infinite = every & 0x7FFF, oracle.STORED[dtype][2]
    got = device.summarize(oracle.tile(every), dtype)
    assert (got.zeros, got.infinities, got.nans) == (2, 2, int((magnitude > infinite).sum()))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 3000))
def test_statistics(device: Device, dtype: str, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    stored = oracle.weights(rng, count, dtype, 0.5, 3.0)
    stored[rng.random(count) < 0.2] = 0
    numbers = oracle.values(stored, dtype)
    got = device.summarize(oracle.tile(stored), dtype)
    assert (got.minimum, got.maximum) == (min(numbers), max(numbers))
    assert (got.zeros, got.nans, got.infinities) == (numbers.count(0.0), 0, 0)
    assert got.absolute_sum == pytest.approx(math.fsum(abs(v) for v in numbers), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_any_values(device: Device, dtype: str) -> None:
    for seed in range(20):
        stored = oracle.any_finite(np.random.default_rng(seed), 50, dtype)
        numbers = oracle.values(stored, dtype)
        got = device.summarize(oracle.tile(stored), dtype)
        assert (got.minimum, got.maximum) == (min(numbers), max(numbers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_tile_adds_nothing(device: Device, dtype: str) -> None:
    empty = memoryview(b"")
    got = device.moments(empty, dtype)
    assert (got.count, got.s1, got.s2, got.finite) == (0, (0.0, 0.0), (0.0, 0.0), True)
    sums = new_exact_sums()
    device.add_exact_sums(empty, dtype, sums)
    assert not sums.any()
    assert device.summarize(empty, dtype).zeros == 0


def test_names_and_modules() -> None:
    assert "cpu" in devices.names()
    assert devices.load("cpu:0") is devices.load("cpu")
    with pytest.raises(KeyError):
        devices.load("tpu")
