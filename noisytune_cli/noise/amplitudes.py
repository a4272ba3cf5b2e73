"""From a strength and a std to what noise is multiplied by: of one seed, or of each in a mixture.

    scope matrix, global     uniform a = float32(λ · std32)             Gaussian a = float32(λ · std32 / √12)
    scope absolute           uniform a = float32(σ · √12)               Gaussian a = float32(σ)

A mixture's strengths are its lines' own, each times its coefficient before anything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from noisytune_cli.dtypes import LARGEST
from noisytune_cli.noise import distributions
from noisytune_cli.noise.stream import Noise, key_words, stream_words
from noisytune_cli.records import NoiseSpec, Outcome

#: More than any distribution's |c|: a Gaussian's is below sqrt(2 · 33 · ln 2) < 6.8.
_LARGEST_COEFFICIENT = 8.0


def amplitudes(noise: NoiseSpec, strength: float, std: float | None) -> tuple[float, ...]:
    """Return the float32 amplitude of each term; `std` is std32, None in scope absolute, which has none."""
    distribution = distributions.load(noise.distribution)
    strengths: Any = strength
    if noise.mix:
        import numpy as np  # not for a plan

        strengths = np.array([term.coefficient * term.strength for term in noise.mix], np.float64)
    if std is None:
        found = distribution.absolute_amplitude(strengths)
    else:
        found = distribution.amplitude(strengths, std)
    return tuple(found.tolist()) if noise.mix else (float(found),)


def overall(noise: NoiseSpec, found: Sequence[float]) -> float:
    """Return the amplitude that stands for all terms: of one its own, else the sum's width or std in float64.

    It is infinite where their sum could overflow: its order would then decide what comes of it.
    """
    if not noise.mix:
        return found[0]
    if not math.fsum(map(abs, found)) * _LARGEST_COEFFICIENT < LARGEST["F32"]:
        return math.inf
    return distributions.load(noise.distribution).overall_amplitude(found)


def noise_of(noise: NoiseSpec, stream: str, outcome: Outcome) -> Noise | None:
    """Return what is done to a matrix of which an outcome is known, None where it stays as it is."""
    if outcome.action == "copy":
        return None
    if outcome.action == "shrink":
        return Noise(noise.distribution, (), noise.kept)
    words = stream_words(noise.seed, stream)
    if not noise.mix:
        assert outcome.amplitude is not None
        return Noise(noise.distribution, ((words, outcome.amplitude),), noise.kept)
    found = amplitudes(noise, outcome.lam, outcome.std)
    keys = [key_words(term.seed) + words[2:] for term in noise.mix]
    return Noise(noise.distribution, tuple(zip(keys, found, strict=True)), noise.kept)
