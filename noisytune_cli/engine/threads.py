"""Threads that share the work of a walk.

A task belongs to one thread. Inside a task a thread may open a pass over many tiles, and a thread that has
run out of tasks helps with whatever pass is open: so many small tensors run side by side, and one huge
tensor is still shared by all. The first error stops everybody at the next tile.
"""

from __future__ import annotations

import operator
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np

from noisytune_cli.checkpoint.background import start
from noisytune_cli.errors import UsageError

#: A cache line, which any element's size divides.
_ALIGNMENT = 64

#: Given the bytes to come, a context that yields what to call, from any thread, with the bytes just done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass
class Worker:
    """What one thread works with: room for a tile, for its noised copy, and what a task asks of it beside."""

    pool: Pool
    tile: memoryview
    out: memoryview
    buffer: memoryview


Task = Callable[[Worker], None]


_MOST_THREADS = 256


def default_threads() -> int:
    """Return how many threads to use unless told: the CPUs this process may run on, up to 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def thread_count(given: int | None) -> int:
    """Return `given`, 1 to 256 threads, or for None the default; UsageError for what is neither."""
    if given is None:
        return default_threads()
    try:
        count = operator.index(given)
    except TypeError:
        count = 0
    if not 1 <= count <= _MOST_THREADS:
        wanted = f"a whole number from 1 to {_MOST_THREADS}"
        raise UsageError(f"threads={given!r}", why=f"it is not {wanted}", next_step=f"Give {wanted}")
    return count


class Abandoned(Exception):
    """Another thread failed; its error is the one that counts."""


class TileLoop:
    """One pass over `count` tiles, which several threads may share: `work(worker, tile index)`.

    Tiles are handed out in order; `in_turn` lets their threads through a gate in the same order. There may be
    several gates (`lane`), if every tile goes through the same ones.
    """

    def __init__(self, count: int, work: Callable[[Worker, int], None]) -> None:
        self._count = count
        self._work = work
        self._change = threading.Condition()
        self._taken = self._finished = 0
        self._passed: Counter[int] = Counter()
        self._broken = False

    def has_tiles(self) -> bool:
        """Say whether a thread that came now would get a tile."""
        return not self._broken and self._taken < self._count

    def help(self, worker: Worker) -> None:
        """Work through tiles until none is left to take."""
        try:
            while (index := self._take()) is not None:
                worker.pool.check()
                self._work(worker, index)
                with self._change:
                    self._finished += 1
                    self._change.notify_all()
        except BaseException:
            with self._change:
                self._broken = True
                self._change.notify_all()
            raise

    def wait(self) -> None:
        """Wait until the tiles that others took are done too."""
        self._wait_for(lambda: self._finished == self._count)

    @contextmanager
    def in_turn(self, index: int, lane: int = 0) -> Iterator[None]:
        """Enter once tile `index - 1` has left."""
        self._wait_for(lambda: self._passed[lane] == index)
        yield
        with self._change:
            self._passed[lane] += 1
            self._change.notify_all()

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        with self._change:
            self._change.wait_for(lambda: self._broken or ready())
            if self._broken:
                raise Abandoned

    def _take(self) -> int | None:
        with self._change:
            if not self.has_tiles():
                return None
            self._taken += 1
            return self._taken - 1


class Arena:
    """Memory that tasks keep tensors in, cut from one piece as they come; for one thread at a time."""

    def __init__(self, nbytes: int) -> None:
        self._memory = np.empty(nbytes, np.uint8).data
        self._taken: list[slice] = []

    def take(self, nbytes: int) -> slice | None:
        """Return where so many bytes are free, aligned to any element, until `give_back`; None if nowhere."""
        start = 0
        for place, after in enumerate([*self._taken, slice(len(self._memory), None)]):
            if start + nbytes <= after.start:
                self._taken.insert(place, slice(start, start + nbytes))
                return self._taken[place]
            if after.stop is not None:
                start = -(-after.stop // _ALIGNMENT) * _ALIGNMENT
        return None

    def give_back(self, taken: slice) -> None:
        """Let others have what `take` returned."""
        self._taken.remove(taken)

    def __getitem__(self, taken: slice) -> memoryview:
        return self._memory[taken]


class Pool:
    """The threads of one run: each does tasks in order, then helps with the passes still open.

    `kept_bytes` is the memory that all tasks together may keep tensors in.
    """

    def __init__(
        self, tasks: Iterable[Task], *, tile_bytes: int, buffer_bytes: int, kept_bytes: int = 0
    ) -> None:
        self._tasks = iter(tasks)
        self._room = (tile_bytes, tile_bytes, buffer_bytes)
        self._arena = Arena(kept_bytes)
        self._waiting: list[object] = []
        self._change = threading.Condition()
        self._passes: list[TileLoop] = []
        self._busy = self._alive = 0
        self._error: BaseException | None = None

    def run(self, threads: int) -> None:
        """Do all tasks; raise the first error once every thread has stopped."""
        self._busy = self._alive = threads
        workers = [threading.Thread(target=self._live, name=f"walk-{i}") for i in range(threads)]
        started = []
        try:
            for worker in workers:
                start(worker)
                started.append(worker)
            # Not join: waiting for a condition can be interrupted, and a signal must get through at once.
            with self._change:
                self._change.wait_for(lambda: self._alive == 0)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            for worker in started:
                worker.join()
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """Stop the calling thread if another has failed."""
        if self._error is not None:
            raise Abandoned

    def share(self, work: TileLoop, worker: Worker) -> None:
        """Do a pass, with the help of threads that have nothing else to do."""
        with self._change:
            self._passes.append(work)
            self._change.notify_all()
        try:
            work.help(worker)
            work.wait()
        finally:
            with self._change:
                self._passes.remove(work)

    @contextmanager
    def keep(self, nbytes: int, worker: Worker) -> Iterator[memoryview]:
        """Yield memory for a tensor, no more than `kept_bytes`: at once, or when those before have theirs.

        Until then the thread helps with open passes, which are those of tensors that are kept too.
        """
        turn = object()

        def found() -> slice | None:
            return self._arena.take(nbytes) if self._waiting[0] is turn else None

        with self._change:
            self._waiting.append(turn)
        try:
            while (taken := self._room_or_pass(found)) is None or isinstance(taken, TileLoop):
                self.check()
                if taken is not None:
                    taken.help(worker)
        finally:
            with self._change:
                self._waiting.remove(turn)
                self._change.notify_all()
        try:
            yield self._arena[taken]
        finally:
            with self._change:
                self._arena.give_back(taken)
                self._change.notify_all()

    def _room_or_pass(self, find: Callable[[], slice | None]) -> slice | TileLoop | None:
        """Wait for room or for a pass with tiles left, and return it; None once another thread has failed."""
        got: slice | TileLoop | None = None

        def ready() -> bool:
            nonlocal got
            if self._error is None:
                got = find() or self._open_pass()
            return got is not None or self._error is not None

        with self._change:
            self._change.wait_for(ready)
        return got

    def _open_pass(self) -> TileLoop | None:
        return next((p for p in self._passes if p.has_tiles()), None)

    def _live(self) -> None:
        try:
            tile, out, buffer = (np.empty(n, np.uint8).data for n in self._room)
            self._do_tasks(Worker(self, tile, out, buffer))
        except Abandoned:
            pass
        except BaseException as error:
            self._fail(error)
        finally:
            with self._change:
                self._alive -= 1
                self._change.notify_all()

    def _do_tasks(self, worker: Worker) -> None:
        try:
            while (task := self._next_task()) is not None:
                task(worker)
        finally:
            with self._change:
                self._busy -= 1
                self._change.notify_all()
        while (work := self._pass_to_help()) is not None:
            work.help(worker)

    def _next_task(self) -> Task | None:
        self.check()
        with self._change:
            return next(self._tasks, None)

    def _pass_to_help(self) -> TileLoop | None:
        """Return an open pass with tiles left; None once no thread can open another, or one has failed."""
        with self._change:
            # Without a look at the error this would wait for ever for a thread that could not be started.
            self._change.wait_for(
                lambda: self._busy == 0 or self._error is not None or self._open_pass() is not None
            )
            return self._open_pass()

    def _fail(self, error: BaseException) -> None:
        with self._change:
            if self._error is None:
                self._error = error
            self._change.notify_all()
