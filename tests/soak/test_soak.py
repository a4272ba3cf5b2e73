"""The turns of `make soak`, its journal, and the sums of that in the pages."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import soak

ROOT = Path(__file__).parents[2]


def sums() -> ModuleType:
    """docs/long_runs.py, as a module."""
    spec = importlib.util.spec_from_file_location("long_runs", ROOT / "docs" / "long_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


long_runs = sums()


def test_every_part_takes_turns_and_leaves_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[str] = []

    def kills(turn: object) -> Iterator[object]:
        turns.append("kills")
        yield soak.Outcome("kill", 10, 1, 1800.0, "what was wrong", 9)

    def once(turn: object) -> Iterator[object]:
        turns.append("once")
        yield soak.Outcome("fuzz header", 5, 0, 3600.0)

    def missing(turn: object) -> Iterator[object]:
        turns.append("missing")
        raise soak.Unavailable("there is no disk")
        yield

    parts = {"kills": (kills, 1, False), "once": (once, 1, True), "missing": (missing, 1, False)}
    monkeypatch.setattr(soak, "PARTS", parts)
    clock = iter(range(100))
    monkeypatch.setattr(soak.time, "monotonic", lambda: next(clock))
    assert soak.soak(6, tmp_path / "journal.jsonl", 7, list(parts), tmp_path) == turns.count("kills") > 1
    assert turns[:4] == ["kills", "once", "missing", "kills"]
    assert turns.count("once") == turns.count("missing") == 1
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["seed"]) for line in lines[:3]] == [
        ("kill", 7),
        ("fuzz header", 7),
        ("kill", 8),
    ]
    said = capsys.readouterr().out
    assert "what was wrong" in said
    assert "missing is left out: there is no disk" in said


def test_a_journal_is_added_up_by_kind(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    one = {"date": "2026-11-28", "commit": "a", "seed": 1, "part": "kills", "kind": "kill"}
    lines = [
        one | {"count": 1000, "broken": 0, "seconds": 1800, "hit": 900},
        one | {"count": 500, "broken": 1, "seconds": 1800, "hit": 450, "date": "2026-11-29"},
        one | {"count": 7, "broken": 0, "seconds": 36, "kind": "fuzz header"},
    ]
    journal.write_text("\n".join(map(json.dumps, lines)) + '\n{"date": "2026-1')
    records = long_runs.read([journal])
    assert "| random `kill -9` | 1,500 | 1,350 | 1 | 1.00 | 2026-11-28 to 2026-11-29 |" in long_runs.table(
        records, long_runs.RELIABILITY
    )
    assert "read to its end | 7 |  | 0 | 0.01 | 2026-11-28 |" in long_runs.table(records, long_runs.SECURITY)


def test_every_kind_has_a_name_in_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import run as faults_run

    monkeypatch.syspath_prepend(ROOT / "tests")
    from fuzz.targets import TARGETS

    assert {f"fuzz {target}" for target in TARGETS} == long_runs.SECURITY.keys()
    assert long_runs.RELIABILITY.keys() == {
        *faults_run.KINDS,
        "store fault",
        "lost turn",
        "random command",
        "kernel test under sanitizers",
    }
