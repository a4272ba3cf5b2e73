"""Runs stopped at random moments, by SIGKILL and by the signals that ask; and runs with short transfers.

A killed run leaves the old state or the new one and at most one left-over, and the next run repairs that.
SIGINT, SIGTERM and SIGHUP end a run within two seconds with 130, 143 or 129 and leave nothing; a second one
during the clean-up changes none of it. A signal that comes after the last step finds exit 0. A read or a
write that moves less than it was asked to is no fault at all: the run goes on from there.
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass

from invariants import Fault, breaches, breaches_after_rerun, files, is_sound
from scenarios import Expected, Scenario, left_overs, tree
from strace import Call
from warm import Ended, Warm

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds in which a run that was asked to stop has to end.
_PATIENCE = 2.0


@dataclass(frozen=True)
class Stop:
    """Which signals to send, and how many seconds after the start, or after the one before."""

    signals: tuple[tuple[float, signal.Signals], ...]

    def __str__(self) -> str:
        return ", ".join(f"{signum.name} after {delay * 1e3:.1f} ms" for delay, signum in self.signals)


def random_stop(choose: random.Random, seconds: float) -> Stop:
    """Choose a signal that asks, at any moment of a run; every third time a second one follows at once."""
    stops = [(choose.uniform(0, seconds), choose.choice(ASKING))]
    if choose.random() < 1 / 3:
        stops.append((choose.uniform(0, 0.004), choose.choice(ASKING)))
    return Stop(tuple(stops))


def kill(scenario: Scenario, expected: Expected, warm: Warm, delay: float) -> tuple[bool, list[str]]:
    """Kill a run after `delay` seconds and run again; return whether it was still there, and the breaches."""
    scenario.reset()
    run = warm.hold(scenario.argv)
    run.release()
    time.sleep(delay)
    run.send(signal.SIGKILL)
    ended = run.wait()
    hit = ended.code == -signal.SIGKILL
    killed = [Call(run.pid, "kill", 1, str(scenario.place))] if hit else []
    found = breaches(scenario, expected, Fault("kill", 1, "KILL"), ended, killed)
    return hit, found or breaches_after_rerun(scenario, expected, warm)


def shorten(scenario: Scenario, expected: Expected, warm: Warm, seed: int) -> tuple[bool, list[str]]:
    """Let half of a run's transfers move less than asked; return whether any did, and the breaches."""
    scenario.reset()
    run = warm.hold(scenario.argv, short=seed)
    run.release()
    ended = run.wait()
    hit = int(warm.shortened.read_text()) > 0
    return hit, breaches(scenario, expected, Fault("transfer", 1, "SHORT"), ended, [])


def ask(scenario: Scenario, expected: Expected, warm: Warm, stop: Stop) -> tuple[bool, list[str]]:
    """Ask a run to stop; return whether it did (it may have been done), and the breaches."""
    scenario.reset()
    run = warm.hold(scenario.argv)
    run.release()
    for delay, signum in stop.signals:
        time.sleep(delay)
        run.send(signum)
    ended = run.wait(_PATIENCE)
    if ended.hung:
        return True, ["it does not end within two seconds"]
    if _is_pythons(stop, ended) and tree(scenario.place) == expected.before:
        return False, []
    codes = {128 + signum for _, signum in stop.signals}
    found = _of_a_stop(scenario, expected, ended.code, codes)
    if len(ended.stderr.splitlines()) > 1 or "Traceback" in ended.stderr:
        found.append(f"stderr: {ended.stderr.strip()}")
    return ended.code != 0, found


def _is_pythons(stop: Stop, ended: Ended) -> bool:
    """Tell whether the signal came before noisytune had set its handlers, and took Python's own way."""
    return -ended.code in [signum for _, signum in stop.signals] or ended.stderr.endswith(
        "KeyboardInterrupt\n"
    )


def _of_a_stop(scenario: Scenario, expected: Expected, code: int, codes: set[int]) -> list[str]:
    state = tree(scenario.place)
    found = []
    if code == 0 or (code in codes and state == expected.after):
        if state != expected.after:
            found.append("exit 0, but the output is not whole")
    elif state != expected.before and (
        scenario.outputs == 1 or not is_sound(scenario, expected, files(state))
    ):
        found.append(f"exit {code}, but something is there: {sorted(state)}")
    if code not in {0, *codes}:
        found.append(f"exit {code}, not one of {sorted(codes)}")
    if left_overs(scenario.place):
        found.append(f"it leaves {left_overs(scenario.place)}")
    if tree(scenario.source.parent, mtime=True) != expected.source:
        found.append("the source changed")
    return found
