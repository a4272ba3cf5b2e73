"""The sums between two tensors, against NumPy in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FLOATS, Tensor, floats, numbers, save, weights

from noisytune_cli.checkpoint.formats import open_source
from noisytune_cli.engine.changes import Change, measure_changes
from noisytune_cli.noise import stream


def change(folder: Path, a: Tensor, b: Tensor, threads: int = 2) -> Change:
    sources = []
    for name, tensor in (("a", a), ("b", b)):
        path = save(folder / f"{name}.safetensors", {"w": tensor})
        sources.append(open_source(path, path.name, False))
    try:
        first, second = sources
        pairs = [(first.tensors[0], second.tensors[0])]
        files = ({first.name: first}, {second.name: second})
        (found,) = measure_changes(pairs, *files, threads=threads, progress=lambda done: None)
        return found
    finally:
        for source in sources:
            source.close()


@pytest.mark.parametrize("dtype_b", FLOATS)
@pytest.mark.parametrize("dtype_a", FLOATS)
def test_numbers_are_those_of_float64(tmp_path: Path, dtype_a: str, dtype_b: str) -> None:
    a, b = weights(dtype_a, 300, 1000, seed=1, centre=0.3), weights(dtype_b, 300, 1000, seed=2, width=0.5)
    found = change(tmp_path, a, b)
    x, y = np.array(floats(a)), np.array(floats(b))
    norm = np.abs(x).sum()
    assert found.norm_change == pytest.approx(abs(np.abs(y).sum() - norm) / norm, rel=1e-12)
    assert found.change_norm == pytest.approx(np.abs(y - x).sum() / norm, rel=1e-12)
    assert found.l2 == pytest.approx(np.linalg.norm(y - x), rel=1e-12)
    assert found.largest_change == np.abs(y - x).max()
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)
    assert found.equal_share == np.mean(x == y)
    assert (found.elements, found.numbers) == (300_000, 300_000)


def test_a_tensor_is_equal_to_itself(tmp_path: Path) -> None:
    a = weights("BF16", 400, 700, seed=3)
    found = change(tmp_path, a, a)
    assert (found.norm_change, found.change_norm, found.l2, found.largest_change) == (0.0, 0.0, 0.0, 0.0)
    assert found.equal_share == 1.0
    assert found.cosine == pytest.approx(1.0, abs=1e-15)


def test_threads_change_nothing(tmp_path: Path) -> None:
    a, b = weights("F32", 1000, 700, seed=1), weights("F32", 1000, 700, seed=2)
    assert change(tmp_path / "1", a, b, threads=1) == change(tmp_path / "3", a, b, threads=3)


@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16"])
def test_what_is_not_finite_has_no_numbers_but_is_counted(tmp_path: Path, dtype: str) -> None:
    a = numbers(dtype, 1.0, math.nan, math.inf, math.inf, 5.0)
    b = numbers(dtype, 1.0, math.nan, math.inf, 2.0, 6.0)
    found = change(tmp_path, a, b)
    assert found.equal_share == 3 / 5
    assert (found.norm_change, found.l2, found.largest_change, found.cosine) == (None,) * 4


def test_zeros_have_no_relative_change_and_no_angle(tmp_path: Path) -> None:
    found = change(tmp_path, numbers("F32", 0, 0), numbers("F32", 3, 4))
    assert (found.norm_change, found.change_norm, found.cosine) == (None, None, None)
    assert (found.l2, found.largest_change) == (5.0, 4.0)


def test_numbers_past_float64_are_none(tmp_path: Path) -> None:
    found = change(tmp_path, numbers("F64", 1e300, 1.0), numbers("F64", -1e300, 2.0))
    assert (found.l2, found.largest_change, found.equal_share) == (None, 2e300, 0.0)


@pytest.mark.parametrize(("dtype", "stored"), [("I64", "<i8"), ("I32", "<i4"), ("BOOL", "u1")])
def test_what_is_no_float_is_compared_by_elements(tmp_path: Path, dtype: str, stored: str) -> None:
    a = np.arange(300_000).astype(stored) % 2
    b = a.copy()
    b[::1000] ^= 1
    found = change(tmp_path, Tensor(dtype, a), Tensor(dtype, b))
    assert found.equal_share == 1 - 1 / 1000
    assert (found.numbers, found.l2, found.noise) == (0, None, None)


def test_sums_of_parts_are_those_of_all(tmp_path: Path) -> None:
    a, b = weights("F32", 5000, seed=1), weights("F32", 5000, seed=2)
    half = [
        change(tmp_path / str(i), Tensor("F32", a.values[s]), Tensor("F32", b.values[s]))
        for i, s in enumerate((slice(0, 2000), slice(2000, None)))
    ]
    whole, both = change(tmp_path, a, b), half[0] + half[1]
    assert both.largest == whole.largest
    assert both.l2 == pytest.approx(whole.l2, rel=1e-14)
    assert (both.elements, both.equal) == (whole.elements, whole.equal)


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_lambda_is_in_its_interval_in_95_of_100(tmp_path: Path, distribution: str) -> None:
    base = weights("F32", 4000, seed=5)
    x = base.values.astype(np.float64)
    scale = 0.3 * x.std() / (1.0 if distribution == "uniform" else math.sqrt(12))
    inside = 0
    for seed in range(100):
        c = stream.coefficients(distribution, seed, "w", 0, 4000)
        found = change(tmp_path, base, Tensor("F32", (x + c * scale).astype("<f4"))).noise
        assert found is not None
        assert found.distribution == distribution
        inside += found.low <= 0.3 <= found.high
    assert 90 <= inside <= 99


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_of_few_values_the_likelier_distribution_is_told(tmp_path: Path, distribution: str) -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(100):
        base = rng.standard_normal((8, 8))
        noise = rng.random((8, 8)) - 0.5 if distribution == "uniform" else rng.standard_normal((8, 8))
        found = change(tmp_path, *(Tensor("F32", x.astype("<f4")) for x in (base, base + 0.1 * noise))).noise
        wrong += found is not None and found.distribution != distribution
    assert wrong <= 8  # some 2.5 are to be expected; of Gaussian noise it was once a quarter


def test_other_changes_look_like_no_noise(tmp_path: Path) -> None:
    base = weights("F32", 4000, seed=6)
    drawn = np.random.default_rng(0)
    for changed in (
        base.values * 1.01,
        base.values + 0.01,
        base.values,
        base.values + drawn.laplace(size=4000) * 0.001,
    ):
        assert change(tmp_path, base, Tensor("F32", changed.astype("<f4"))).noise is None
