"""Signals that ask us to stop, turned into one exception at a safe moment.

SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread, so that the ordinary clean-up runs. Where an
interruption would tear something in two (publishing, cleaning up), the signal is remembered and raised after.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from noisytune_cli.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_deferring = 0
_pending: int | None = None


def install() -> None:
    """Make the signals raise `Stopped`; one that the parent ignores (nohup) stays ignored."""
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _stop)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold signals back until the block is left; main thread only."""
    global _deferring, _pending
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
        if not _deferring and _pending is not None:
            signum, _pending = _pending, None
            raise Stopped(signum)


def _stop(signum: int, frame: FrameType | None) -> None:
    global _pending
    if _deferring:
        _pending = signum
    else:
        raise Stopped(signum)
