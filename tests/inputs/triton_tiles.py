"""The size of the Triton kernels' tiles, for tests: the interpreter is slow."""

from __future__ import annotations

import pytest

from noisytune_cli.noise.devices.cuda import add as triton_noise
from noisytune_cli.noise.devices.cuda import add_pairs as triton_pairs
from noisytune_cli.noise.devices.cuda import launch as triton_tables
from noisytune_cli.noise.devices.cuda import mix as triton_mix
from noisytune_cli.noise.devices.cuda import sums as triton_sums
from noisytune_cli.noise.devices.cuda.launch import LANES


def resize(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Make tiles of so many steps."""
    for module in (triton_tables, triton_noise, triton_pairs, triton_mix, triton_sums):
        if hasattr(module, "STEPS"):
            patch.setattr(module, "STEPS", type(LANES)(steps))
        if hasattr(module, "TILE"):
            patch.setattr(module, "TILE", type(LANES)(steps * LANES.value))
