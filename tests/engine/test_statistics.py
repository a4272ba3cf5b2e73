"""Statistics against NumPy and exact arithmetic, whatever the dtype, the size and the threads."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Tensor, floats, save, std32, weights

from noisytune_cli.checkpoint.formats.safetensors import open_source
from noisytune_cli.engine.statistics import Statistics, measure
from noisytune_cli.errors import Mismatch
from noisytune_cli.noise import devices

MIB = 1 << 20


def measured(
    path: Path, tensors: dict[str, Tensor], threads: int = 1, mmap: bool = False
) -> list[Statistics]:
    source = open_source(save(path, tensors), "w", mmap)
    device = devices.load("cpu").open_device("cpu")
    try:
        found = measure(source.tensors, {"w": source}, device, threads=threads, progress=lambda nbytes: None)
        return [statistics for (statistics,) in found]
    finally:
        source.close()


@pytest.mark.parametrize("shape", [(64, 33), (3 * MIB // 8 + 5,)], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
def test_agrees_with_numpy(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = weights(dtype, *shape)
    tensor.values.reshape(-1)[5:9] = 0
    x = np.array(floats(tensor))
    (found,) = measured(tmp_path / "f", {"w": tensor})
    assert found.mean == pytest.approx(x.mean(), rel=1e-11)
    assert found.l1 == pytest.approx(np.abs(x).sum(), rel=1e-11)
    assert found.l2 == pytest.approx(np.linalg.norm(x), rel=1e-11)
    assert (found.min, found.max) == (x.min(), x.max())
    assert found.zeros == (x == 0).sum() / x.size
    assert (found.nan, found.inf) == (0, 0)
    assert found.std == np.float32(x.std(ddof=1))


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
def test_std_is_exactly_rounded(tmp_path: Path, dtype: str) -> None:
    tensors = {f"w{i}": weights(dtype, 7 + i, seed=i, width=10.0 ** (i - 8)) for i in range(12)}
    for found, tensor in zip(measured(tmp_path / "f", tensors), tensors.values(), strict=True):
        assert found.std == std32(tensor)


def test_sums_out_of_float64s_range_are_taken_exactly(tmp_path: Path) -> None:
    big, tiny, constant = [1.7e308, 1.7e308, 1.6e308], [3e-200, 4e-200, 0.0], [0.1] * 5
    tensors = {name: Tensor("F64", np.array(x)) for name, x in zip("btc", (big, tiny, constant), strict=True)}
    b, t, c = measured(tmp_path / "f", tensors)
    assert b.mean == pytest.approx(5 / 3 * 1e308)
    assert b.std == math.inf
    assert b.l1 == b.l2 == math.inf
    assert (b.min, b.max) == (1.6e308, 1.7e308)
    assert t.l2 == pytest.approx(5e-200)
    assert (c.mean, c.std) == (0.1, 0.0)


def test_values_without_statistics(tmp_path: Path) -> None:
    tensors = {
        "nan": Tensor("F32", np.array([1, np.nan, 0, 0], "<f4")),
        "inf": Tensor("F16", np.array([np.inf, -np.inf, 1], "<f2")),
        "both": Tensor("BF16", np.array([0x7F80, 0x7FC1, 0x3F80, 0xFF80], "<u2")),
        "one": Tensor("F32", np.array(-3, "<f4")),
        "empty": Tensor("F32", np.zeros((0, 4), "<f4")),
    }
    nan, inf, both, one, empty = measured(tmp_path / "f", tensors)
    assert nan == Statistics(zeros=0.5, nan=1, inf=0)
    assert inf == Statistics(zeros=0.0, nan=0, inf=2)
    assert both == Statistics(zeros=0.0, nan=1, inf=2)
    assert one == Statistics(mean=-3, std=None, min=-3, max=-3, l1=3, l2=3, zeros=0, nan=0, inf=0)
    assert empty == Statistics(l1=0, l2=0, nan=0, inf=0)


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_the_same_for_any_number_of_threads(tmp_path: Path, mmap: bool) -> None:
    tensors = {f"w{i}": weights(("F32", "F16")[i % 2], 1000 * i + 3, seed=i) for i in range(9)}
    tensors["large"] = weights("F32", 5 * MIB // 4 + 3)  # behind an odd number of halves: misaligned
    once = measured(tmp_path / "f", tensors, 1, mmap)
    for threads in (2, 5):
        assert measured(tmp_path / "f", tensors, threads, mmap) == once
    assert once[-1].std == np.float32(np.std(floats(tensors["large"]), ddof=1))


def test_progress_adds_up_to_the_bytes(tmp_path: Path) -> None:
    source = open_source(
        save(tmp_path / "f", {"a": weights("F32", MIB), "b": weights("F64", 10)}), "w", False
    )
    lock, done = threading.Lock(), []

    def progress(nbytes: int) -> None:
        with lock:
            done.append(nbytes)

    device = devices.load("cpu").open_device("cpu")
    measure(source.tensors, {"w": source}, device, threads=2, progress=progress)
    source.close()
    assert sum(done) == 4 * MIB + 80
    assert max(done) <= MIB


def test_a_truncated_file_stops_all_threads(tmp_path: Path) -> None:
    path = save(tmp_path / "f", {f"w{i}": weights("F32", MIB // 2, seed=i) for i in range(4)})
    source = open_source(path, "w", False)
    path.write_bytes(path.read_bytes()[: 3 * MIB])
    device = devices.load("cpu").open_device("cpu")
    with pytest.raises(Mismatch):
        measure(source.tensors, {"w": source}, device, threads=3, progress=lambda nbytes: None)
    source.close()
