"""Every distribution, by name: its noise, and that what it tells the manifest is true."""

from __future__ import annotations

import math

import numpy as np
import pytest

from noisytune_cli.noise import distributions

NAMES = distributions.names()


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_finite_and_never_zero(name: str) -> None:
    ends = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    words = np.array(np.meshgrid(ends, ends), np.uint32).reshape(2, -1).T.ravel()
    drawn = distributions.load(name).coefficients(words)
    assert np.isfinite(drawn).all()
    assert (drawn != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_distribution_has_the_same_variance_at_the_same_lambda(name: str) -> None:
    module = distributions.load(name)
    words = np.random.default_rng(6).integers(0, 2**32, 400_000, dtype=np.uint32)
    noise = module.coefficients(words).astype(np.float64) * module.amplitude(0.15, 2.0)
    assert noise.std() == pytest.approx(0.15 * 2.0 / math.sqrt(12), rel=5e-3)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(noise.size)


@pytest.mark.parametrize("name", NAMES)
def test_the_range_holds_the_noise(name: str) -> None:
    module = distributions.load(name)
    amplitude = float(module.amplitude(0.15, 2.0))
    words = np.random.default_rng(7).integers(0, 2**32, 100_000, dtype=np.uint32)
    noise = module.coefficients(words).astype(np.float64) * amplitude
    told = module.noise_range(amplitude)
    if "low" in told:
        assert told["low"] < noise.min() < 0.99 * told["low"]
        assert 0.99 * told["high"] < noise.max() < told["high"]
    else:
        assert told["noise_std"] == pytest.approx(noise.std(), rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_amplitudes_that_float32_cannot_hold(name: str) -> None:
    module = distributions.load(name)
    assert np.isinf(module.amplitude(1e6, 3e38))
    assert module.amplitude(1e-30, 1e-30) == 0.0


def test_an_unknown_name() -> None:
    with pytest.raises(KeyError):
        distributions.load("cauchy")
