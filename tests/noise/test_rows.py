"""Rows of calls: every row once, by any number of threads, and what happens when one fails."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from noisytune_cli.noise.devices.cpu import rows
from noisytune_cli.noise.devices.cpu.rows import Rows, work_through


class Called:
    """A kernel in Python that notes the rows it is given, and may fail."""

    def __init__(self, fails: bool = False) -> None:
        self.rows: list[int] = []
        self.threads: set[int] = set()
        self.fails = fails
        self.before: Callable[[], object] = list
        self._taking = threading.Lock()

    def __call__(self, rows: np.ndarray, following: np.ndarray, most: int) -> None:
        self.before()
        for _ in range(most):
            with self._taking:
                at = int(following[0])
                following[0] += 1
            if at >= len(rows):
                return
            self.rows.append(int(rows[at]))
            self.threads.add(threading.get_ident())
            if self.fails:
                raise RuntimeError("a kernel failed")


def group(called: Called, count: int) -> Rows:
    return Rows(called, 2**62 + np.arange(count))


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 16, 100])
def test_every_row_is_called_once(count: int, threads: int) -> None:
    called = Called()
    work_through([group(called, count)], threads)
    assert sorted(called.rows) == [2**62 + i for i in range(count)]


def test_groups_are_worked_through_one_after_the_other() -> None:
    first, second = Called(), Called()
    work_through([group(first, 40), group(second, 3)], 1)
    assert (len(first.rows), len(second.rows)) == (40, 3)
    assert first.threads == second.threads == {threading.get_ident()}


def test_no_more_threads_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread)
    )
    work_through([group(Called(), 3)], 8)
    assert len(started) == 2


def test_a_kernel_that_fails_in_one_thread_stops_the_others() -> None:
    failing, other, caller = Called(fails=True), Called(), threading.get_ident()
    stopped = threading.Event()

    class Watched(Rows):
        def stop(self) -> None:
            super().stop()
            stopped.set()

    def wait_as_caller() -> None:
        if threading.get_ident() == caller:
            stopped.wait(10)

    failing.before = other.before = wait_as_caller
    with pytest.raises(RuntimeError, match="a kernel failed"):
        work_through([Rows(failing, np.arange(1)), Watched(other, np.arange(1000))], 2)
    assert len(failing.rows) == 1
    assert failing.threads != {caller}
    assert other.rows == []


def test_an_interrupt_gets_in_between_two_batches_of_rows() -> None:
    called, most = Called(), 2 * rows._AT_A_TIME

    def interrupt() -> None:
        if len(called.rows) >= most:
            raise KeyboardInterrupt

    called.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        work_through([group(called, 1000)], 1)
    assert len(called.rows) == most


def test_an_interrupt_stops_the_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    called, caller = Called(), threading.get_ident()
    interrupted = threading.Event()

    def before() -> None:
        if threading.get_ident() == caller:
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(60)

    called.before = before
    with pytest.raises(KeyboardInterrupt):
        work_through([group(called, 10**5)], 2)
    assert len(called.rows) < 10**5


def test_an_interrupt_while_it_waits_is_raised_once_the_others_are_at_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called, caller, wait_for = Called(), threading.get_ident(), threading.Condition.wait_for
    entered, stopped = threading.Event(), threading.Event()
    interrupts = iter(range(3))
    ended: list[int] = []

    def before() -> None:
        if threading.get_ident() == caller:
            assert entered.wait(60)
        else:
            entered.set()
            assert stopped.wait(60)
            time.sleep(0.1)
            ended.append(threading.get_ident())

    def interrupted(condition: threading.Condition, predicate: Callable[[], bool]) -> bool:
        if next(interrupts, None) is not None:
            raise KeyboardInterrupt
        return wait_for(condition, predicate)

    called.before = before
    monkeypatch.setattr(Rows, "stop", lambda _: stopped.set())
    monkeypatch.setattr(threading.Condition, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work_through([group(called, 5)], 2)
    assert len(ended) == 1
    assert len(called.rows) == 5


def test_an_interrupt_as_another_is_seen_to_leaves_no_thread_at_work() -> None:
    called, caller = Called(), threading.get_ident()
    entered, stops, ended = threading.Event(), iter(range(2)), threading.Event()

    class Interrupted(Rows):
        def stop(self) -> None:
            if next(stops, None) is not None:
                raise KeyboardInterrupt
            super().stop()

    def before() -> None:
        if threading.get_ident() == caller:
            assert entered.wait(60)
            raise KeyboardInterrupt
        entered.set()
        time.sleep(0.2)
        ended.set()

    called.before = before
    with pytest.raises(KeyboardInterrupt):
        work_through([Interrupted(called, np.arange(5))], 2)
    assert ended.is_set()
    assert called.rows == []
    assert next(stops, None) is None


def test_what_the_addresses_lead_to_is_kept() -> None:
    values = np.zeros(10)
    kept = weakref.ref(values)
    calls = Rows(Called(), np.arange(1), values)
    del values
    assert kept() is not None
    del calls
    assert kept() is None


def test_without_room_for_threads_this_one_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_room)
    called = Called()
    work_through([group(called, 50)], 4)
    assert len(called.rows) == 50
    assert called.threads == {threading.get_ident()}
