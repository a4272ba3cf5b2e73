"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real checkpoints and published vectors; skips where there is none."""
    folder = Path(os.environ.get("NOISYTUNE_DATA") or _ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real checkpoints here (NOISYTUNE_DATA names their folder)")
    return folder
