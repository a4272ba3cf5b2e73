"""Fuzzing by number tries a corpus that it sows itself, and keeps what breaks a property."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import bulk, properties
from fuzz.targets import TARGETS


@pytest.mark.alone
def test_a_reader_is_tried_by_the_hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUZZ_FAILURES", str(tmp_path / "failures"))
    count, broken = bulk.fuzz("quick-header", 0.5, 1, tmp_path / "corpus")
    assert (count >= 500, broken) == (True, [])
    assert len([*(tmp_path / "corpus").iterdir()]) > 100
    assert not [*(tmp_path / "failures").glob("*")]


def test_what_breaks_a_property_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never_shorter(content: bytes, folder: Path) -> None:
        assert len(content) >= 4, "it is shorter"

    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "one").write_bytes(b"abcd")
    monkeypatch.setenv("FUZZ_FAILURES", str(tmp_path / "failures"))
    monkeypatch.setitem(TARGETS, "quick-header", TARGETS["quick-header"]._replace(check=never_shorter))
    count, broken = bulk.fuzz("quick-header", 60, 1, tmp_path / "corpus")
    assert count == 500
    assert "it is shorter" in broken[0]
    kept = [path.read_bytes() for path in (tmp_path / "failures").iterdir()]
    assert kept
    assert all(len(content) < 4 for content in kept)


@pytest.mark.parametrize("costs", ["time", "memory"])
def test_what_costs_too_much_is_found_among_many(
    costs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (bulk, properties):
        monkeypatch.setattr(module, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(bulk, "_TICK", 0.02)
    batch = [b"cheap"] * 100
    batch[41] = b"dear"

    def check(content: bytes, folder: Path) -> None:
        while costs == "time" and content == b"dear":
            pass
        if content == b"dear":
            assert len(bytes([1]) * 2 * properties.GROWTH_BYTES)

    found = [*bulk._of_batch(check, batch, tmp_path)]
    assert [(number, content) for number, content, _ in found] == [(41, b"dear")]
    assert ("CPU time" if costs == "time" else "bytes") in found[0][2]
