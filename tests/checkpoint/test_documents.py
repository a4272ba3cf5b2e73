"""A document read piece by piece says what `json.loads` says of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisytune_cli.reading import Document, JsonFault, JsonLimits

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(deadline=None)
@given(value=VALUES, entries=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=5))
@pytest.mark.parametrize("indent", [None, 2])
def test_reads_what_json_reads(indent: int | None, value: Any, entries: list[Any]) -> None:
    document = Document(
        json.dumps({"one": value, "many": entries, "last": 1}, indent=indent).encode(), JsonLimits()
    )
    document.member("one")
    assert document.value() == value
    document.member("many")
    assert list(document.entries(5)) == entries
    document.member("last")
    assert document.value() == 1
    document.end()


@pytest.mark.parametrize("length", [4000, 4096, 5000, 70_000, 1_100_000])
def test_a_long_piece(length: int) -> None:
    text = json.dumps({"a": [{"name": "x" * length}, {"name": "y"}]})
    document = Document(text.encode(), JsonLimits())
    document.member("a")
    assert [len(entry["name"]) for entry in document.entries(2)] == [length, 1]
    document.end()


def test_a_piece_longer_than_the_longest() -> None:
    document = Document(json.dumps({"a": "x" * 5000}).encode(), JsonLimits(piece=4096))
    document.member("a")
    with pytest.raises(JsonFault, match="a value of more than 4,096 characters"):
        document.value()


def test_an_entry_is_handed_out_before_the_next_is_read() -> None:
    document = Document(b'{"a": [{"x": 1}, {broken', JsonLimits())
    document.member("a")
    entries = document.entries(10)
    assert next(entries) == {"x": 1}
    with pytest.raises(JsonFault, match="not valid JSON"):
        next(entries)
