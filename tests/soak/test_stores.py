"""A few runs into an object store that fails; `make soak` tries them by the hundred."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest
import stores
from object_store import ObjectStore


def test_runs_into_a_store_that_fails(store: ObjectStore, tmp_path: Path) -> None:
    tried = stores.Stores(store, tmp_path, commands.Commands())
    tries = [tried.try_case(seed) for seed in range(4)]
    assert [found for _, found in tries] == [[]] * 4
    assert any(hit for hit, _ in tries)


def test_what_does_not_hold_is_told(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = stores.Stores(store, tmp_path, commands.Commands())
    monkeypatch.setitem(tried._expected, "config.json", b"another")
    found = " ".join(tried.try_case(0)[1])
    assert "it ended with 0, and there is" in found or "what is there is not of its output" in found
