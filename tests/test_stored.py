"""F16 by the CPU's instructions and on its bits: both are NumPy's, value for value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit

from noisytune_cli import stored
from noisytune_cli.vectors import narrows_to_f16

HALVES = np.arange(2**16, dtype=np.uint16)

by_cpu = pytest.param(
    (stored.load_f16_by_cpu, stored.round_f16_by_cpu),
    marks=pytest.mark.skipif(not narrows_to_f16(), reason="this CPU has no instructions for F16"),
)
WAYS = pytest.mark.parametrize("way", [by_cpu, (stored.load_f16_by_bits, stored.round_f16_by_bits)])
Way = tuple[Callable[..., Any], Callable[..., Any]]


@WAYS
def test_every_f16_is_widened(way: Way) -> None:
    load = njit(way[0])

    @njit
    def widen(halves: Any, out: Any) -> None:
        for i in range(halves.size):
            out[i] = load(halves, i)

    out = np.empty(HALVES.size, np.float32)
    widen(HALVES, out)
    expected = HALVES.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(expected)
    assert (np.isnan(out) == ~numbers).all()
    assert (out.view(np.uint32)[numbers] == expected.view(np.uint32)[numbers]).all()


@WAYS
def test_float32_is_rounded_to_f16(way: Way) -> None:
    round_to = njit(way[1])

    @njit
    def narrow(values: Any, out: Any) -> None:
        for i in range(values.size):
            out[i] = round_to(values[i])

    finite = HALVES[np.isfinite(HALVES.view(np.float16))].view(np.float16).astype(np.float64)
    ordered = np.unique(np.append(finite, [65536.0, -65536.0]))
    midpoints = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)  # exact: one bit more than F16 has
    above, below = (np.nextafter(midpoints, np.float32(to)) for to in (np.inf, -np.inf))
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e38, -1e38, 1e-40, -1e-45], np.float32)
    values = np.concatenate([midpoints, above, below, ordered.astype(np.float32), special])
    out = np.empty(values.size, np.uint16)
    narrow(values, out)
    with np.errstate(over="ignore"):
        assert (out == values.astype(np.float16).view(np.uint16)).all()
