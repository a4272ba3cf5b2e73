"""A hub on loopback for the tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import PLAIN, SHARDED, Hub, Repository, asked, serve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a plain and a sharded model, and a huggingface_hub that asks it and never waits."""
    from huggingface_hub.utils import close_session

    with serve(plain=Repository(dict(PLAIN)), owner__sharded=Repository(dict(SHARDED))) as served:
        asked(served, tmp_path, monkeypatch)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield served
        close_session()
