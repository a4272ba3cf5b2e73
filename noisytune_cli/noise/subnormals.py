"""Numbers are worked out with subnormal ones, whatever `torch.set_flush_denormal` was told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Keep subnormal numbers in this thread and in those that it starts; afterwards all is as before.

    A sum that is flushed to zero would have other bits than those of another process, and a tensor of tiny
    values another std. Libraries that were compiled for speed alone flush them too, once loaded.
    """
    flushed = _halved(2.0**-1022) == 0.0
    if flushed:
        _flush(False)
    try:
        yield
    finally:
        if flushed:
            _flush(True)


def _flush(mode: bool) -> None:
    import torch  # not where nothing is to be changed

    torch.set_flush_denormal(mode)


def _halved(x: float) -> float:
    return x / 2  # of a constant Python would do it when it compiles
