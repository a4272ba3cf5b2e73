"""Tables of calls: every row once, by any number of threads, and what happens when one fails."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from noisytune_cli import compiled, tables
from noisytune_cli.compiled import Loop
from noisytune_cli.tables import Table, work_through


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep objects in a folder of the test's own."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(compiled, "_folders", lambda: [folder])
    monkeypatch.setattr(compiled, "_modules", {})


class Called:
    """A loop of letters "pufid" in Python that notes its arguments, and may end with a status."""

    def __init__(self, status: int = 0) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()
        self.status = status
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_float,
            ctypes.c_int64,
            ctypes.c_double,
        )
        self._function = kind(self._call)
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        self.loop = Loop(address, "pufid")

    def _call(self, value_slot: int, error_slot: int, *arguments: Any) -> int:
        self.rows.append(arguments)
        self.threads.add(threading.get_ident())
        return self.status


def columns(count: int) -> list[np.ndarray]:
    places = 2**62 + np.arange(count)
    unsigned = (2**64 - 1 - np.arange(count, dtype=np.uint64)).view(np.int64)
    singles = np.arange(count, dtype=np.float32) + np.float32(0.1)
    return [places, unsigned, singles.view(np.uint32).astype(np.int64), -np.arange(count)]


def table(called: Called, count: int, own: float = -2.5) -> Table:
    bits = int(np.float64(own).view(np.int64))
    return Table(called.loop, [*columns(count), None], np.empty(0), lambda: [bits])


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 16, 100])
def test_every_row_is_called_once_with_its_arguments(count: int, threads: int) -> None:
    called = Called()
    work_through([table(called, count)], threads)
    assert sorted(called.rows) == [
        (2**62 + i, 2**64 - 1 - i, float(np.float32(i) + np.float32(0.1)), -i, -2.5) for i in range(count)
    ]


def test_tables_are_worked_through_one_after_the_other() -> None:
    first, second = Called(), Called()
    work_through([table(first, 40), table(second, 3)], 1)
    assert (len(first.rows), len(second.rows)) == (40, 3)
    assert first.threads == second.threads == {threading.get_ident()}


def test_no_more_threads_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread)
    )
    work_through([table(Called(), 3)], 8)
    assert len(started) == 2


def test_a_loop_that_fails_in_one_thread_stops_the_others() -> None:
    failing, other, caller = Called(status=1), Called(), threading.get_ident()
    stopped = threading.Event()

    class Watched(Table):
        def stop(self) -> None:
            super().stop()
            stopped.set()

    def own() -> list[int]:
        if threading.get_ident() == caller:
            stopped.wait(10)
        return [0]

    fails = Table(failing.loop, [*columns(1), None], np.empty(0), own)
    rest = Watched(other.loop, [*columns(1000), None], np.empty(0), own)
    with pytest.raises(RuntimeError, match="ended with an error"):
        work_through([fails, rest], 2)
    assert len(failing.rows) == 1
    assert failing.threads != {caller}
    assert other.rows == []


def test_an_interrupt_gets_in_between_two_batches_of_rows() -> None:
    called = Called()
    interrupted = table(called, 1000)
    drive, most = interrupted._drive, 2 * tables._AT_A_TIME

    def drive_twice(*arguments: int) -> int:
        if len(called.rows) >= most:
            raise KeyboardInterrupt
        return drive(*arguments)

    interrupted._drive = drive_twice  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        work_through([interrupted], 1)
    assert len(called.rows) == most


def test_an_interrupt_stops_the_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    called, caller = Called(), threading.get_ident()
    interrupted = threading.Event()

    def own() -> list[int]:
        if threading.get_ident() == caller:
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(60)
        return [0]

    with pytest.raises(KeyboardInterrupt):
        work_through([Table(called.loop, [*columns(10**5), None], np.empty(0), own)], 2)
    assert len(called.rows) < 10**5


def test_an_interrupt_while_it_waits_is_raised_once_the_others_are_at_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called, caller, wait_for = Called(), threading.get_ident(), threading.Condition.wait_for
    entered, stopped = threading.Event(), threading.Event()
    interrupts = iter(range(3))
    ended: list[int] = []

    def own() -> list[int]:
        if threading.get_ident() == caller:
            assert entered.wait(60)
        else:
            entered.set()
            assert stopped.wait(60)
            time.sleep(0.1)
            ended.append(threading.get_ident())
        return [0]

    def interrupted(condition: threading.Condition, predicate: Callable[[], bool]) -> bool:
        if next(interrupts, None) is not None:
            raise KeyboardInterrupt
        return wait_for(condition, predicate)

    table = Table(called.loop, [*columns(5), None], np.empty(0), own)
    monkeypatch.setattr(Table, "stop", lambda table: stopped.set())
    monkeypatch.setattr(threading.Condition, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work_through([table], 2)
    assert len(ended) == 1
    assert len(called.rows) == 5


def test_an_interrupt_as_another_is_seen_to_leaves_no_thread_at_work() -> None:
    called, caller = Called(), threading.get_ident()
    entered, stops, ended = threading.Event(), iter(range(2)), threading.Event()

    class Interrupted(Table):
        def stop(self) -> None:
            if next(stops, None) is not None:
                raise KeyboardInterrupt
            super().stop()

    def own() -> list[int]:
        if threading.get_ident() == caller:
            assert entered.wait(60)
            raise KeyboardInterrupt
        entered.set()
        time.sleep(0.2)
        ended.set()
        return [0]

    with pytest.raises(KeyboardInterrupt):
        work_through([Interrupted(called.loop, [*columns(5), None], np.empty(0), own)], 2)
    assert ended.is_set()
    assert called.rows == []
    assert next(stops, None) is None


def test_what_the_addresses_lead_to_is_kept() -> None:
    values = np.zeros(10)
    kept = weakref.ref(values)
    table = Table(Called().loop, [*columns(1), None], np.empty(0), lambda: [0], values)
    del values
    assert kept() is not None
    del table
    assert kept() is None


def test_without_room_for_threads_this_one_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_room)
    called = Called()
    work_through([table(called, 50)], 4)
    assert len(called.rows) == 50
    assert called.threads == {threading.get_ident()}


def test_the_driver_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(Called(), 1)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("noisytune-driver-pufid-++++-")
    monkeypatch.setattr(compiled, "_modules", {})
    monkeypatch.setattr(tables, "_driver", lambda *_: pytest.fail("compiled again"))
    called = Called()
    work_through([table(called, 5)], 2)
    assert len(called.rows) == 5
