"""Rows sort as people count."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from noisytune_cli.commands.sorting import sort_rows


@dataclass(frozen=True)
class Row:
    name: str | None


def pieces(name: str) -> list[object]:
    """A name as texts and numbers in turn."""
    found: list[object] = []
    for is_number, characters in itertools.groupby(name, lambda character: character in "0123456789"):
        text = "".join(characters)
        if is_number and not found:
            found.append("")
        found.append(int(text) if is_number else text)
    return found


@given(st.lists(st.text("ab.01239é_", max_size=8).map(Row), max_size=20))
def test_numbers_count_as_numbers(rows: list[Row]) -> None:
    found = [row.name for row in sort_rows(rows, "name")]
    assert found == sorted((row.name for row in rows if row.name is not None), key=pieces)


def test_layers_stand_in_their_order_and_nothing_last() -> None:
    names = ["layer", "layer.2", "layer.10", "layer.10.bias", "layer.x", None]
    for order in itertools.permutations(names):
        assert [row.name for row in sort_rows([Row(name) for name in order], "name")] == names
