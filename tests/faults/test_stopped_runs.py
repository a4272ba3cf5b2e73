"""Kills and signals at random moments, and short transfers, small enough for every run of the tests."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import faults
import kills
import pytest
import stages
from scenarios import Expected, Scenario
from warm import Warm

pytestmark = pytest.mark.alone


def test_killed_at_random_moments(scenario: Scenario, expected: Expected, warm: Warm) -> None:
    choose = random.Random(0)
    for _ in range(6):
        delay = choose.uniform(0, expected.seconds)
        assert kills.kill(scenario, expected, warm, delay)[1] == [], f"killed after {delay} s"


def test_asked_to_stop_at_random_moments(scenario: Scenario, expected: Expected, warm: Warm) -> None:
    choose = random.Random(0)
    for _ in range(10):
        stop = kills.random_stop(choose, expected.seconds)
        assert kills.ask(scenario, expected, warm, stop)[1] == [], str(stop)


def test_a_second_signal_in_the_clean_up(scenario: Scenario, expected: Expected, warm: Warm) -> None:
    half = expected.seconds / 2
    for pause in (0, 0.0005, 0.001, 0.002):
        stop = kills.Stop(((half, signal.SIGINT), (pause, signal.SIGINT)))
        assert kills.ask(scenario, expected, warm, stop)[1] == [], str(stop)


def test_short_transfers(scenario: Scenario, expected: Expected, warm: Warm) -> None:
    for seed in range(6):
        tried = replace(scenario, threads=1 + seed % 2 * 3)
        assert kills.shorten(tried, expected, warm, seed) == (True, []), f"seed {seed}"


def test_the_stage_is_taken_away(scenario: Scenario, expected: Expected, warm: Warm, log: Path) -> None:
    called = faults.targets(scenario, faults.count(scenario, warm, log))
    changing = [call for call in called if call[0] in stages.CALLS]
    choose, hits = random.Random(0), 0
    for way in stages.WAYS:
        for call in choose.sample(changing, 4):
            hit, found = stages.lose(scenario, expected, warm, log, call, way)
            assert found == [], f"{way} at {call}"
            hits += hit
    assert hits


def test_what_an_earlier_run_printed_is_gone(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is killed before its first instruction has printed nothing."""
    ended = warm.run(["inspect", "nothing"])
    assert len(ended.stderr.splitlines()) == 1
    monkeypatch.setattr(warm, "say", lambda line: None)
    monkeypatch.setattr(warm, "hear", lambda: str(os.getpid()))
    os.close(warm.hold(["--version"])._pidfd)
    assert warm.stderr.read_text() == ""


def test_a_run_that_does_not_end_hangs_whatever_others_have(warm: Warm) -> None:
    run = warm.hold(["--version"])
    run.send(signal.SIGSTOP)
    run.release()
    assert run.wait(0.3).hung


def test_a_run_that_ended_before_it_is_waited_for_has_ended(warm: Warm) -> None:
    run = warm.hold(["--version"])
    run.release()
    assert warm.has_answer(60)
    assert (run.wait(0.3).code, run._starved()) == (0, 0.0)
