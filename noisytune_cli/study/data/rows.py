"""A row of text and labels, and the complaints that name its file, its place in it and its column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisytune_cli.errors import InputInvalid
from noisytune_cli.escape import is_text


@dataclass(frozen=True, slots=True)
class TableRow:
    """The wanted columns of one row, its file, and its line (Parquet, Arrow: its number) there, from 1."""

    path: Path
    line: int
    values: tuple[str, ...]


def malformed(path: Path, why: str, next_step: str, line: int | None = None) -> InputInvalid:
    """Return the error for a file that does not hold what it should."""
    counted = "row" if path.suffix.lower() in (".parquet", ".arrow") else "line"
    where = "" if line is None else f"{counted} {line}: "
    return InputInvalid("cannot use the data", path=path, why=f"{where}{why}", next_step=next_step)


def check_columns(path: Path, columns: Sequence[str], names: Sequence[str], line: int | None = None) -> None:
    """Refuse a file, or a line of its own columns, that lacks a wanted column or has two of its name."""
    missing = [column for column in columns if column not in names]
    if missing:
        raise malformed(
            path,
            f'there is no column "{missing[0]}"; the columns are {", ".join(names)}',
            "Name the columns with --text and --label",
            line,
        )
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise malformed(path, f'two columns are called "{twice[0]}"', "Give each column a name of its own")


def as_text(path: Path, column: str, value: Any, line: int) -> str:
    """Return a value as a text file would hold it; InputInvalid for what is neither text nor a number."""
    if not isinstance(value, str | int | float) or value != value:
        raise malformed(path, f'column "{column}" is neither text nor a number', "Correct the row", line)
    text = value if isinstance(value, str) else json.dumps(value)
    if not is_text(text):
        why = f'column "{column}" has half of a surrogate pair, no character'
        raise malformed(path, why, "Correct the row", line)
    return text
