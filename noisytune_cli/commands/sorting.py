"""Rows of a report in the order of one of their columns."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from noisytune_cli.errors import UsageError

_Row = TypeVar("_Row")

_NUMBER = re.compile("[0-9]+")


def check_sort(sort: str | None, keys: Sequence[str]) -> None:
    """Raise UsageError for a key, perhaps with `-` before it, that no row has."""
    if sort is not None and sort.removeprefix("-") not in keys:
        raise UsageError(
            f"--sort: no such key: {sort}",
            why=f"the keys are {', '.join(keys)}",
            next_step="Name one of them, with - before it for descending order",
        )


def sort_rows(rows: Sequence[_Row], sort: str) -> list[_Row]:
    """Sort by a key; rows without a value come last either way, and equal ones stay as they came.

    Numbers in a text count as numbers: layer 2 comes before layer 10.
    """
    key = sort.removeprefix("-")
    known = [row for row in rows if getattr(row, key) is not None]
    unknown = [row for row in rows if getattr(row, key) is None]
    return sorted(known, key=lambda row: natural(getattr(row, key)), reverse=sort.startswith("-")) + unknown


def natural(value: Any) -> Any:
    """Return what sorts as a value: of a text a text, which is small, with every number after its length."""
    return _NUMBER.sub(_measured, value) if isinstance(value, str) else value


def _measured(number: re.Match[str]) -> str:
    # Below all that a name can go on with, so that a shorter name comes first.
    digits = number[0].lstrip("0")
    return f"\0{chr(min(len(digits), sys.maxunicode))}{digits}"
