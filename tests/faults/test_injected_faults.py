"""A sample of the injected faults, and the order of flushes, small enough for every run of the tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import faults
import pytest
import strace
from durability import unordered
from invariants import Fault
from scenarios import Expected, Scenario
from warm import Warm

pytestmark = pytest.mark.alone

FILE_SYSTEMS = {"renameat2": (), "no renameat2": faults.WITHOUT_RENAMEAT2}
_CHANGING = {"fsync", "write", "pwrite64", "renameat2", "rename", "link", "mkdir", "openat"}
_SAMPLE = 3


@pytest.fixture(params=FILE_SYSTEMS)
def always(request: pytest.FixtureRequest) -> Sequence[str]:
    return FILE_SYSTEMS[request.param]


def test_everything_is_flushed_in_order(
    scenario: Scenario, always: Sequence[str], warm: Warm, log: Path
) -> None:
    assert unordered(scenario, faults.count(scenario, warm, log, always)) == []


def test_promises_hold_after_a_fault(
    scenario: Scenario, expected: Expected, always: Sequence[str], warm: Warm, log: Path
) -> None:
    targets = faults.targets(scenario, faults.count(scenario, warm, log, always))
    flushes = [n for name, n in targets if name == "fsync"]
    chosen = [Fault("fsync", n, "EIO") for n in flushes[-2:]]
    chosen += [Fault("renameat2", n, "KILL") for name, n in targets if name == "renameat2"]
    changing = [target for target in targets if target[0] in _CHANGING]
    choose = random.Random(0)
    chosen += [Fault(*target, "KILL") for target in choose.sample(changing, _SAMPLE)]
    chosen += choose.sample([fault for target in targets for fault in faults.faults_of(*target)], _SAMPLE)
    for fault in chosen:
        result = faults.try_fault(scenario, expected, warm, log, fault, always)
        assert not result.breaches, fault


def test_a_failed_flush_is_never_published(
    scenario: Scenario, expected: Expected, warm: Warm, log: Path
) -> None:
    result = faults.try_fault(scenario, expected, warm, log, Fault("fsync", 1, "EIO"))
    assert (result.injected, result.code) == (1, 6)


def test_what_appears_at_the_last_moment_is_not_replaced(
    all_scenarios: dict[str, Scenario], warm: Warm, log: Path
) -> None:
    scenario = all_scenarios["file"]
    scenario.reset()
    run = warm.hold(scenario.argv)
    calls = "rename,renameat,renameat2,link"
    tracer = strace.attach(run, log, [f"trace={calls}", f"inject={calls}:delay_enter=1500000:when=1"])
    run.release()
    staged = f"{scenario.out}.noisytune.json"
    while not list(scenario.place.glob(f".noisytune-*/{staged}")):
        if warm.has_answer(0.005):
            break
    else:
        (scenario.place / scenario.out).write_bytes(b"somebody else's")
    ended = run.wait()
    tracer.communicate()
    assert ended.code == 5, ended.stderr
    assert {path.name: path.read_bytes() for path in scenario.place.iterdir()} == {
        scenario.out: b"somebody else's"
    }
