"""Rows of a report in the order of one of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from noisytune_cli.errors import UsageError

_Row = TypeVar("_Row")


def check_sort(sort: str | None, keys: Sequence[str]) -> None:
    """Raise UsageError for a key, perhaps with `-` before it, that no row has."""
    if sort is not None and sort.removeprefix("-") not in keys:
        raise UsageError(
            f"--sort: no such key: {sort}",
            why=f"the keys are {', '.join(keys)}",
            next_step="Name one of them, with - before it for descending order",
        )


def sort_rows(rows: Sequence[_Row], sort: str) -> list[_Row]:
    """Sort by a key; rows without a value come last either way, and equal ones stay in file order."""
    key = sort.removeprefix("-")
    known = [row for row in rows if getattr(row, key) is not None]
    unknown = [row for row in rows if getattr(row, key) is None]
    return sorted(known, key=lambda row: getattr(row, key), reverse=sort.startswith("-")) + unknown
