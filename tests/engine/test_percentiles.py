"""Percentiles against NumPy's, exactly, for every dtype and tile size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, numbers, save

from noisytune_cli.commands.inspect import inspect
from noisytune_cli.engine.percentiles import Percentiles

WANTED = (0.0, 1.0, 12.5, 50.0, 99.0, 99.9, 100.0)


def stored(values: np.ndarray, dtype: str) -> tuple[bytes, np.ndarray]:
    """Values as a file holds them in `dtype`, and what those are as float64."""
    if dtype == "BF16":
        bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits.tobytes(), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    there = values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
    return there.tobytes(), there.astype(np.float64)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("count", [1, 2, 3, 101, 5000])
@pytest.mark.parametrize("kind", ["normal", "ties", "spread"])
def test_they_are_numpys(dtype: str, count: int, kind: str) -> None:
    rng = np.random.default_rng(count)
    values: Any = rng.standard_normal(count)
    if kind == "ties":
        values = np.round(values)
    elif kind == "spread":
        values = values * 10.0 ** rng.integers(-4, 4, count)
    content, exact = stored(values, dtype)
    search, passes = Percentiles(WANTED, count, dtype), 0
    size = len(content) // count
    while not search.is_known:
        for start in range(0, len(content), 37 * size):
            search.add(memoryview(content)[start : start + 37 * size])
        search.narrow()
        passes += 1
    assert passes == size // 2
    assert search.values() == tuple(np.percentile(exact, WANTED).tolist())


def test_inspect_reports_them_of_what_is_numbers_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    big = rng.standard_normal((700, 900)).astype(np.float32)
    tensors = {
        "big": Tensor("F32", big),
        "broken": numbers("F32", 1, np.nan),
        "count": Tensor("I64", np.array([1])),
    }
    found = inspect(str(save(tmp_path / "a.safetensors", tensors)), percentiles=(1.0, 50.0), threads=3)
    by_name = {row.name: row.percentiles for row in found.tensors}
    low, middle = np.percentile(big.astype(np.float64), (1, 50)).tolist()
    assert by_name == {"big": {"p1": low, "p50": middle}, "broken": None, "count": None}
