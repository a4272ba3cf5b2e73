"""Publishing while a system call fails, or the process is killed, at every step in turn."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from publications import KINDS, Kind, files, refuse, snapshot

from noisytune_cli.checkpoint.formats import _system as system
from noisytune_cli.errors import ResourceExhausted
from noisytune_cli.output import renames, staging


def eio() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@dataclass
class Fault:
    """At the `step`-th system call that can fail something happens: by default, it fails."""

    step: int
    action: Callable[[], None] = eio
    calls: int = 0

    def wrap(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            self.calls += 1
            if self.calls == self.step:
                self.action()
            return real(*arguments, **keywords)

        return call

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "rename", "link", "mkdir"):
                patch.setattr(os, name, self.wrap(getattr(os, name)))
            for name in ("rename_without_replacing", "exchange"):
                patch.setattr(system, name, self.wrap(getattr(system, name)))
            yield


def test_a_failure_at_any_step_changes_nothing(
    kind: Kind, file_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for step in count(1):
        root = tmp_path / str(step)
        kind.prepare(root)
        before = snapshot(root)
        fault = Fault(step)
        with fault.installed():
            why = failure(lambda root=root: kind.publish(root))
        if why is None:  # making a folder that is there already may fail
            assert files(root) == kind.after, f"call {step}"
        else:
            assert "nothing was published" in why
            assert snapshot(root) == before, f"call {step}"
        if fault.calls < step:
            break
    assert step > 5


def failure(publish: Callable[[], object]) -> str | None:
    """Publish, and return the error's line if a resource gave out."""
    try:
        publish()
    except ResourceExhausted as error:
        return str(error)
    return None


def kill_at_any_step(root: Path, flags: bool) -> None:
    """Kill runs of every kind at every step; what is left, and what a second run makes, must be whole."""
    os.fsync = lambda fd: None  # what a kill leaves does not depend on it, and it takes its time
    if not flags:
        system.rename_without_replacing = system.exchange = refuse
    for number, (name, kind) in enumerate(KINDS.items()):
        for step in count(1):
            place = root / f"{number}-{step}"
            kind.prepare(place)
            child = os.fork()
            if child == 0:
                with Fault(step, action=lambda: os._exit(9)).installed():
                    kind.publish(place)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            left = files(place)
            manifest = next(n for n in kind.after if n.endswith("noisytune.json"))
            if left.get(manifest) == b"manifest":
                assert left.items() >= kind.after.items(), f"{name}, call {step}: complete, it says"
            elif not kind.directory and not kind.overwrite and kind.output in left:
                assert left[kind.output] == b"weights", f"{name}, call {step}: unverified, but whole"
            else:
                kind.publish(place)
                assert files(place) == kind.after, f"{name}, call {step}: run again"
            if status == 0:
                break


@pytest.mark.parametrize("flags", [True, False], ids=["renameat2", "no flags"])
def test_a_run_killed_at_any_step_can_be_repeated(flags: bool, tmp_path: Path) -> None:
    # In a process of its own, which has one thread and so may fork.
    script = (
        "import pathlib, sys, test_publish_faults as test\n"
        f"test.kill_at_any_step(pathlib.Path(sys.argv[1]), {flags})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_everything_is_flushed_before_success(
    kind: Kind, file_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    flushed: dict[int, int] = {}  # inode -> how many names had been made when it was last flushed
    renames = 0
    fsync = os.fsync

    def flush(fd: int) -> None:
        flushed[os.fstat(fd).st_ino] = renames
        fsync(fd)

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal renames
            real(*arguments)
            renames += 1

        return call

    monkeypatch.setattr(os, "fsync", flush)
    for module, name in (
        *((os, name) for name in ("rename", "link")),
        *((system, name) for name in ("rename_without_replacing", "exchange")),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    kind.publish(root)
    place = root / kind.output if kind.empty and not kind.overwrite else root
    for name in kind.after:
        if name not in kind.before or kind.before[name] != kind.after[name]:
            assert flushed[(root / name).stat().st_ino] == 0, f"{name} was renamed before it was flushed"
            for folder in (root / name).parents:
                if folder.is_relative_to(place):
                    assert folder.stat().st_ino in flushed, f"{folder} was not flushed"
    last = place if place != root else (root / kind.output).parent
    assert flushed[last.stat().st_ino] == renames > 0, "the last name is not durable"


def test_an_old_folder_that_another_run_cleared_away_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "exchange", refuse)
    new, output = tmp_path / ".noisytune-x", tmp_path / "out"
    for folder in (new, output):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename = os.rename

    def cleared(source: Path, target: Path) -> None:
        rename(source, target)
        if target == output:
            shutil.rmtree(tmp_path / (new.name + staging.ASIDE))

    monkeypatch.setattr(os, "rename", cleared)
    renames.swap(new, output)
    assert (output / "name").read_text() == new.name
    assert os.listdir(tmp_path) == ["out"]
