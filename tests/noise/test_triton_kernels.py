"""The fused CUDA kernels against the NumPy reference, bit for bit.

Where there is no GPU they run in Triton's interpreter, on the CPU (`conftest.py` asks for it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import noisytune_cli
from noisytune_cli.memory import in_place
from noisytune_cli.noise import std as moments
from noisytune_cli.noise import stream
from noisytune_cli.noise.devices import cuda
from noisytune_cli.noise.devices.torch import operations as torch_kernels

pytest.importorskip("triton")

from triton_tiles import resize

from noisytune_cli.noise.devices.cuda import add as triton_noise
from noisytune_cli.noise.devices.cuda import sums as triton_sums
from noisytune_cli.noise.devices.cuda.launch import INTERPRETED, LANES, STEPS, Row

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = sorted(stream.STORED)
#: Elements of a tile in these tests.
SIZE = LANES.value * (2 if INTERPRETED else STEPS.value)
DISTRIBUTIONS = ["gaussian", "uniform"]

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither Triton's interpreter nor a GPU"
)


@pytest.fixture(scope="module", autouse=True)
def small_tiles() -> Iterator[None]:
    """Give the interpreter, which is slow, a step or two of each tile."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            resize(patch, 2)
        yield


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Let the interpreter's NumPy overflow as a GPU does, without a word."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def on_device(stored: np.ndarray, dtype: str, offset: int = 0) -> torch.Tensor:
    """Return stored values on the device, so many elements past an aligned address."""
    room = torch.empty(stored.size + offset, dtype=torch_kernels.DTYPES[dtype], device=DEVICE)
    values = room[offset:]
    values.copy_(torch.from_numpy(stored.view(np.uint8).copy()).view(values.dtype))
    return values


def stored_bytes(values: torch.Tensor) -> bytes:
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def noised(
    tensors: Sequence[tuple[np.ndarray, str, int, int, int]], distribution: str, amplitude: float
) -> Any:
    """Add noise to all of (values, dtype, offset, seed, first) at once; return bytes and counts of each."""
    held = [on_device(stored, dtype, offset) for stored, dtype, offset, _, _ in tensors]
    rows = [
        Row(values, stream.Noise.of(distribution, stream.stream_words(seed, "w"), amplitude), first)
        for values, (_, _, _, seed, first) in zip(held, tensors, strict=True)
    ]
    counts = triton_noise.add_noise(rows).tolist()
    return [(stored_bytes(values), *count) for values, count in zip(held, counts, strict=True)]


