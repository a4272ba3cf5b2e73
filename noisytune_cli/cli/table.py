"""A table for people: lined up by width on screen; on a narrow terminal its less telling columns give way."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

from noisytune_cli.cli.show import is_terminal

_GAP = "  "


def lay_out(
    columns: Sequence[str],
    rows: Sequence[tuple[Mapping[str, str], str]],
    *,
    left: Collection[str],
    dispensable: Sequence[str],
    all_in: str,
) -> Iterator[str]:
    """Yield the lines of a table: its columns' names, then `rows`, each with the style that a terminal has.

    Columns begin at the left where they are in `left`, else they end at the right. On a terminal the
    `dispensable` go, the first first, until the rest fits; `all_in` is the option whose output has them all.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    on_terminal = is_terminal(sys.stdout)
    out = io.StringIO()
    console = Console(file=out, force_terminal=on_terminal or None)
    rows = [(dict(zip(columns, columns, strict=True)), "bold"), *rows]
    widths = {key: max(cell_len(row[key]) for row, _ in rows) for key in columns}
    dropped = _drop(widths, dispensable, console.width) if on_terminal else set()

    def line(text: str, style: str) -> str:
        console.print(Text(text, style), soft_wrap=True)
        printed = out.getvalue()
        out.seek(0)
        out.truncate()
        return printed

    for row, style in rows:
        cells = []
        for key, width in widths.items():
            blank = " " * (width - cell_len(row[key]))
            cells.append(row[key] + blank if key in left else blank + row[key])
        yield line(_GAP.join(cells).rstrip(), style)
    if dropped:
        names = ", ".join(key for key in columns if key in dropped)
        yield line(f"(too narrow for {names}; {all_in} has all)", "dim")


def _drop(widths: dict[str, int], dispensable: Sequence[str], available: int) -> set[str]:
    """Take columns out of `widths` until the rest fits; return their names."""
    dropped = set()
    for key in dispensable:
        if sum(widths.values()) + len(_GAP) * (len(widths) - 1) <= available:
            break
        if widths.pop(key, None) is not None:
            dropped.add(key)
    return dropped
