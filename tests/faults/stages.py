"""The staging directory taken away while a run stands still at a system call: removed, moved, or replaced.

Nothing of that is the run's own doing, and not all of it can be undone. What must hold: exit 0 means that the
output is whole; else there is one line, and the state before, or what a kill may leave. What was put in the
stage's place is kept. Once two outputs have exchanged their names, the stage holds the old one: taking that
away takes the way back.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import strace
from invariants import files, is_sound
from scenarios import JOB, LEFT_OVER, Expected, Scenario, tree
from warm import Warm

#: The calls between which a stage differs.
CALLS = (
    *("mkdir", "openat", "pwrite64", "write", "fallocate", "fsync", "fchmod", "flock", "unlink", "rmdir"),
    *("rename", "renameat2", "link", "newfstatat", "close"),
)

_FOREIGN, _PRECIOUS = "precious", b"somebody else's"


def remove(stage: Path) -> None:
    """Remove it with all that is in it."""
    shutil.rmtree(stage)


def move(stage: Path) -> None:
    """Move it out of the place."""
    stage.rename(_elsewhere(stage))


def replace(stage: Path) -> None:
    """Move it away, and put another directory of its name there."""
    move(stage)
    stage.mkdir()
    (stage / _FOREIGN).write_bytes(_PRECIOUS)


WAYS: dict[str, Callable[[Path], None]] = {"removed": remove, "moved": move, "replaced": replace}


def lose(
    scenario: Scenario, expected: Expected, warm: Warm, log: Path, call: tuple[str, int], way: str
) -> tuple[bool, list[str]]:
    """Take the stage away before a call; return whether there was one then, and what does not hold."""
    scenario.reset()
    name, number = call
    run = warm.hold(scenario.argv)
    tracer = strace.attach(run, log, [f"trace={name}", f"inject={name}:signal=STOP:when={number}"])
    run.release()
    while "--- stopped by SIGSTOP ---" not in log.read_text(errors="replace"):
        if warm.has_answer(0.002):
            run.wait()
            tracer.communicate()
            return False, []
    stages = [p for p in scenario.place.rglob(f"{LEFT_OVER}*") if p.is_dir() and JOB not in str(p)]
    for stage in stages:
        WAYS[way](stage)
    # Calls are counted in each thread apart: another may stop at its own.
    until = time.monotonic() + 10
    while not warm.has_answer(0.02) and time.monotonic() < until:
        run.send(signal.SIGCONT)
    ended = run.wait()
    tracer.communicate()
    found = []
    if tree(scenario.source.parent, mtime=True) != expected.source:
        found.append("the source changed")
    state = {name: what for name, what in files(tree(scenario.place)).items() if Path(name).name != _FOREIGN}
    taken = bool(files(expected.before)) and not state
    sound = state == files(expected.after) if ended.code == 0 else is_sound(scenario, expected, state)
    if not (sound or (taken and ended.code)):
        found.append(f"exit {ended.code}, and left {sorted(state)}")
    if ended.code not in (0, 5, 6) or (ended.code and len(ended.stderr.splitlines()) != 1):
        found.append(f"exit {ended.code}: {ended.stderr.strip()}")
    kept = [path.read_bytes() for path in scenario.place.rglob(_FOREIGN)]
    if way == "replaced" and kept != [_PRECIOUS] * len(stages):
        found.append("what was put there is gone")
    for stage in stages:
        shutil.rmtree(_elsewhere(stage), ignore_errors=True)
    return bool(stages), found


def _elsewhere(stage: Path) -> Path:
    """Return a path on the same file system, outside every place."""
    sandbox = next(parent.parent for parent in stage.parents if parent.name == "places")
    return sandbox / f"elsewhere-{stage.name}"
