"""What waits for a device, beside the work on what comes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from noisytune_cli.checkpoint.background import begin

_T = TypeVar("_T")

#: How many things that wait for a device wait for it together, while the next is worked on.
_BEHIND = 3

#: Seconds that what waits for a device gets to end in, when nobody waits for it any more.
_GRACE = 1.0


def some_behind(lasts: Iterable[Callable[[], _T]]) -> Iterator[_T]:
    """Yield what each of `lasts` returns, in order; threads call them while the next ones are being made.

    So of what keeps the CPU busy and then waits for a device, the waiting of a few happens beside the work on
    the next. What is at work when a signal comes gets a moment to end.
    """
    behind = deque[Future[_T]]()
    grace: float | None = _GRACE
    try:
        for last in lasts:
            behind.append(begin(last))
            if len(behind) > _BEHIND:
                yield behind[0].result()
                behind.popleft()
        while behind:
            yield behind[0].result()
            behind.popleft()
    except Exception:
        grace = None
        raise
    finally:
        wait(behind, grace)
