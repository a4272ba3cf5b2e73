"""Signals that ask us to stop, turned into one exception at a safe moment.

SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread, so that the ordinary clean-up runs. Where an
interruption would tear something in two (publishing, cleaning up), the signal is remembered and raised after.
Python drops what is raised while an object goes (a finalizer, the end of a weak reference): that is raised
again. Who asks twice means the same: a further signal within two seconds does not disturb the clean-up.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from noisytune_cli.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds for the clean-up after a signal, and until one that was dropped is raised again.
_PATIENCE, _SOON = 2.0, 0.001

_deferring = 0
_pending: int | None = None
_raised_at = -math.inf
_patience = 0.0  # until the handlers are installed
_left: str | None = None


def install() -> None:
    """Make the signals raise `Stopped`; one that the parent ignores (nohup) stays ignored."""
    global _patience
    _patience = _PATIENCE
    sys.unraisablehook = _dropped
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _stop)


def ignore() -> None:
    """Ignore the signals from here on: the work is done, and what is left is to end."""
    for signum in (*_SIGNALS, signal.SIGALRM):
        signal.signal(signum, signal.SIG_IGN)


def leave(what: str | None) -> None:
    """Say what a signal finds done from here on, so that who stops the run is told."""
    global _left
    _left = what


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
            _raise(signum)


def _stop(signum: int, frame: FrameType | None) -> None:
    global _pending
    if _deferring:
        _pending = signum
    else:
        _raise(signum)


def _dropped(unraisable: sys.UnraisableHookArgs) -> None:
    """Have a signal that Python drops come again, once the code is left that it was raised in."""
    global _raised_at
    stopped = unraisable.exc_value
    if not isinstance(stopped, Stopped):
        sys.__unraisablehook__(unraisable)
        return
    _raised_at = -math.inf
    signum = stopped.signum

    def again(_: int, frame: FrameType | None) -> None:
        # What is raised in this very function Python drops for good, and a busy machine may be long in it.
        outer = frame
        while outer is not None:
            if outer.f_code is _dropped.__code__:
                return  # the next will come
            outer = outer.f_back
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _stop(signum, frame)

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, _SOON, _SOON)


def _raise(signum: int) -> None:
    """Raise `Stopped`, unless that was done a moment ago."""
    global _raised_at
    now = time.monotonic()
    if now - _raised_at >= _patience:
        _raised_at = now
        stopped = Stopped(signum)
        stopped.left = _left
        raise stopped
