"""What measures still starts, and what needs a GPU does its work without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_starts_and_says_what_it_does(script: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: " + script in done.stdout


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    # Here Triton's interpreter would answer, which takes minutes.
    monkeypatch.setattr(gpu.cuda, "adds_exactly", lambda *kind: False)
    return gpu


@pytest.mark.filterwarnings("ignore:.*left more than half")  # small noise in BF16
def test_the_bits_of_every_kind_of_noise_are_compared(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.check_bits("cpu")
    assert (len(found["same"]), found["different"]) == (4 * len(gpu._KINDS), [])
    right = gpu.perturb_

    def wrong(tensors: Any, **options: Any) -> Any:
        record = right(tensors, **options)
        tensors["odd"][0] += 1
        return record

    monkeypatch.setattr(gpu, "perturb_", wrong)
    assert gpu.check_bits("cpu")["same"] == []


def test_the_table_has_a_row_for_each_contender(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "shapes", lambda layers: [("a.weight", (64, 32)), ("b.weight", (9, 4))])
    raced = gpu.race("cpu", 0, 0.0)
    assert raced["rounds"] == 3
    assert raced["bytes"] == 2 * (64 * 32 + 9 * 4)
    found = {"device": "a GPU", "torch": "2", "triton": "3", "model": raced}
    found |= {"bits": {"same": ["x"], "different": [], "not fused": []}, "tests": {"said": "7 passed"}}
    found |= {"file": {"gib": 2.0, "seconds": {"cpu": 2.0, "device": 1.0}, "same bytes": False}}
    text = gpu.table(found)
    assert all(f"| {name} | " in text for name in raced["contenders"])
    assert "1 of 1 kinds" in text
    assert "2 GiB: 1.00 s, on the CPU 2.00 s, OTHER BYTES" in text


def test_what_pytest_says_is_kept(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace(returncode=1, stdout="FAILED a\n== 1 failed, 2 passed in 3 s ==\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **options: said)
    found = gpu.run_tests(1.0)
    assert (found["passed"], found["said"]) == (False, "1 failed, 2 passed in 3 s")
    assert "FAILED a" in found["output"]
