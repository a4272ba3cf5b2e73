"""A table for people: lined up by width on screen; on a narrow terminal its less telling columns give way."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from types import MappingProxyType

from noisytune_cli.cli.show import is_terminal

_GAP = "  "


def lay_out(
    columns: Sequence[str],
    rows: Iterable[tuple[Mapping[str, str], str]],
    *,
    left: Collection[str],
    dispensable: Sequence[str],
    all_in: str,
    shortened: Mapping[str, int] = MappingProxyType({}),
    without_blanks: bool = False,
) -> Iterator[str]:
    """Yield the lines of a table: its columns' names, then `rows`, each with the style that a terminal has.

    Columns begin at the left where they are in `left`, else they end at the right. On a terminal the
    `dispensable` go, the first first, until the rest fits, and cells of the `shortened` lose their middle,
    down to the width that is given; `all_in` is the option whose output has everything. `without_blanks`
    leaves out columns in which no row has anything. The rows are gone through twice, and not kept.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    on_terminal = is_terminal(sys.stdout)
    out = io.StringIO()
    # COLUMNS=0 says that nobody knows the width; rich would print nothing at all.
    unknown = os.environ.get("COLUMNS", "1").strip("0") == ""
    console = Console(file=out, force_terminal=on_terminal or None, width=80 if unknown else None)
    widths = dict.fromkeys(columns, 0)
    for row, _ in rows:
        for key in columns:
            if (width := cell_len(row[key])) > widths[key]:
                widths[key] = width
    widths = {key: max(n, cell_len(key)) for key, n in widths.items() if n or not without_blanks}
    dropped = set()
    if on_terminal:
        least = {key: min(width, shortened.get(key, width)) for key, width in widths.items()}
        dropped = _drop(least, dispensable, console.width)
        spare = console.width - _taken(least)
        for key in least:
            grown = min(widths[key], least[key] + max(0, spare))
            spare -= grown - least[key]
            least[key] = grown
        widths = least

    def line(text: str, style: str) -> str:
        console.print(Text(text, style), soft_wrap=True)
        printed = out.getvalue()
        out.seek(0)
        out.truncate()
        return printed

    for row, style in chain([(dict(zip(columns, columns, strict=True)), "bold")], rows):
        cells = []
        for key, width in widths.items():
            cell = _shorten(row[key], width) if key in shortened else row[key]
            blank = " " * (width - cell_len(cell))
            cells.append(cell + blank if key in left else blank + cell)
        yield line(_GAP.join(cells).rstrip(), style)
    if dropped:
        names = ", ".join(key for key in columns if key in dropped)
        said = f"(too narrow for {names}; {all_in} has all)"
        if cell_len(said) > console.width:
            said = f"({len(dropped)} columns more in {all_in})"
        yield line(said, "dim")


def _drop(widths: dict[str, int], dispensable: Sequence[str], available: int) -> set[str]:
    """Take columns out of `widths` until the rest fits; return their names."""
    dropped = set()
    for key in dispensable:
        if _taken(widths) <= available:
            break
        if widths.pop(key, None) is not None:
            dropped.add(key)
    return dropped


def _taken(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + len(_GAP) * (len(widths) - 1)


def _shorten(text: str, width: int) -> str:
    """Take as much out of the middle of a text as it is too wide; its end tells more than its beginning."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    head, tail = "", ""
    for before, after in zip_longest(text, reversed(text), fillvalue=""):
        if cell_len(head + tail) + cell_len(after) >= width:
            break
        tail = after + tail
        if cell_len(head + tail) + cell_len(before) >= width:
            break
        head += before
    return f"{head}…{tail}"
