"""Rows of text and labels from a file: TSV (tabs, no quoting, as GLUE is), CSV, JSONL, Parquet or Arrow.

One idea: whatever the file, a row is the wanted columns' values and the line it came from, so that every
later complaint can name the file, the line and the column. Text is UTF-8, with or without a mark.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from noisytune_cli.errors import InputInvalid, unreadable
from noisytune_cli.study.data.arrow import arrow_rows
from noisytune_cli.study.data.rows import TableRow, as_text, check_columns, malformed

#: How a file is read, by the end of its name.
FORMATS = (".tsv", ".csv", ".jsonl", ".parquet", ".arrow")

#: What the row's readers yield: a line number, counted from 1, and that row's cells.
_Cells = Iterator[tuple[int, list[str]]]


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
    rows = list(_rows(path, columns, header))
    if not rows:
        raise malformed(path, "it holds no rows", "Give a file with at least one row")
    return rows


def _rows(path: Path, columns: Sequence[str], header: Sequence[str] | None) -> Iterator[TableRow]:
    match path.suffix.lower():
        case ".parquet" | ".arrow":
            return arrow_rows(path, columns)
        case ".jsonl":
            return _json_rows(path, _lines(path), columns)
        case ".csv":
            return _cell_rows(path, _split_csv(path, _lines(path)), columns, header)
    return _cell_rows(path, _split_tabs(_lines(path)), columns, header)


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
    csv.field_size_limit(2**31 - 1)  # a document may have more than Python's 131,072 characters
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
    check_columns(path, columns, names)
    places = [names.index(column) for column in columns]
    for number, cells in split:
        if len(cells) != len(names):
            raise malformed(
                path,
                f"{len(cells)} columns where there should be {len(names)}",
                "Correct the line; a TSV file has no quoting, a CSV file has",
                number,
            )
        yield TableRow(path, number, tuple(cells[place] for place in places))


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
        check_columns(path, columns, list(found), number)
        values = tuple(as_text(path, column, found[column], number) for column in columns)
        yield TableRow(path, number, values)
