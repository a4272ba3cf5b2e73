"""std32: exact whatever the values, the tiles and the sums, against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisytune_cli.noise.devices.cpu import open_device
from noisytune_cli.noise.std import (
    Moments,
    exact_mean,
    exact_std,
    exactly_equal,
    mean,
    nearest_sqrt,
    new_exact_sums,
    round_std,
    std_and_equality,
)

CPU = open_device("cpu")
LARGEST = float(np.finfo(np.float32).max)
DTYPES = ["F32", "F64", "F16", "BF16"]


def measure(stored: np.ndarray, dtype: str, tile: int) -> list[Moments]:
    return [CPU.moments(oracle.tile(stored[at : at + tile]), dtype) for at in range(0, stored.size, tile)]


def exactly(stored: np.ndarray, dtype: str, tile: int) -> float:
    sums = new_exact_sums()
    for at in range(0, stored.size, tile):
        CPU.add_exact_sums(oracle.tile(stored[at : at + tile]), dtype, sums)
    return exact_std(sums, stored.size)


def check(stored: np.ndarray, dtype: str, tile: int = 10**9, decided: bool | None = None) -> None:
    """Check both ways to std32 against the oracle; `decided` says whether the float64 sums must be enough."""
    expected = oracle.std32(oracle.values(stored, dtype))
    fast = round_std(measure(stored, dtype, tile))
    assert fast in (None, expected)
    if decided is not None:
        assert (fast is not None) is decided
    assert exactly(stored, dtype, tile) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("centre", "width"), [(0.0, 0.02), (1.0, 1e-3), (1e4, 1e-3), (0.0, 1e4)])
def test_weights(dtype: str, centre: float, width: float) -> None:
    stored = oracle.weights(np.random.default_rng(5), 3000, dtype, centre, width)
    check(stored, dtype)
    check(stored, dtype, tile=700)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_the_float64_sums_decide_what_weights_need(dtype: str) -> None:
    for seed, centre in enumerate((0.0, 1.0, 1e4)):
        check(oracle.weights(np.random.default_rng(seed), 5000, dtype, centre, 1e-3), dtype, decided=True)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 60), tile=st.integers(1, 60))
def test_values_of_any_size(dtype: str, seed: int, count: int, tile: int) -> None:
    check(oracle.any_finite(np.random.default_rng(seed), count, dtype), dtype, tile)


@settings(deadline=None, max_examples=150)
@given(
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=12),
    tile=st.integers(1, 12),
)
def test_any_float64(numbers: list[float], tile: int) -> None:
    check(np.array(numbers), "F64", tile)


@pytest.mark.parametrize(
    "numbers",
    [
        [1e300, -1e300, 3e299],
        [1.7e308, -1.7e308, 1.7e308],
        [1.7e308, 1.6e308],
        [1e-300, 2e-300, 5e-300],
        [5e-324, 0.0, 0.0, 1e-320],
        [1e-40, 2e-40, 3e-40],
        [1e160, 1e160 + 1e145, -1.0],
        [1e-160, 2e-160, 4e-160],
        [1e300, 1e300, 1e300],
        [1e300, 1.0, 1e-300],
        [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
    ],
)
@pytest.mark.parametrize("tile", [1, 2, 100])
def test_squares_that_leave_float64(numbers: list[float], tile: int) -> None:
    check(np.array(numbers), "F64", tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 0.1, -65504.0, 2.0**-24])
def test_a_constant_has_std_zero(dtype: str, value: float) -> None:
    stored = oracle.encode([value] * 777, dtype)
    assert exactly(stored, dtype, 100) == 0.0
    assert round_std(measure(stored, dtype, 100)) in (0.0, None)
    if dtype != "F64":
        assert round_std(measure(stored, dtype, 100)) == 0.0


def test_zeros_of_both_signs_are_a_constant() -> None:
    assert round_std(measure(np.array([0.0, -0.0, 0.0], np.float32), "F32", 10)) == 0.0


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_a_tie_between_two_float32_goes_to_the_even_one(scale: float) -> None:
    # Mean 1, deviations ±(2^24 + 1): the std is 2^24 + 1, halfway between two float32 numbers.
    stored = (np.array([-(2**24), 1, 2**24 + 2]) * scale).astype(np.float32)
    assert oracle.std32(oracle.values(stored, "F32")) == 2**24 * scale
    check(stored, "F32", decided=False)
    stored = (np.array([-(2**24) - 2, 1, 2**24 + 4]) * scale).astype(np.float32)
    assert oracle.std32(oracle.values(stored, "F32")) == (2**24 + 4) * scale
    check(stored, "F32", decided=False)


@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("odd", [2**24 + 1, 2**24 + 3, 2**25 - 1])
@pytest.mark.parametrize("shift", [0, 100, -100, -172, -173, 103])
def test_a_hair_beside_a_tie(odd: int, steps: int, shift: int) -> None:
    # -s, 0, s has std s, and s lies a few float64 steps from the midpoint of two float32 numbers.
    s = math.ldexp(odd, shift)
    for _ in range(abs(steps)):
        s = math.nextafter(s, math.inf if steps > 0 else 0.0)
    stored = np.array([-s, 0.0, s])
    assert oracle.std32(stored.tolist()) == oracle.sqrt32(Fraction(s) ** 2)
    if shift > -149:  # an ordinary float32: no float64 sum can tell
        check(stored, "F64", decided=False)
    check(stored, "F64", tile=1)


def test_the_largest_float32_and_past_it() -> None:
    assert exactly(np.array([-LARGEST, 0.0, LARGEST]), "F64", 9) == LARGEST
    check(np.array([-LARGEST, LARGEST], np.float32), "F32")
    assert exactly(np.array([-LARGEST, LARGEST], np.float32), "F32", 9) == math.inf
    halfway = float(2**128 - 2**103)
    assert exactly(np.array([-halfway, 0.0, halfway]), "F64", 9) == math.inf
    under = math.nextafter(halfway, 0.0)
    assert exactly(np.array([-under, 0.0, under]), "F64", 9) == LARGEST


def test_the_smallest_float32_and_below_it() -> None:
    tiny = 2.0**-149
    above = math.nextafter(tiny / 2, 1.0)
    for s, expected in [(tiny, tiny), (tiny / 2, 0.0), (above, tiny), (tiny * 1.5, 2 * tiny)]:
        assert exactly(np.array([-s, 0.0, s]), "F64", 9) == expected
        check(np.array([-s, 0.0, s]), "F64")


@settings(max_examples=300)
@given(
    st.fractions(min_value=0, max_denominator=10**30)
    | st.builds(
        lambda m, e, hair: (Fraction(2 * m + 1) * Fraction(2) ** e) ** 2 + hair,
        st.integers(2**23, 2**24 - 1),
        st.integers(-150, 103),
        st.fractions(-Fraction(1, 10**60), Fraction(1, 10**60)).filter(lambda f: f.denominator < 10**90),
    ).filter(lambda f: f >= 0)
    | st.builds(lambda n, e: Fraction(n) * Fraction(10) ** e, st.integers(1, 10**9), st.integers(-700, 700))
)
def test_square_roots_of_fractions(square: Fraction) -> None:
    assert nearest_sqrt(square, 1) == (oracle.sqrt32(square) if square else 0.0)
    assert nearest_sqrt(square, 7) == (oracle.sqrt32(square / 7) if square else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_do_not_matter(dtype: str) -> None:
    stored = oracle.weights(np.random.default_rng(8), 6000, dtype, 0.5, 0.02)
    stored[5000:5100] = oracle.encode([30_000.0], dtype)  # a pivot of its own for some tiles
    expected = oracle.std32(oracle.values(stored, dtype))
    for tile in (63, 64, 65, 1024, 1025, 6000):
        # A float64 tile that looks constant is in doubt: its squares may have underflowed.
        allowed = (expected, None) if dtype == "F64" and tile < 100 else (expected,)
        assert round_std(measure(stored, dtype, tile)) in allowed
        assert exactly(stored, dtype, tile) == expected


def test_parts_with_pivots_far_apart() -> None:
    left = oracle.weights(np.random.default_rng(1), 3000, "F32", -1e6, 1.0)
    right = oracle.weights(np.random.default_rng(2), 100, "F32", 1e-6, 1e-9)
    both = np.concatenate([left, right])
    expected = oracle.std32(oracle.values(both, "F32"))
    assert round_std([*measure(left, "F32", 999), *measure(right, "F32", 999)]) == expected
    assert round_std([*measure(right, "F32", 7), *measure(left, "F32", 1000)]) == expected


def test_parts_of_different_dtypes() -> None:
    rng = np.random.default_rng(3)
    parts = {dtype: oracle.weights(rng, 500, dtype, 0.1, 0.3) for dtype in DTYPES}
    expected = oracle.std32(v for dtype, stored in parts.items() for v in oracle.values(stored, dtype))
    assert round_std([m for dtype, stored in parts.items() for m in measure(stored, dtype, 128)]) == expected
    sums = new_exact_sums()
    for dtype, stored in parts.items():
        CPU.add_exact_sums(oracle.tile(stored), dtype, sums)
    assert exact_std(sums, 2000) == expected


def test_round_std_refuses_a_bound_it_cannot_keep() -> None:
    # The std lies 1e-14 from a midpoint and the sums may be off by 1e-13: both float32 are possible.
    s = (2**24 + 1) * (1 + 1e-14)
    assert round_std([Moments(3, 0.0, (0.0, 0.0), (2 * s * s, 0.0), True, True)]) is None
    s = (2**24 + 1) * (1 + 1e-9)
    assert round_std([Moments(3, 0.0, (0.0, 0.0), (2 * s * s, 0.0), True, True)]) == 2**24 + 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean(dtype: str) -> None:
    stored = oracle.weights(np.random.default_rng(4), 1000, dtype, 3.0, 1.0)
    numbers = oracle.values(stored, dtype)
    expected = float(sum(Fraction(v) for v in numbers) / 1000)
    assert mean(measure(stored, dtype, 300)) == pytest.approx(expected, rel=1e-14)
    sums = new_exact_sums()
    CPU.add_exact_sums(oracle.tile(stored), dtype, sums)
    assert exact_mean(sums, 1000) == expected


def test_a_mean_past_what_float64_sums_hold() -> None:
    numbers = np.array([1.7e308] * 5 + [1.6e308])
    assert mean(measure(numbers, "F64", 9)) is None
    sums = new_exact_sums()
    CPU.add_exact_sums(oracle.tile(numbers), "F64", sums)
    assert exact_mean(sums, 6) == float(sum(Fraction(v) for v in numbers.tolist()) / 6)


@pytest.mark.parametrize("value", [1.1e-109, 7.3e-60, 3.1e-45, 0.1, 1e200])
@pytest.mark.parametrize("count", [2, 3, 65, 200])
def test_a_constant_is_one_though_its_pivot_is_rounded(value: float, count: int) -> None:
    stored = np.full(count, value)
    found = std_and_equality([CPU.moments(oracle.tile(stored), "F64")])
    if found is None:  # then the exact sums tell
        sums = new_exact_sums()
        CPU.add_exact_sums(oracle.tile(stored), "F64", sums)
        found = exact_std(sums, count), exactly_equal(sums, count)
    assert found == (0.0, True)


@pytest.mark.parametrize("power", [20, 25, 35])
def test_one_large_tile_is_rounded_like_many(power: int) -> None:
    # ±v, as many of each: what a kernel's sum of n/BLOCK runs leaves in its low word is more than the bound.
    v = float.fromhex("0x1.42f904af41ac9p+0")
    runs, n = 2 ** (power - 10), 2**power
    square = v * v
    high = low = 0.0
    for _ in range(runs if power < 35 else 0):  # as kernels.c compensates
        total = high + 1024 * square
        part = total - high
        low += (high - (total - part)) + (1024 * square - part)
        high = total
    if power == 35:
        exact = Fraction(runs) * Fraction(1024 * square)
        high = float(exact) * (1 - 2.0**-40)  # the most that so many runs may leave to the low word
        low = float(exact - Fraction(high))
    parts = [Moments(n, 0.0, (0.0, 0.0), (high, low), True, True)]
    # Where the bound cannot decide it says so, and exact sums will; it must not be wrong.
    assert round_std(parts) in (None, oracle.sqrt32(Fraction(n * Fraction(v) ** 2, n - 1)))
