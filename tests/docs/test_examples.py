"""The examples, each run as a reader would run it."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import noisytune_cli

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, Path], str]:
    """Run an example in Python as a program with one argument, and return what it prints."""

    def run(name: str, argument: Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, str(argument)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_named_and_run() -> None:
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    named = set(re.findall(r"\]\((.+?)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert there == named
    assert all(f'"{name}"' in Path(__file__).read_text(encoding="utf-8") for name in there)


def test_finetuning_from_a_noisy_folder(ran: Callable[[str, Path], str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    told = ran("finetune.py", tmp_path / "made")
    assert "epoch 4" in told
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", told)]
    assert losses[-1] < losses[0]
    assert noisytune_cli.verify(tmp_path / "made/noisy", base=tmp_path / "made/pretrained").ok
    assert (tmp_path / "made/finetuned/model.safetensors").exists()


def test_the_opinions_are_two_hundred_and_of_two_kinds(
    ran: Callable[[str, Path], str], tmp_path: Path
) -> None:
    ran("opinions.py", tmp_path / "opinions")
    rows = []
    for name, count in (("train", 140), ("dev", 60)):
        with open(tmp_path / f"opinions/{name}.csv", encoding="utf-8", newline="") as file:
            header, *some = csv.reader(file)
        assert (header, len(some)) == (["text", "label"], count)
        # Neither label wins by being more common.
        assert 0.4 < sum(label == "yes" for _, label in some) / count < 0.6
        rows += some
    assert len({text for text, _ in rows}) == 200


def test_a_population_climbs(ran: Callable[[str, Path], str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    told = ran("evolution.py", tmp_path / "steps.jsonl")
    scores = [float(number) for number in re.findall(r": (-[\d.]+)$", told, re.MULTILINE)]
    assert len(scores) == 9
    assert scores[-1] > scores[0]
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 128


def test_a_sweep_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("noisytune", " -m noisytune_cli"), ("python3", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    (tmp_path / "made").mkdir()

    def sweep() -> str:
        command = ["sh", str(EXAMPLES / "sweep.sh"), str(tmp_path / "made")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = sweep()
    assert told.splitlines() == [f"runs/l{lam}-s{n} {lam} {n}" for lam in (0.05, 0.15) for n in range(3)]
    weights = sorted((tmp_path / "made/runs").glob("*/model.safetensors"))
    times = [path.stat().st_mtime_ns for path in weights]
    assert sweep() == told
    assert [path.stat().st_mtime_ns for path in weights] == times


def test_the_notebook_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "statistics.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        assert cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # a change of the code alone shows in a diff
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    told = capsys.readouterr().out
    assert told.count("like λ 0.1") == 8
    assert names["done"].manifest_path.exists()
    assert all(len(axes.patches) >= 4 for axes in names["figure"].axes)
    names["plt"].close("all")
