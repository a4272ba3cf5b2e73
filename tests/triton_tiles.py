"""The size of the Triton kernels' tiles, for tests: the interpreter is slow."""

from __future__ import annotations

import pytest

from noisytune_cli import triton_noise, triton_pairs, triton_sums, triton_tables
from noisytune_cli.triton_tables import LANES


def resize(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Make tiles of so many steps."""
    for module in (triton_tables, triton_noise, triton_pairs, triton_sums):
        patch.setattr(module, "STEPS", type(LANES)(steps))
        if hasattr(module, "TILE"):
            patch.setattr(module, "TILE", type(LANES)(steps * LANES.value))
