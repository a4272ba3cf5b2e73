"""The rows of a report as JSON and CSV have them: floats round-trip, what does not exist is null or empty.

A spreadsheet takes a cell for a formula that begins like one, and a checkpoint's names are a stranger's. So
in CSV an apostrophe goes before a text that does, or that begins with one; numbers are as they are.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

#: What a formula begins with in one spreadsheet or another, and what is put before it.
_FORMULA = tuple("=+-@＝＋－＠\t\r")
_DEFUSED = "'"


def values(record: Any) -> dict[str, Any]:
    """Return a record's fields as JSON has them: without infinities."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in found.items()
    }


def dump(value: object) -> str:
    """Return a value as JSON on one line."""
    return json.dumps(value, allow_nan=False)


def json_list(records: Sequence[Any]) -> Iterator[str]:
    """Yield a list inside a document, a record a line."""
    yield "["
    for index, record in enumerate(records):
        yield f"{',' if index else ''}\n  {dump(values(record))}"
    yield "\n ]" if records else "]"


def csv_lines(keys: Sequence[str], rows: Iterable[Mapping[str, Any]], *, raw: bool) -> Iterator[str]:
    """Yield a header and a line for each row; names in it are escaped already.

    `raw` leaves out the apostrophes before what could be a formula.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row if raw else {key: _defused(cell) for key, cell in row.items()})
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def _defused(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    if isinstance(cell, str) and cell.startswith((*_FORMULA, _DEFUSED)):
        return _DEFUSED + cell
    return cell
