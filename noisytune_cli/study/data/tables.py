"""Rows of text and labels from a file: TSV (tab-separated, no quoting, as GLUE is), CSV or JSONL.

One idea: whatever the file, a row is the wanted columns' values and the line it came from, so that every
later complaint can name the file, the line and the column. Everything is UTF-8, with or without a mark.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from noisytune_cli.errors import InputInvalid, unreadable

#: How a file is read, by the end of its name.
FORMATS = (".tsv", ".csv", ".jsonl")

#: What the row's readers yield: a line number, counted from 1, and that row's cells.
_Cells = Iterator[tuple[int, list[str]]]


@dataclass(frozen=True, slots=True)
class TableRow:
    """The wanted columns of one row, and its line in the file, counted from 1."""

    line: int
    values: tuple[str, ...]


def read_table(path: Path, columns: Sequence[str], *, header: Sequence[str] | None = None) -> list[TableRow]:
    """Return the wanted columns of every row of a file.

    `header` names the columns of a TSV or CSV file that has no header line. Raises InputUnreadable for a
    file that cannot be read, InputInvalid, with line and column, for one that does not hold such rows.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputInvalid(
            "cannot tell the format",
            path=path,
            why=f"the file's name ends in {path.suffix or 'nothing'}",
            next_step=f"Name it {', '.join(FORMATS[:-1])} or {FORMATS[-1]} after what it holds",
        )
    lines = _lines(path)
    if path.suffix.lower() == ".jsonl":
        rows = list(_json_rows(path, lines, columns))
    else:
        split = _split_csv(path, lines) if path.suffix.lower() == ".csv" else _split_tabs(lines)
        rows = list(_cell_rows(path, split, columns, header))
    if not rows:
        raise malformed(path, "it holds no rows", "Give a file with at least one row")
    return rows


def malformed(path: Path, why: str, next_step: str, line: int | None = None) -> InputInvalid:
    """Return the error for a file that does not hold what it should."""
    where = "" if line is None else f"line {line}: "
    return InputInvalid("cannot use the data", path=path, why=f"{where}{why}", next_step=next_step)


def _lines(path: Path) -> list[str]:
    """Return a file's lines without their ends; only line feeds end one: text may hold other breaks."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(error, path) from error
    lines = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise malformed(
                path, f"byte {error.start + 1} is not UTF-8", "Convert the file to UTF-8", number
            ) from None
    return lines


def _split_tabs(lines: list[str]) -> _Cells:
    for number, line in enumerate(lines, start=1):
        if line:
            yield number, line.split("\t")


def _split_csv(path: Path, lines: list[str]) -> _Cells:
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise malformed(path, str(error), "Correct the quoting", reader.line_num) from None
        if cells is None:
            return
        if cells:
            yield reader.line_num, cells


def _cell_rows(
    path: Path, split: _Cells, columns: Sequence[str], header: Sequence[str] | None
) -> Iterator[TableRow]:
    names = list(header) if header is not None else next(split, (0, []))[1]
    if not names:
        raise malformed(path, "it is empty", "Give a file with a header line and rows")
    missing = [column for column in columns if column not in names]
    if missing:
        raise malformed(
            path,
            f'there is no column "{missing[0]}"; the columns are {", ".join(names)}',
            "Name the columns with --text and --label",
        )
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise malformed(path, f'two columns are called "{twice[0]}"', "Give each column a name of its own")
    places = [names.index(column) for column in columns]
    for number, cells in split:
        if len(cells) != len(names):
            raise malformed(
                path,
                f"{len(cells)} columns where there should be {len(names)}",
                "Correct the line; a TSV file has no quoting, a CSV file has",
                number,
            )
        yield TableRow(number, tuple(cells[place] for place in places))


def _json_rows(path: Path, lines: list[str], columns: Sequence[str]) -> Iterator[TableRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise malformed(path, "it is not JSON", "Write one JSON object a line", number) from None
        if not isinstance(found, dict):
            raise malformed(path, "it is not a JSON object", "Write one JSON object a line", number)
        values = []
        for column in columns:
            if column not in found:
                raise malformed(
                    path,
                    f'there is no column "{column}"; the columns are {", ".join(found)}',
                    "Name the columns with --text and --label",
                    number,
                )
            value = found[column]
            if not isinstance(value, str | int | float):
                raise malformed(
                    path, f'column "{column}" is neither text nor a number', "Correct the line", number
                )
            values.append(value if isinstance(value, str) else json.dumps(value))
        yield TableRow(number, tuple(values))
