"""Noise on the CPU is worked out with subnormal numbers, whatever `torch.set_flush_denormal` was told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept() -> Iterator[None]:
    """Keep subnormal numbers in this thread and in those that it starts; afterwards all is as before.

    A sum that is flushed to zero would have other bits than the command line's, and a tensor of tiny values
    another std.
    """
    flushed = _halved(2.0**-1022) == 0.0
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)


def _halved(x: float) -> float:
    return x / 2  # of a constant Python would do it when it compiles
