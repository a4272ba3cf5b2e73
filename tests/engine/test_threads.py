"""Threads that share a walk: order, help, and what happens when one of them fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from noisytune_cli.engine.threads import Arena, Pool, Task, TileLoop, Worker
from noisytune_cli.errors import ResourceExhausted, Stopped


def run(threads: int, *tasks: Task) -> None:
    Pool(tasks, tile_bytes=8, buffer_bytes=16).run(threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_task_is_done_once(threads: int) -> None:
    done: list[int] = []
    run(threads, *((lambda worker, i=i: done.append(i)) for i in range(50)))
    assert sorted(done) == list(range(50))


def test_one_thread_keeps_the_order() -> None:
    done: list[int] = []
    run(1, *((lambda worker, i=i: done.append(i)) for i in range(50)))
    assert done == list(range(50))


def test_hands_have_the_room_asked_for() -> None:
    rooms: list[tuple[int, int, int]] = []
    run(1, lambda worker: rooms.append((len(worker.tile), len(worker.out), len(worker.buffer))))
    assert rooms == [(8, 8, 16)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_turns_are_taken_in_order(threads: int) -> None:
    order: list[int] = []

    def task(worker: Worker) -> None:
        def tile(worker: Worker, index: int) -> None:
            with work.in_turn(index):
                order.append(index)

        work = TileLoop(200, tile)
        worker.pool.share(work, worker)

    run(threads, task)
    assert order == list(range(200))


def test_idle_threads_help_with_a_pass() -> None:
    helpers: set[str] = set()
    together = threading.Barrier(3)

    def task(worker: Worker) -> None:
        def tile(worker: Worker, index: int) -> None:
            together.wait(timeout=30)  # passes only with three threads inside
            helpers.add(threading.current_thread().name)

        worker.pool.share(TileLoop(3, tile), worker)

    run(3, task)
    assert len(helpers) == 3


def test_a_pass_without_tiles_ends() -> None:
    run(3, lambda worker: worker.pool.share(TileLoop(0, lambda worker, index: None), worker))


def share(count: int, tile: Callable[[Worker, int], None]) -> Task:
    return lambda worker: worker.pool.share(TileLoop(count, tile), worker)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_first_error_stops_everybody(threads: int) -> None:
    seen: list[int] = []

    def tile(worker: Worker, index: int) -> None:
        seen.append(index)
        if index == 3:
            raise ValueError("tile 3")

    with pytest.raises(ValueError, match="tile 3"):
        run(threads, share(100_000, tile), share(100_000, tile))
    assert len(seen) < 100_000


def test_an_error_frees_those_who_wait_for_their_turn() -> None:
    waiting = threading.Event()

    def task(worker: Worker) -> None:
        def tile(worker: Worker, index: int) -> None:
            if index == 0:
                waiting.wait(timeout=30)
                raise ValueError("tile 0")
            waiting.set()
            with work.in_turn(index):
                pytest.fail("tile 0 never had its turn")

        work = TileLoop(2, tile)
        worker.pool.share(work, worker)

    with pytest.raises(ValueError, match="tile 0"):
        run(2, task)


def test_an_error_in_a_task_stops_a_pass_elsewhere() -> None:
    running = threading.Event()

    def fail(worker: Worker) -> None:
        running.wait(timeout=30)
        raise ValueError("task")

    with pytest.raises(ValueError, match="task"):
        run(2, share(10**9, lambda worker, index: running.set()), fail)


def test_memory_that_gives_out_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("noisytune_cli.engine.threads.np.empty", empty)
    with pytest.raises(MemoryError):
        run(2, lambda worker: None)


def test_a_thread_that_cannot_start_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "walk-2":
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ResourceExhausted, match="--threads"):
        run(3, lambda worker: None)
    assert not [t for t in threading.enumerate() if t.name.startswith("walk-")]


def test_a_signal_in_the_waiting_thread_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool([share(10**9, lambda worker, index: None)], tile_bytes=8, buffer_bytes=16)
    waited = pool._change.wait_for

    def wait_for(ready: Callable[[], bool]) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise Stopped(2)
        return waited(ready)

    monkeypatch.setattr(pool._change, "wait_for", wait_for)
    with pytest.raises(Stopped):
        pool.run(2)
    assert not [t for t in threading.enumerate() if t.name.startswith("walk-")]


def test_an_arena_gives_the_first_gap_and_takes_it_back() -> None:
    arena = Arena(300)
    first, second = arena.take(100), arena.take(60)
    assert first == slice(0, 100)
    assert second == slice(128, 188)
    assert arena.take(200) is None
    third = arena.take(108)
    assert third == slice(192, 300)
    assert arena.take(1) is None
    assert first is not None
    arena.give_back(first)
    assert arena.take(129) is None
    assert arena.take(100) == first
    assert len(arena[first]) == 100


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_tasks_keep_memory_in_turn(threads: int) -> None:
    held: Counter[int] = Counter()
    done: list[int] = []

    def task(number: int) -> Callable[[Worker], None]:
        def work(worker: Worker) -> None:
            with worker.pool.keep(100 + number % 3, worker) as memory:
                memory[:] = bytes([number]) * len(memory)
                pass_ = TileLoop(20, lambda worker, index: held.update([number]))
                worker.pool.share(pass_, worker)
                assert bytes(memory) == bytes([number]) * len(memory)
            done.append(number)

        return work

    Pool(map(task, range(60)), tile_bytes=8, buffer_bytes=0, kept_bytes=256).run(threads)
    assert sorted(done) == list(range(60))
    assert set(held.values()) == {20}


def test_who_waits_for_memory_stops_at_an_error() -> None:
    held = threading.Event()

    def hold(worker: Worker) -> None:
        with worker.pool.keep(100, worker):
            held.set()
            time.sleep(0.05)
            raise ValueError("no")

    def wait(worker: Worker) -> None:
        assert held.wait(10)
        with worker.pool.keep(100, worker):
            raise AssertionError("it got what another has")

    with pytest.raises(ValueError, match="no"):
        Pool([hold, wait, wait], tile_bytes=8, buffer_bytes=0, kept_bytes=100).run(3)
