"""How a download is shown: by whoever asked for it.

The command line has a bar of its own and sets it; in Python nothing is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

#: Given the bytes that are to come: enters what is then called with those that came, from any thread.
Shown = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def _unseen(total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


shown: ContextVar[Shown] = ContextVar("shown", default=_unseen)
