"""Means by float64 alone: those that are sure against the exact ones, and that nearly all are."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

from noisytune_cli.engine.exact_mean import Mean, Weights
from noisytune_cli.engine.quick_mean import FRACTIONS, QuickMean
from noisytune_cli.noise import stream

DTYPES = tuple(FRACTIONS)
WEIGHTS = {
    "two": (1.0, 1.0),
    "three": (1.0, 1.0, 1.0),
    "many": (1.0,) * 41,
    "short": (3.0, 1.0, 0.25),
    "as short as sums bear": (1.0, 2.0**-9),
    "too long for them": (1.0, 1 + 2.0**-20),
    "long": (0.7, 0.3),
    "far apart": (1.0, 1e-17, 0.1),
    "too far": (1.0, 1e-300),
}
_COUNT = 600


def _bits(dtype: str) -> Any:
    return oracle.STORED[dtype][1]


def _values(bits: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    return stream.upcast(bits.view(oracle.STORED[dtype][0]), dtype).astype(np.float64)


def _stored(values: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    return stream.convert(values, "F64", dtype)[0].view(_bits(dtype))


def _drawn(kind: str, dtype: str, count: int) -> list[NDArray[Any]]:
    """Values of several members, by their bits."""
    rng = np.random.default_rng(len(kind))
    bits = _bits(dtype)
    infinity = oracle.STORED[dtype][2]
    largest = bits.type(infinity - 1)
    sign = bits.type(largest + 1 | (1 << 8 * bits.itemsize - 1)) & ~bits.type(infinity)
    if kind == "any":
        return [oracle.any_finite(rng, _COUNT, dtype).view(bits) for _ in range(count)]
    if kind == "weights":
        return [oracle.weights(rng, _COUNT, dtype).view(bits) for _ in range(count)]
    one = oracle.encode([1.0], dtype).view(bits)[0]
    if kind == "neighbours":  # of which the means are ties, and next to them
        return [one + rng.integers(0, 6, _COUNT).astype(bits) for _ in range(count)]
    if kind == "subnormal":
        members = [rng.integers(0, 5, _COUNT).astype(bits) for _ in range(count)]
        return [member | np.where(rng.random(_COUNT) < 0.5, sign, bits.type(0)) for member in members]
    if kind == "largest":
        return [largest - rng.integers(0, 3, _COUNT).astype(bits) for _ in range(count)]
    assert kind == "cancel"
    first = oracle.any_finite(rng, _COUNT, dtype).view(bits)
    others = [rng.integers(0, 3, _COUNT).astype(bits) for _ in range(count - 2)]
    return [first, first ^ (1 << 8 * bits.itemsize - 1), *others]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kind", ["any", "weights", "neighbours", "subnormal", "largest", "cancel"])
def test_what_is_sure_is_the_exact_mean(kind: str, name: str, dtype: str) -> None:
    weights = Weights(WEIGHTS[name])
    members = _drawn(kind, dtype, len(WEIGHTS[name]))
    exact, quick = Mean(weights, _COUNT, wide=False), QuickMean(dtype, weights)
    for index, member in enumerate(members):
        exact.add(_values(member, dtype), index)
        quick.add(member, _values(member, dtype), index)
    expected = _stored(exact.round(lambda index: _values(members[index], dtype)), dtype)
    # Zeros keep a sign that all agree on, which the exact mean has not to know of.
    agreed = np.logical_and.reduce([member == members[0] for member in members])
    expected = np.where(agreed, members[0], expected)
    found, unsure = quick.round(lambda values: _stored(values, dtype), members.__getitem__)
    sure = np.ones(_COUNT, bool)
    sure[unsure] = False
    assert found[sure].tolist() == expected[sure].tolist()
    if name == "too far":
        assert not sure.any()
    elif kind == "weights":
        assert sure.mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_sure_beside_what_is_not_finite(dtype: str) -> None:
    weights = Weights((1.0, 1.0))
    bits = _bits(dtype)
    quick = QuickMean(dtype, weights)
    for index, other in enumerate((0, oracle.STORED[dtype][2])):
        member = np.array([1, other], bits)
        quick.add(member, _values(member, dtype), index)
    assert not quick.finite
    _, unsure = quick.round(lambda values: _stored(values, dtype), [].__getitem__)
    assert unsure.tolist() == [0, 1]
