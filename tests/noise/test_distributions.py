"""The noise is what it claims to be: uniform or normal, centred, as wide as the amplitude says."""

from __future__ import annotations

import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest

from noisytune_cli.noise import stream
from noisytune_cli.noise.devices.cpu import open_device
from noisytune_cli.noise.distributions import gaussian, uniform

DATA = Path(os.environ.get("NOISYTUNE_DATA") or Path(__file__).parents[3] / "shared" / "data") / "checkpoints"
CPU = open_device("cpu")


def kolmogorov_smirnov(drawn: np.ndarray, distribution: np.ndarray) -> float:
    """Return sqrt(n) · D of sorted draws, given the distribution function at each; 1.95 has p = 0.001."""
    n = drawn.size
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * float(max((distribution - steps[:-1]).max(), (steps[1:] - distribution).max()))


def normal_distribution(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])


def uniform_noise(stored: np.ndarray, name: str, lam: float = 0.15) -> np.ndarray:
    """Return what is added to a float32 matrix, in units of λ · std."""
    std = oracle.std32(stored.ravel()[:2000].tolist())
    amplitude = float(uniform.amplitude(lam, std))
    flat, out = stored.ravel(), np.empty(stored.size, np.float32)
    CPU.add_noise(
        oracle.tile(flat),
        oracle.tile(out),
        "F32",
        noise=stream.Noise.of("uniform", stream.stream_words(0, name), amplitude),
        first=0,
    )
    return (out.astype(np.float64) - flat) / amplitude


def check_uniform(noise: np.ndarray) -> None:
    n = noise.size
    assert abs(noise).max() < 0.5 + 1e-4
    assert abs(noise.mean()) < 4 / math.sqrt(12 * n)
    assert noise.std() == pytest.approx(1 / math.sqrt(12), rel=4 * math.sqrt(0.2 / n))
    assert kolmogorov_smirnov(np.sort(noise), np.clip(np.sort(noise) + 0.5, 0, 1)) < 1.95


def test_uniform_noise_on_a_matrix_of_berts_size() -> None:
    matrix = oracle.weights(np.random.default_rng(0), 768 * 3072, "F32")
    noise = uniform_noise(matrix, "encoder.layer.0.intermediate.dense.weight")
    check_uniform(noise)


def test_uniform_noise_on_a_real_matrix() -> None:
    path = DATA / "capp-gpt" / "model.safetensors"
    if not path.is_file():
        pytest.skip("the real checkpoints are not here (NOISYTUNE_DATA)")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        floats = {name: entry for name, entry in header.items() if entry.get("dtype") == "F32"}
        name = max(floats, key=lambda n: math.prod(floats[n]["shape"]))
        start, end = floats[name]["data_offsets"]
        file.seek(8 + length + start)
        matrix = np.frombuffer(file.read(end - start), "<f4")
    assert matrix.size > 10_000
    noise = uniform_noise(matrix, name)
    check_uniform(noise)


def test_noise_is_as_wide_as_lambda_and_std_say() -> None:
    lam, std = 0.15, float(np.float32(0.02))
    c = stream.coefficients("uniform", 1, "w", 0, 1_000_000).astype(np.float64)
    g = stream.coefficients("gaussian", 1, "w", 0, 1_000_000).astype(np.float64)
    expected = lam * std / math.sqrt(12)
    assert (c * uniform.amplitude(lam, std)).std() == pytest.approx(expected, rel=2e-3)
    assert (g * gaussian.amplitude(lam, std)).std() == pytest.approx(expected, rel=3e-3)


def test_uniform_coefficients_are_odd_multiples_of_a_step() -> None:
    words = np.array([0, 255, 256, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    top = 2**24 - 1
    assert (uniform.coefficients(words) * 2.0**25).tolist() == [-top, -top, 2 - top, -1, 1, top]


def test_gaussian_moments_and_shape() -> None:
    drawn = stream.coefficients("gaussian", 3, "w", 0, 200_000).astype(np.float64)
    n = drawn.size
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs((drawn**2).mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs((drawn**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((drawn**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert kolmogorov_smirnov(np.sort(drawn), normal_distribution(np.sort(drawn))) < 1.95
    assert abs((drawn[0::2] * drawn[1::2]).mean()) < 4 / math.sqrt(n / 2)  # the two of a pair


def hard_words() -> np.ndarray:
    """Return words at the ends, about each eighth of a turn and where ln changes its exponent, and others."""
    edges = [k * 2**29 + d for k in range(9) for d in (-2, -1, 0, 1, 2)]
    powers = [2**e + d for e in range(33) for d in (-1, 0, 1)]
    roots = [int(2**e * math.sqrt(0.5)) + d for e in range(1, 33) for d in (-1, 0, 1)]
    chosen = {w for w in (*edges, *powers, *roots) if 0 <= w < 2**32}
    others = np.random.default_rng(0).integers(0, 2**32, 50_000)
    return np.concatenate([np.array(sorted(chosen)), others]).astype(np.uint32)


def test_radius_is_accurate() -> None:
    words = hard_words()
    got = gaussian.radius(words)
    # Near u = 1 only log1p sees the bits of 1 - u, which is exact.
    expected = [
        math.sqrt(
            -2 * (math.log1p(-(2**32 - w - 0.5) * 2.0**-32) if w >= 2**31 else math.log((w + 0.5) * 2.0**-32))
        )
        for w in words.tolist()
    ]
    assert np.abs(got / np.array(expected) - 1).max() < 1e-14


def test_cos_and_sin_are_accurate() -> None:
    words = hard_words()
    cos, sin = gaussian.cos_sin(words)
    turns = [2 * math.pi * ((w + 0.5) * 2.0**-32) for w in words.tolist()]
    assert np.abs(cos - np.array([math.cos(t) for t in turns])).max() < 2e-15
    assert np.abs(sin - np.array([math.sin(t) for t in turns])).max() < 2e-15
    assert np.abs(cos * cos + sin * sin - 1).max() < 1e-15
    assert (cos != 0).all()
    assert (sin != 0).all()


@pytest.mark.parametrize("module", [uniform, gaussian])
def test_an_amplitude_is_the_float32_nearest_to_the_float64_product(module: object) -> None:
    divisor = 1.0 if module is uniform else 3.4641016151377544
    for lam, std in [(0.15, 0.02), (1e-40, 1e-5), (3.0, 3e38), (0.1, 2.0**-149)]:
        expected = oracle.nearest(Fraction(lam * float(np.float32(std)) / divisor), "F32")
        assert float(module.amplitude(lam, float(np.float32(std)))) == float(expected)  # type: ignore[attr-defined]
