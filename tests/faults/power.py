"""Power cuts: a run on an ext4 of its own, which loses whatever has not reached the device.

At a flush or a rename the run is stopped and the power cut; at a random moment it runs on, and finds a dead
file system. Then the disk is mounted again. Exit 0 means that the output survived; else there is the state
before, or what a kill may leave; and the next run repairs it.
"""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import strace
from invariants import breaches_after_a_power_cut, breaches_after_rerun
from mounts import Device
from scenarios import Expected, Scenario, left_overs, tree
from strace import Call
from warm import Warm

#: The calls between which the state on a disk differs.
CALLS = ("fsync", "rename", "renameat", "renameat2", "link")


def on(disk: Path, scenario: Scenario) -> Scenario:
    """Return the scenario with its place on the device that is mounted at `disk`."""
    return replace(scenario, place=disk / "place")


def moments(scenario: Scenario, calls: tuple[Call, ...]) -> list[tuple[str, int]]:
    """Return the calls of an undisturbed run after which the power can be cut."""
    return [(c.name, c.number) for c in calls if c.name in CALLS and str(scenario.place) in c.text]


def cut_after_the_end(disk: Scenario, expected: Expected, warm: Warm, device: Device) -> list[str]:
    """Cut the power once a run has ended; return what does not hold."""
    _prepare(disk, device)
    ended = warm.run(disk.argv)
    device.cut_power()
    _mount_again(device)
    found = [] if ended.code == 0 else [f"undisturbed, it ends with {ended.code}: {ended.stderr}"]
    if tree(disk.place) != expected.after:
        found.append("the output did not survive")
    if len(left_overs(disk.place)) > 1:
        found.append(f"it leaves {left_overs(disk.place)}")
    return found


def cut_at(
    disk: Scenario, expected: Expected, warm: Warm, log: Path, device: Device, moment: tuple[str, int]
) -> list[str]:
    """Cut the power while a run is stopped at a call; return what does not hold, the next run included."""
    _prepare(disk, device)
    name, number = moment
    run = warm.hold(disk.argv)
    tracer = strace.attach(run, log, [f"trace={','.join(CALLS)}", f"inject={name}:signal=STOP:when={number}"])
    run.release()
    while "--- stopped by SIGSTOP ---" not in log.read_text(errors="replace"):
        assert not warm.has_answer(0.002), run.wait().stderr
    device.cut_power()
    run.send(signal.SIGCONT)
    ended = run.wait()
    tracer.communicate()
    _mount_again(device)
    return _found(disk, expected, warm, ended.code)


def cut_after(
    disk: Scenario, expected: Expected, warm: Warm, device: Device, delay: float
) -> tuple[bool, list[str]]:
    """Cut the power at a moment of a run; return whether it still ran, and what does not hold."""
    _prepare(disk, device)
    run = warm.hold(disk.argv)
    run.release()
    time.sleep(delay)
    hit = not warm.has_answer(0)
    device.cut_power()
    ended = run.wait()
    _mount_again(device)
    return hit, _found(disk, expected, warm, ended.code)


def _prepare(disk: Scenario, device: Device) -> None:
    """Make the place as it is before a run, and have that on the device."""
    disk.reset()
    device.flush()


def _mount_again(device: Device) -> None:
    device.unmount()
    device.mount()


def _found(disk: Scenario, expected: Expected, warm: Warm, code: int) -> list[str]:
    return breaches_after_a_power_cut(disk, expected, code) + breaches_after_rerun(disk, expected, warm)
