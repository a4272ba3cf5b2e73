"""The study's folder: durable lines, a torn last one, one study a folder, one process at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from noisytune_cli.errors import InputInvalid, NoisytuneError, OutputUnsafe, ResourceExhausted
from noisytune_cli.study.journal import Journal


def kept(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a study's folder holds: study.json, and the whole lines of runs.jsonl."""
    lines = (folder / "runs.jsonl").read_bytes().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return json.loads((folder / "study.json").read_text()), whole


def study(*keys: str, **settings: Any) -> dict[str, Any]:
    return {"schema": 1, "settings": {"epochs": 3, **settings}, "design": [{"key": key} for key in keys]}


def refusal(kind: type[NoisytuneError], folder: Path, document: dict[str, Any]) -> str:
    with pytest.raises(kind) as caught, Journal(folder, document):
        pass
    return caught.value.line()


def test_a_run_is_on_the_disk_before_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path / "out", study("a", "b")) as journal:
        synced: list[bytes] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            synced.append((tmp_path / "out" / "runs.jsonl").read_bytes())

        monkeypatch.setattr(os, "fsync", fsync)
        journal.add({"key": "a", "dev": {"accuracy": 0.1}})
        assert synced == [b'{"key": "a", "dev": {"accuracy": 0.1}}\n']
    assert kept(tmp_path / "out") == (study("a", "b"), [{"key": "a", "dev": {"accuracy": 0.1}}])


def test_a_torn_last_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    with Journal(tmp_path, study("a", "b")) as journal:
        journal.add({"key": "a"})
    with open(tmp_path / "runs.jsonl", "ab") as file:
        file.write(b'{"key": "b", "dev')
    assert [run["key"] for run in kept(tmp_path)[1]] == ["a"]
    with Journal(tmp_path, study("a", "b")) as journal:
        assert list(journal.runs) == ["a"]
        journal.add({"key": "b"})
    assert (tmp_path / "runs.jsonl").read_bytes() == b'{"key": "a"}\n{"key": "b"}\n'


def test_labels_that_were_not_passed_on_are_there_again(tmp_path: Path) -> None:
    whole = {**study("a", "b"), "dev_labels": [0, 1], "machine": {"cpus": 2}}
    with Journal(tmp_path, whole):
        pass
    (tmp_path / "study.json").write_text(json.dumps({**study("a"), "machine": {"cpus": 2}}))
    with Journal(tmp_path, {**whole, "machine": {"cpus": 64}}) as journal:
        assert journal.study == whole
    assert kept(tmp_path)[0] == whole


def test_the_design_may_grow_and_what_was_first_recorded_stays(tmp_path: Path) -> None:
    with Journal(tmp_path, {**study("a"), "machine": "first"}):
        pass
    with Journal(tmp_path, {**study("b", "a"), "machine": "second"}) as journal:
        assert journal.study == {**study("a", "b"), "machine": "first"}
    assert kept(tmp_path)[0] == {**study("a", "b"), "machine": "first"}


def test_rows_may_lie_under_another_name(tmp_path: Path) -> None:
    with Journal(tmp_path, study("a", task="train")):
        pass
    with Journal(tmp_path, study("b", task="train_v2")) as journal:
        assert journal.study == study("a", "b", task="train")


def test_what_is_only_looked_at_is_not_planned(tmp_path: Path) -> None:
    with Journal(tmp_path, study("a")):
        pass
    before = (tmp_path / "study.json").read_bytes()
    with Journal(tmp_path, study("b"), grow=False) as journal:
        assert journal.study == study("a", "b")
    assert (tmp_path / "study.json").read_bytes() == before


def test_another_study_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    with Journal(tmp_path, study("a")):
        pass
    before = (tmp_path / "study.json").read_bytes()
    said = refusal(OutputUnsafe, tmp_path, study("a", epochs=5))
    assert "its epochs is 3, now 5 is asked for" in said
    assert (tmp_path / "study.json").read_bytes() == before


def test_a_setting_that_is_new_and_off_is_no_other_study(tmp_path: Path) -> None:
    with Journal(tmp_path, study("a")):
        pass
    with Journal(tmp_path, study("a", new=False)):
        pass
    assert "its new is null, now true" in refusal(OutputUnsafe, tmp_path, study("a", new=True))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, study("a")):
        assert "another process is at work" in refusal(OutputUnsafe, tmp_path, study("a"))
    with Journal(tmp_path, study("a")):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "no study" in refusal(OutputUnsafe, tmp_path, study("a"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    assert "a file of that name" in refusal(OutputUnsafe, tmp_path / "thesis.tex", study("a"))


def test_runs_without_a_study_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\n')
    assert "without study.json" in refusal(OutputUnsafe, tmp_path, study("a"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}}', "[" * 100_000])
def test_a_damaged_study_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    assert "not a study's record" in refusal(InputInvalid, tmp_path, study("a"))


@pytest.mark.parametrize("line", ["{", "[]", "{}", "1", "\xff"])
def test_a_damaged_line_that_is_not_the_last_is_refused(tmp_path: Path, line: str) -> None:
    with Journal(tmp_path, study("a")):
        pass
    (tmp_path / "runs.jsonl").write_text(f'{{"key": "a"}}\n{line}\n{{"key": "b"}}\n')
    assert "line 2 is not the record of a run" in refusal(InputInvalid, tmp_path, study("a"))


def test_a_full_disk_is_said_and_earlier_runs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path, study("a", "b")) as journal:
        journal.add({"key": "a"})

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceExhausted, match="No space left"):
            journal.add({"key": "b"})
        assert list(journal.runs) == ["a"]


def test_what_is_not_a_number_is_never_written(tmp_path: Path) -> None:
    with Journal(tmp_path, study("a")) as journal, pytest.raises(ValueError, match="JSON"):
        journal.add({"key": "a", "loss": float("nan")})
    assert (tmp_path / "runs.jsonl").read_bytes() == b""
    json.loads((tmp_path / "study.json").read_text())
