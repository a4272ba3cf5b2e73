"""The study's folder: what the study is (study.json), and a line for every finished run (runs.jsonl).

A line is on the disk before the next run begins, so whatever stops a study costs at most the runs in
progress. A last line without its end was being written then, and is dropped. While a study is at work it
holds a lock, and a folder belongs to one study: settings that change the numbers may not change in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from noisytune_cli.errors import InputInvalid, OutputUnsafe, unreadable, unwritable
from noisytune_cli.output.staging import sync_directory
from noisytune_cli.study.settings import LATER, completed

STUDY = "study.json"
RUNS = "runs.jsonl"


class Journal:
    """The open folder of one study; `study` is its record, `runs` the finished runs' by key."""

    def __init__(self, folder: Path, study: Mapping[str, Any], *, grow: bool = True) -> None:
        """Open or make the folder for `study`, whose "settings" must be those it was begun with.

        Its "design" may grow: what is asked for now is added to what was, in the file only if `grow`. Raises
        OutputUnsafe where the folder is another study's, in use or not a study's; InputInvalid where its
        files are damaged.
        """
        self.folder = folder
        self.runs: dict[str, dict[str, Any]] = {}
        _make(folder)
        try:
            self._file = open(folder / RUNS, "ab+")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise unwritable(error, folder / RUNS) from error
        try:
            self._lock()
            self._read_runs()
            self.study = self._settle(study, grow)
        except BaseException:
            self._file.close()
            raise

    def add(self, run: Mapping[str, Any]) -> None:
        """Record a finished run, durably; ResourceExhausted where the disk refuses."""
        line = json.dumps(run, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(error, self.folder / RUNS) from error
        self.runs[run["key"]] = dict(run)

    def close(self) -> None:
        """Let go of the folder (twice is fine)."""
        with contextlib.suppress(OSError):  # every line was flushed when it was added
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputUnsafe(
                "the study's folder is in use",
                path=self.folder,
                why="another process is at work on this study",
                next_step="Wait for it to end, or choose another folder with -o",
            ) from None
        except OSError as error:
            raise unwritable(error, self.folder / RUNS) from error

    def _read_runs(self) -> None:
        """Read the finished runs, and cut off a last line that was never finished."""
        path = self.folder / RUNS
        try:
            self._file.seek(0)
            data = self._file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                self._file.truncate(whole)
        except OSError as error:
            raise unreadable(error, path) from error
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                run = json.loads(line)
                self.runs[run["key"]] = run
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputInvalid(
                    "cannot continue the study",
                    path=path,
                    why=f"line {number} is not the record of a run",
                    next_step="Remove the line, so that its run is done again",
                ) from None

    def _settle(self, study: Mapping[str, Any], grow: bool) -> dict[str, Any]:
        """Write study.json, or compare it with what is asked for and add to its design."""
        path = self.folder / STUDY
        settled = dict(study)
        if path.exists():
            known = _read_study(path)
            begun, asked = completed(known["settings"]), completed(study["settings"])
            later = {name for name in LATER if name not in begun}
            _check_same(begun, {k: v for k, v in asked.items() if k not in later}, self.folder)
            planned = {run["key"]: run for run in (*known["design"], *study["design"])}
            # Machine and versions stay those that the first runs were made with. What a folder lacks that was
            # passed on without it, such as the rows' labels, follows from what is the same.
            settled = {**study, **known, "design": list(planned.values())}
            if settled == known or not grow:
                return settled
        elif self.runs:
            raise OutputUnsafe(
                "cannot continue the study",
                path=self.folder,
                why=f"{RUNS} is there without {STUDY}, so nobody can tell what its runs are",
                next_step="Choose another folder with -o",
            )
        write_durably(path, json.dumps(settled, indent=1, ensure_ascii=False).encode() + b"\n")
        return settled


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file beside its place, flush it, and rename it into place."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with open(staged, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise unwritable(error, path) from error


def _make(folder: Path) -> None:
    """Make the study's folder; OutputUnsafe where something else is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in os.scandir(folder)}
        sync_directory(folder.parent)
    except FileExistsError:
        raise OutputUnsafe(
            "cannot write the study",
            path=folder,
            why="a file of that name is there",
            next_step="Choose another folder with -o",
        ) from None
    except OSError as error:
        raise unwritable(error, folder) from error
    if names and not names & {STUDY, RUNS}:
        raise _others(folder)


def check_together(folder: Path) -> None:
    """Raise OutputUnsafe for a folder in which the studies of several tasks cannot lie."""
    if (folder / STUDY).exists():
        raise OutputUnsafe(
            "cannot write the studies",
            path=folder,
            why="it is itself the study of one task",
            next_step="Choose another folder with -o",
        )
    try:
        inside = list(folder.iterdir()) if folder.is_dir() else []
        if inside and not any((place / name).exists() for place in inside for name in (STUDY, RUNS)):
            raise _others(folder)
    except OSError as error:
        raise unreadable(error, folder) from error


def _others(folder: Path) -> OutputUnsafe:
    return OutputUnsafe(
        "cannot write the study",
        path=folder,
        why="the folder holds other files and no study",
        next_step="Choose an empty or a new folder with -o",
    )


def _read_study(path: Path) -> dict[str, Any]:
    try:
        study = json.loads(path.read_bytes())
        if not (isinstance(study["settings"], dict) and isinstance(study["design"], list)):
            raise TypeError
        return dict(study)
    except OSError as error:
        raise unreadable(error, path) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputInvalid(
            "cannot continue the study",
            path=path,
            why="it is not a study's record",
            next_step="Choose another folder with -o",
        ) from None


def _check_same(known: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    """Raise OutputUnsafe where a setting differs from the one that the study was begun with."""
    for name in sorted({*known, *asked}):
        # A setting that an earlier version did not know was off.
        if (known.get(name) or None) != (asked.get(name) or None):
            raise OutputUnsafe(
                "the folder holds another study",
                path=folder,
                why=f"its {name} is {_brief(known.get(name))}, now {_brief(asked.get(name))} is asked for",
                next_step="Give the same settings to continue it, or another folder with -o",
            )


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
