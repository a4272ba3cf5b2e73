"""`noisytune study` end to end: a tiny task from the command line to the runs, stopped and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from noisytune_cli.cli import app

from .conftest import Tiny
from .tiny import SENTENCES


def study(tiny: Tiny, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*tiny.arguments, "-o", str(out), *arguments])


def done(tiny: Tiny, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a study that must succeed, and return the runs it recorded."""
    result = study(tiny, out, *arguments)
    assert result.exit_code == 0, result.output
    return lines(out)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def numbers(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run without the time it took."""
    return {key: value for key, value in run.items() if key != "seconds"}


def refused(tiny: Tiny, out: Path, code: int, *arguments: str) -> str:
    """Run a study that must fail with this code, and return what it says."""
    result = study(tiny, out, *arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two methods and two seeds."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done(tiny, out, "--seed", "0-1", "--lambda", "0.15")
    return out


def test_every_method_and_seed_is_a_run_that_has_learnt(finished: Path) -> None:
    runs = lines(finished)
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("plain", 0),
        ("noisytune", 0),
        ("plain", 1),
        ("noisytune", 1),
    ]
    rows = len(SENTENCES) * 4 // 5
    for run in runs:
        noisy = run["method"] == "noisytune"
        assert (run["lambda"], run["noise"], run["scope"]) == (
            (0.15, "uniform", "matrix") if noisy else (None, None, None)
        )
        assert run["init_seed"] == run["order_seed"] == run["noise_seed"] == run["seed"]
        assert run["train_rows"] + run["held_out_rows"] == rows
        assert run["held_out_rows"] == rows // 5
        assert run["steps"] == run["member_steps"] == run["forwards"] == 6 * -(-run["train_rows"] // 8)
        assert run["dev"]["accuracy"] > 0.7
        assert len(run["predictions"]) == run["dev_rows"] == len(SENTENCES[::5])
        # Biases begin at 0 in a random model, so there is nothing that a change could be relative to.
        assert set(run["drift"]) == {"head", "embeddings", "norm", "attention", "mlp"}
        for change in run["drift"].values():
            assert 0 <= change["norm_change"] <= change["change_norm"] * (1 + 1e-9)
            assert change["change_norm"] > 0
    assert runs[0]["loss"] != runs[1]["loss"] != runs[2]["loss"]


def test_the_score_is_that_of_the_stored_predictions(finished: Path) -> None:
    recorded = json.loads((finished / "study.json").read_text())
    assert recorded["label_names"] == ["0", "1"]
    assert recorded["dev_labels"] == [int(label) for _, label in SENTENCES[::5]]
    assert len(recorded["design"]) == 4
    for run in lines(finished):
        right = [a == b for a, b in zip(run["predictions"], recorded["dev_labels"], strict=True)]
        assert run["dev"]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_the_same_seed_gives_the_same_numbers(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    alone = done(tiny, tmp_path / "out", "--seed", "1", "--method", "noisytune")
    assert [numbers(run) for run in alone] == [numbers(lines(finished)[3])]


def test_processes_give_the_same_numbers(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    runs = done(tiny, tmp_path / "out", "--seed", "0-1", "--jobs", "2")
    assert sorted(map(str, map(numbers, runs))) == sorted(map(str, map(numbers, lines(finished))))


def test_seeds_are_varied_apart(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    varied = done(tiny, tmp_path / "out", "--seed", "0-1", "--init-seed", "0", "--order-seed", "0")
    plain = [run for run in varied if run["method"] == "plain"]
    noisy = [run for run in varied if run["method"] == "noisytune"]
    assert plain[0]["loss"] == plain[1]["loss"] == lines(finished)[0]["loss"]  # only the noise differs
    assert noisy[0]["loss"] == lines(finished)[1]["loss"] != noisy[1]["loss"]


def test_a_finished_study_is_not_done_again_and_may_grow(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = done(tiny, out, "--seed", "0", "--method", "plain")
    assert done(tiny, out, "--seed", "0", "--method", "plain") == first
    grown = done(tiny, out, "--seed", "0-1", "--lambda", "0.15")
    assert grown[0] == first[0]
    assert [run["key"] for run in grown] == [run["key"] for run in lines(finished)]
    assert len(json.loads((out / "study.json").read_text())["design"]) == 4


def test_a_killed_study_continues_where_it_stopped(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*tiny.arguments, "-o", str(out), "--seed", "0-1", "--lambda", "0.15"]
    process = subprocess.Popen(
        [sys.executable, "-m", "noisytune_cli", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        for _ in range(2400):
            if process.poll() is not None or ((out / "runs.jsonl").exists() and lines(out)):
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = (out / "runs.jsonl").read_bytes()
    assert kept.count(b"\n") >= 1
    with open(out / "runs.jsonl", "ab") as file:
        file.write(b'{"schema": 1, "key": "plain-1-')  # as if the kill had torn a line
    runs = done(tiny, out, "--seed", "0-1", "--lambda", "0.15")
    assert (out / "runs.jsonl").read_bytes().startswith(kept)
    assert [numbers(run) for run in runs] == [numbers(run) for run in lines(finished)]
