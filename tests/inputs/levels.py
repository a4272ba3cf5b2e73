"""The levels of the CPU's kernels that can be tried here: the compiled ones of this CPU, and NumPy's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from noisytune_cli.noise.devices.cpu import Cpu, library, reference


def compiled() -> ctypes.CDLL:
    """Return the compiled library; the tests need it, so an error where it is missing."""
    return ctypes.CDLL(os.fspath(library._PATH))


#: Lowest first.
LEVELS = ["numpy", *library.levels(compiled())]


@contextmanager
def cpu_at(level: str) -> Iterator[Cpu]:
    """Lend the CPU device with the kernels of a level."""
    kernels = reference if level == "numpy" else library.Library(compiled(), level)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load", lambda: kernels)
        yield Cpu()
