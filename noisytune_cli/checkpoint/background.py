"""A call in a thread of its own, beside the work of whoever asked for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from noisytune_cli.errors import ResourceExhausted

if TYPE_CHECKING:
    from concurrent.futures import Future

_T = TypeVar("_T")


def begin(call: Callable[[], _T]) -> Future[_T]:
    """Have a thread make a call, and return what will hold its outcome, an exception of any kind included.

    The thread does not keep the process from ending. Raises ResourceExhausted where there is none to be had.
    """
    from concurrent.futures import Future  # which imports logging, and a small model needs neither

    outcome: Future[_T] = Future()

    def make() -> None:
        try:
            result = call()
        except BaseException as error:  # handed to the thread that waits, whatever it is
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    start(threading.Thread(target=make, daemon=True))
    return outcome


def start(thread: threading.Thread) -> None:
    """Start a thread; ResourceExhausted where the system has no room for another."""
    try:
        thread.start()
    except RuntimeError as error:  # all that Python says of a limit on processes or memory
        raise ResourceExhausted(
            "cannot start a thread",
            why="the system has no room for another",
            next_step="Use fewer --threads, or raise the limit (ulimit -u, ulimit -v)",
        ) from error
