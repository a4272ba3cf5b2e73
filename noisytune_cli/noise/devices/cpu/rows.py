"""Rows of calls: a kernel goes through many runs of values without Python between one and the next.

To begin a call from Python takes as long as to add noise to some ten thousand values, and only one thread can
do it at a time; a model has hundreds of tensors that are smaller. So the arguments and results of all calls
are rows of one array, and each thread makes one call, which takes the next row as long as there is one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The structs of kernels.c: runs of values to be given noise, or a mixture of several, and to be measured.
NOISE_ROW = np.dtype(
    [
        ("x", np.uint64),
        ("y", np.uint64),
        ("n", np.int64),
        ("first", np.uint64),
        ("stream", np.uint32, 4),
        ("amplitude", np.float32),
        ("unchanged", np.int64),
        ("clamped", np.int64),
    ],
    align=True,
)
TERM = np.dtype([("stream", np.uint32, 4), ("amplitude", np.float32)], align=True)
MIX_ROW = np.dtype(
    [
        ("x", np.uint64),
        ("y", np.uint64),
        ("n", np.int64),
        ("first", np.uint64),
        ("terms", np.uint64),
        ("count", np.int64),
        ("kept", np.float64),
        ("unchanged", np.int64),
        ("clamped", np.int64),
    ],
    align=True,
)
MOMENTS_ROW = np.dtype(
    [
        ("x", np.uint64),
        ("n", np.int64),
        *((name, np.float64) for name in ("pivot", "s1", "low1", "s2", "low2")),
        ("finite", np.int64),
    ],
    align=True,
)

#: Rows that a thread does before it asks whether to go on.
_AT_A_TIME = 16

#: A kernel over rows: (rows [n], the next one that is free [1] int64, how many to do at most).
Kernel = Callable[["NDArray[Any]", "NDArray[np.int64]", int], None]


class Rows:
    """The calls of one kernel, for several threads to take in turn."""

    def __init__(self, kernel: Kernel, rows: NDArray[Any], keeps: object = None) -> None:
        """Take the rows; `keeps` holds what their addresses lead to, so that no thread meets it freed."""
        self.rows, self._kernel, self._keeps = rows, kernel, keeps
        self._next = np.zeros(1, np.int64)

    def __len__(self) -> int:
        """Return how many calls there are."""
        return len(self.rows)

    def work(self) -> None:
        """Make calls until none is left to take."""
        while self._next[0] < len(self):
            self._kernel(self.rows, self._next, _AT_A_TIME)

    def stop(self) -> None:
        """Leave the calls that no thread has taken."""
        self._next[0] = len(self)


def work_through(groups: Sequence[Rows], threads: int) -> None:
    """Make all calls of some groups of rows in this thread and up to `threads` - 1 others.

    The first error is raised once all are at rest, an interrupt too, however many follow. Where the system
    has no room for a thread, fewer do it.
    """
    errors: list[BaseException] = []
    at_work = 0
    change = threading.Condition()

    def stop() -> None:
        for group in groups:
            group.stop()

    def work() -> None:
        for group in groups:
            group.work()

    def help_out() -> None:
        nonlocal at_work
        with change:
            at_work += 1
        try:
            work()
        except BaseException as error:
            errors.append(error)
            stop()
        finally:
            with change:
                at_work -= 1
                change.notify_all()

    # An interrupt can come at any moment, also in what is done about the one before it: so stop and wait are
    # repeated, until all threads are known to be at rest.
    begun = at_rest = False
    while not at_rest:
        try:
            if begun:
                stop()
            else:
                begun = True
                with contextlib.suppress(RuntimeError):
                    for _ in range(1, min(threads, sum(map(len, groups)))):
                        threading.Thread(target=help_out, name="rows").start()
                work()
            # Not join: when that is interrupted, some versions of Python take the thread for ended. One that
            # has not begun by now finds nothing to do.
            with change:
                change.wait_for(lambda: at_work == 0)
            at_rest = True
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