def reference(
    tensors: Sequence[tuple[np.ndarray, str, int, int, int]], distribution: str, amplitude: float
) -> Any:
    found = []
    for stored, dtype, _, seed, first in tensors:
        c = stream.coefficients(distribution, seed, "w", first, stored.size)
        values, *counts = stream.add_noise(stored, dtype, c, np.float32(amplitude))
        found.append((values.tobytes(), *counts))
    return found


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=4, deadline=None)
@given(
    values=st.integers(0, 2**32),
    count=st.integers(1, 2 * SIZE + 9),
    offset=st.integers(0, 5),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 9) | st.integers(2**31 - 99, 2**34) | st.integers(2**64 - 30_000, 2**64 - 20_000),
    exponent=st.integers(-45, 38),
)
def test_bits_are_those_of_the_reference(
    dtype: str, distribution: str, values: int, count: int, offset: int, seed: int, first: int, exponent: int
) -> None:
    stored = oracle.any_finite(np.random.default_rng(values), count, dtype)
    tensors = [(stored, dtype, offset, seed, first)]
    amplitude = float(np.float32(10.0**exponent))
    assert noised(tensors, distribution, amplitude) == reference(tensors, distribution, amplitude)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_many_tensors_of_all_kinds_in_one_call(distribution: str) -> None:
    sizes = [1, 3, SIZE - 1, SIZE, SIZE + 1, 5, 1000]
    tensors = [
        (
            oracle.weights(np.random.default_rng(i), sizes[i % 7], DTYPES[i % 4]),
            DTYPES[i % 4],
            i % 3,
            i,
            2**32 + i,
        )
        for i in range(7)
    ]
    got = noised(tensors, distribution, float(np.float32(0.003)))
    assert got == reference(tensors, distribution, float(np.float32(0.003)))
    assert sum(unchanged for _, unchanged, _ in got) > 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_noise_has_the_bits_of_the_reference(dtype: str, distribution: str) -> None:
    """Of several terms, to shrunk values, both, neither; in place and from another tensor; in one call."""
    large = float(np.float32(0.2 * min(oracle.LARGEST[dtype], oracle.LARGEST["F32"])))
    cases = [
        ([(1, 0.01), (2**64 - 1, -0.5), (7, 2.0**-140)], 1.0, SIZE + 33, 0, 2**34 - 8),
        ([(1, large), (2, large), (3, -large)], 0.9, 2 * SIZE, 0, 5),
        ([(9, -0.25)], float(np.float32(0.3)), 900, 1, 2**64 - 5000),
        ([(9, 0.25)], 1.0, SIZE, 0, 8),
        ([], 0.5, 77, 2, 3),
        ([(4, 0.0), (5, -0.0)], 1.0, 40, 0, 0),  # a sum of zeros keeps the sign of a zero
    ]
    rows, expected = [], []
    for number, (terms, kept, count, offset, first) in enumerate(cases):
        named = tuple((stream.stream_words(seed, "w"), float(np.float32(a))) for seed, a in terms)
        stored = oracle.any_finite(np.random.default_rng(number), count, dtype)
        stored[:8] = stored[8:16] & 0 if stored.dtype == np.uint16 else -0.0
        held, noise = on_device(stored, dtype, offset), stream.Noise(distribution, named, kept)
        rows += [Row(held.clone(), noise, first), Row(torch.ones_like(held), noise, first, held)]
        values, *counts = stream.mix(stored, dtype, noise, first)
        expected += [(values.tobytes(), *counts)] * 2
    counted = triton_noise.add_noise(rows).tolist()
    got = [(stored_bytes(row.values), *count) for row, count in zip(rows, counted, strict=True)]
    assert got == expected
    assert expected[2][2] > 0 or dtype == "F64"
    assert all(stored_bytes(row.base) != stored_bytes(row.values) for row in rows[1::2][:5])


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_largest_values_are_clamped_and_counted(dtype: str, first: int) -> None:
    stored = oracle.encode([oracle.LARGEST[dtype], -oracle.LARGEST[dtype], 1.0, 0.0] * 2500, dtype)
    tensors = [(stored, dtype, 0, 9, first)]
    amplitude = 65504.0 if dtype == "F16" else float(np.finfo(np.float32).max)
    (got,) = noised(tensors, "uniform", amplitude)
    assert [got] == reference(tensors, "uniform", amplitude)
    assert 2000 < got[2] < 3000  # half of the 5,000 extremes go outwards
    assert got[1] >= got[2]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize(
    ("first", "amplitude", "in_pairs"),
    [
        (4, 0.01, True),
        (4, 2.0**-102, True),
        (4, float(np.float32(1e38)), True),  # of which some sums overflow
        (4, float(np.nextafter(np.float32(2.0**-102), np.float32(0))), False),
        (4, 2.0**-149, False),
        (2**34 - 4 * (SIZE // 4), 0.01, True),
        (2**34 - 4 * (SIZE // 4) + 4, 0.01, False),  # past a multiple of 2^32 counters
        (2**64 - SIZE, 0.01, True),
        (5, 0.01, False),
    ],
)
def test_whole_tiles_of_two_byte_values_go_in_pairs(
    dtype: str, first: int, amplitude: float, in_pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    right = triton_noise.add_to_pairs
    if INTERPRETED:
        monkeypatch.setattr(triton_noise, "add_to_pairs", lambda *a: taken.append(1) or right(*a))
    tensors = [(oracle.any_finite(np.random.default_rng(3), SIZE, dtype), dtype, 0, 9, first)]
    assert noised(tensors, "uniform", amplitude) == reference(tensors, "uniform", amplitude)
    assert bool(taken) == in_pairs or not INTERPRETED


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep the size of their tiles")
@pytest.mark.parametrize("steps", [1, 3, STEPS.value])
def test_the_size_of_tiles_does_not_show(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, steps)
    tensors = [(oracle.weights(np.random.default_rng(i), 3333, "BF16"), "BF16", i, i, i) for i in range(2)]
    assert noised(tensors, "uniform", 0.5) == reference(tensors, "uniform", 0.5)
    values = on_device(tensors[0][0], "BF16")
    got = torch_kernels.moments_of(triton_sums.sums([values])[0].tolist(), values)
    assert moments.round_std([got]) == oracle.std32(oracle.values(tensors[0][0], "BF16"))


def test_the_bytes_around_a_tensor_stay() -> None:
    room = torch.zeros(SIZE + 40, dtype=torch.float32, device=DEVICE)
    triton_noise.add_noise([Row(room[7:-9], stream.Noise.of("uniform", (1, 2, 3, 4), 1.0), 3)])
    assert room[7:-9].abs().min() > 0
    assert not room[:7].any()
    assert not room[-9:].any()


@settings(max_examples=12, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 300) | st.integers(SIZE - 2, SIZE + 300),
    centre=st.sampled_from([0.0, 1.0, -1e4]),
    offset=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_sums_keep_the_error_bound(dtype: str, count: int, centre: float, offset: int, seed: int) -> None:
    stored = oracle.weights(np.random.default_rng(seed), count, dtype, centre, 1e-3)
    values = on_device(stored, dtype, offset)
    got = torch_kernels.moments_of(triton_sums.sums([values])[0].tolist(), values)
    d = [Fraction(v) - Fraction(got.pivot) for v in oracle.values(stored, dtype)]
    s1, s2 = (Fraction(high) + Fraction(low) for high, low in (got.s1, got.s2))
    bound, squares = Fraction(moments.RELATIVE_ERROR), sum(v * v for v in d)
    assert abs(s1 - sum(d)) <= bound * sum(abs(v) for v in d)
    assert abs(s2 - squares) <= bound * squares
    assert (got.count, got.finite, got.wide) == (count, True, dtype == "F64")


def test_a_tiles_chain_of_additions_is_within_the_bound() -> None:
    # A chain adds two values a step, the chains are added in any order; d and its square are a rounding each.
    assert 2 * STEPS.value + LANES.value // 2 + 3 <= moments.RELATIVE_ERROR * 2**53


@pytest.mark.parametrize("power", [53, 27])
def test_what_each_tile_adds_is_not_lost_to_one_large_value(power: int) -> None:
    tiles = 40
    stored = np.zeros(tiles * SIZE, np.float32)
    stored[100] = 2.0**power
    stored[SIZE + 100 :: SIZE] = 1.0  # less than half a step of either sum, each
    values = on_device(stored, "F32")
    got = torch_kernels.moments_of(triton_sums.sums([values])[0].tolist(), values)
    pivot, n, bound = Fraction(got.pivot), stored.size, Fraction(moments.RELATIVE_ERROR)
    first, second = 2**power + tiles - 1, 4**power + tiles - 1
    s1, s2 = (Fraction(high) + Fraction(low) for high, low in (got.s1, got.s2))
    assert abs(s1 - (first - n * pivot)) <= bound * (first + n * abs(pivot))
    assert abs(s2 - (second - 2 * pivot * first + n * pivot * pivot)) <= bound * second


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_found_in_their_tensors(dtype: str) -> None:
    tensors = [torch.ones(n, dtype=torch_kernels.DTYPES[dtype], device=DEVICE) for n in (5, SIZE + 9, 70)]
    tensors += [t.clone() for t in tensors for _ in range(3)]
    for i, bad in enumerate([float("nan"), float("inf"), -float("inf")]):
        for tensor in tensors[3 + i :: 3]:
            tensor[-1 - i] = bad
    rows = triton_sums.sums(tensors).tolist()
    assert [row[1] for row in rows] == [1.0] * 3 + [0.0] * 9
    assert [row[3] for row in rows[:3]] == [0.0] * 3


def test_squares_that_overflow_leave_the_std_to_the_exact_sums() -> None:
    values = torch.tensor([1.7e308, -1.7e308] * 50, dtype=torch.float64, device=DEVICE)
    got = torch_kernels.moments_of(triton_sums.sums([values])[0].tolist(), values)
    assert got.finite
    assert moments.round_std([got]) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_prove_themselves(dtype: str) -> None:
    assert cuda.adds_exactly.__wrapped__(DEVICE, torch_kernels.DTYPES[dtype], "uniform", True)
    assert cuda.adds_exactly.__wrapped__(DEVICE, torch_kernels.DTYPES[dtype], "gaussian", False)
    assert cuda.sums_exactly.__wrapped__(DEVICE, torch_kernels.DTYPES[dtype])


def test_a_kernel_that_is_wrong_or_cannot_run_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right, right_sums = triton_noise.add_noise, triton_sums.sums

    def wrong(rows: Sequence[Row]) -> torch.Tensor:
        counts = right(rows)
        rows[0].values[SIZE + 1].mul_(1 + 2**-7)
        return counts

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    adds, sums = cuda.adds_exactly.__wrapped__, cuda.sums_exactly.__wrapped__
    for kernel in (wrong, broken):
        monkeypatch.setattr(triton_noise, "add_noise", kernel)
        assert not adds(DEVICE, torch.bfloat16, "uniform", True)
        assert not adds(DEVICE, torch.bfloat16, "uniform", False)
    for kernel in (lambda values: right_sums(values) * (1 + 1e-6), broken):
        monkeypatch.setattr(triton_sums, "sums", kernel)
        assert not sums(DEVICE, torch.bfloat16)
    assert not adds(DEVICE, torch.bfloat16, "a distribution without a kernel", True)
    assert not adds(torch.device("meta"), torch.bfloat16, "uniform", True)


def test_a_device_out_of_memory_is_not_taken_for_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_noise, "add_noise", exhausted)
    monkeypatch.setattr(triton_sums, "sums", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        cuda.adds_exactly.__wrapped__(DEVICE, torch.float32, "uniform", True)
    with pytest.raises(torch.OutOfMemoryError):
        cuda.sums_exactly.__wrapped__(DEVICE, torch.float32)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_tiles_of_a_file_go_through_the_kernels(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda.Cuda(DEVICE)
    stored = oracle.weights(np.random.default_rng(1), SIZE + 77, "BF16")
    for operation in ("block_sums", "add_noise"):
        monkeypatch.setattr(torch_kernels, operation, lambda *_: pytest.fail("torch operations"))
    noise = stream.Noise.of(distribution, stream.stream_words(3, "w"), 0.5)
    out = bytearray(stored.nbytes)
    counts = device.add_noise(oracle.tile(stored), memoryview(out), "BF16", noise=noise, first=8)
    assert (bytes(out), *counts) == reference([(stored, "BF16", 0, 3, 8)], distribution, 0.5)[0]
    mixed = noise._replace(terms=noise.terms * 2, kept=0.5)
    values, *expected = stream.mix(stored, "BF16", mixed, 8)
    counts = device.add_noise(oracle.tile(stored), memoryview(out), "BF16", noise=mixed, first=8)
    assert (bytes(out), list(counts)) == (values.tobytes(), expected)
    assert moments.round_std([device.moments(oracle.tile(stored), "BF16")]) is not None


def test_what_the_kernels_do_not_offer_goes_through_torch_operations() -> None:
    device = cuda.Cuda(DEVICE)
    stored = oracle.weights(np.random.default_rng(1), 999, "F32")
    c = stream.coefficients("uniform", 3, "w", 5, stored.size)
    expected, *counts = stream.add_noise(stored, "F32", c, np.float32(0.5), "BF16")
    out = bytearray(expected.nbytes)
    noise = stream.Noise.of("uniform", stream.stream_words(3, "w"), 0.5)
    got = device.add_noise(oracle.tile(stored), memoryview(out), "F32", "BF16", noise=noise, first=5)
    assert (bytes(out), list(got)) == (expected.tobytes(), counts)
    assert device.moments(memoryview(b""), "F32").count == 0


@pytest.mark.parametrize("noise", DISTRIBUTIONS)
def test_perturb_launches_once_for_all_and_gives_the_bits_of_the_cpu(
    noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tensors: dict[str, Any] = {f"{i}.weight": torch.randn(7 + i, 11) for i in range(5)}
    tensors |= {f"{i}.half": torch.randn(40, 30).to(torch.bfloat16) for i in range(3)}
    tensors |= {"turned": torch.randn(12, 34).t(), "constant": torch.ones(9, 9), "empty": torch.ones(0, 3)}
    expected = {name: t.clone() for name, t in tensors.items()}
    tensors = {name: t.to(DEVICE) for name, t in tensors.items()}
    record = noisytune_cli.perturb_(expected, noise=noise)
    launched: list[int] = []
    right = triton_noise.add_noise
    monkeypatch.setattr(in_place, "_is_exact_device", lambda name: True)
    monkeypatch.setattr(triton_noise, "add_noise", lambda rows: launched.append(len(rows)) or right(rows))
    for dtype in (torch.float32, torch.bfloat16):  # prove them first, which adds noise too
        assert cuda.adds_exactly(DEVICE, dtype, noise, True)
    launched.clear()
    version = tensors["0.weight"]._version
    assert noisytune_cli.perturb_(tensors, noise=noise) == record
    assert {n: stored_bytes(t) for n, t in tensors.items()} == {
        n: stored_bytes(t) for n, t in expected.items()
    }
    assert launched == [8]
    assert tensors["0.weight"]._version > version


@pytest.mark.parametrize("host", [False, True])
def test_a_population_has_the_bits_of_the_cpu(host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values = {
        "a": torch.randn(7, 11),
        "b": torch.randn(40, 30).to(torch.bfloat16),
        "c": torch.randn(9, 4).t(),
    }
    tensors = {name: t.clone().to(DEVICE) for name, t in values.items()}
    monkeypatch.setattr(in_place, "_is_exact_device", lambda name: True)
    population = noisytune_cli.Population(tensors, host=host)
    mix = [{"seed": 1, "sigma": 0.1}, {"seed": 2, "sigma": 0.2}]
    for options in (
        {"sigma": -0.1, "seed": 3},
        {"mix": mix, "shrink": 0.5},
        {"lam": 0.3, "noise": "uniform"},
    ):
        expected = {name: t.clone() for name, t in values.items()}
        record = noisytune_cli.perturb_(expected, **options)
        assert population.set(**options) == record
        assert all(stored_bytes(tensors[name]) == stored_bytes(expected[name]) for name in values)
    population.restore()
    assert all(stored_bytes(tensors[name]) == stored_bytes(values[name]) for name in values)
