"""A comparison as a table, JSON, JSONL, CSV or a page.

    table   for people: numbers rounded; by layer, a heat map of layers and kinds follows on a terminal
    json    one document: a, b, renamed, by, seeds, rows, totals, only_a, only_b, misfits, other_dtype…
    jsonl   a row a line, then {"only_a": …}, {"only_b": …} and {"misfit": …} a tensor, {"seed": …} a seed,
            {"totals": …}
    csv     a header, a row each, with a `status`: compared, only-a, only-b, misfit, seed; then the total
    html    one file that opens offline (page.html)

In JSON names are verbatim; everywhere else they are escaped. What does not exist is null or empty.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from noisytune_cli.cli.detect import entry_of, line_of
from noisytune_cli.cli.rows import csv_lines, dump, json_list, values
from noisytune_cli.cli.show import is_terminal, note, warn_all, write_report
from noisytune_cli.cli.table import lay_out
from noisytune_cli.commands.compare import ChangeRow, Comparison, Side
from noisytune_cli.commands.heat_map import HeatMap
from noisytune_cli.errors import Mismatch
from noisytune_cli.escape import enumerate_some, escape

_KEYS = tuple(field.name for field in fields(ChangeRow))

#: The table's columns, and those that a narrow terminal does without, the first to go first.
_COLUMNS = (
    "name",
    "b",
    "tensors",
    "dtype",
    "shape",
    "elements",
    "norm_change",
    "change_norm",
    "l2",
    "largest",
    "cosine",
    "equal",
    "noise",
)
_DISPENSABLE = ("b", "shape", "elements", "dtype", "tensors", "largest", "l2", "cosine", "equal")
_LEFT = {"name", "b", "dtype", "shape", "noise"}

#: The columns of a page and what is in them, and those that are texts.
_PAGE_COLUMNS = {
    "name": "the tensor, layer or kind",
    "b": "its name in B",
    "kind": "",
    "layer": "",
    "dtype": "",
    "shape": "",
    "tensors": "",
    "elements": "",
    "norm_change": "by which share the L1 norm changed",
    "change_norm": "the L1 norm of the change, as a share of A's",
    "l2": "the L2 norm of the change",
    "largest": "the largest change of a value",
    "cosine": "of the angle between A and B",
    "equal": "the share of equal elements",
    "noise": "what the change looks like, and λ with an interval of 95 %",
}
_TEXTS = {"name", "b", "kind", "layer", "dtype", "shape", "noise"}

#: What stands for a cell of the heat map, from nothing to the largest.
_BLOCKS = "·░▒▓█"


def show_comparison(
    found: Comparison, format: str, *, out: str | None = None, plot: str | None = None, raw: bool = False
) -> None:
    """Print the comparison, or write it to the file `out`, and draw it into the file `plot`."""
    warn_all(found.warnings)
    if found.renaming:
        note(f"names of B are those of A {found.renaming}")
    if plot is not None:
        from noisytune_cli.cli import plots

        plots.write(plot, plots.draw_comparison(found))
    chunks = render(found, format, raw=raw, blocks=out is None and _can_draw())
    write_report(chunks, out, spelled=format == "table")


def require_same(found: Comparison) -> None:
    """Raise Mismatch, which names what differs first, where anything does."""
    if not found.differs:
        return
    names = {
        "only A has": [lone.name for lone in found.only_a],
        "only B has": [lone.name for lone in found.only_b],
        "shape or dtype do not fit of": [misfit.name for misfit in found.misfits],
    }
    why = "; ".join(f"{text} {enumerate_some(some, 3)}" for text, some in names.items() if some)
    if not why and (largest := found.total.largest) is not None and found.total.equal != 1.0:
        why = f"the largest change is {largest:.4g}"
    raise Mismatch(
        "the checkpoints differ",
        path=found.b.id,
        why=why or "values or dtypes of some tensors are others",
        next_step="Leave --exit-code out to only look, or allow changes with --tolerance",
    )


def render(found: Comparison, format: str, *, raw: bool = False, blocks: bool = False) -> Iterator[str]:
    """Yield the comparison in a format, in chunks."""
    if format == "html":
        return _page(found)
    if format == "csv":
        return csv_lines(("status", *_KEYS), _csv_rows(found), raw=raw)
    return {
        "table": lambda: _table(found, blocks),
        "json": lambda: _json(found),
        "jsonl": lambda: _jsonl(found),
    }[format]()


def _json(found: Comparison) -> Iterator[str]:
    head = {
        "a": _side(found.a),
        "b": _side(found.b),
        "renamed": found.renaming or None,
        "by": found.by,
        "headers_only": found.headers_only,
        "tolerance": found.tolerance,
        "differs": found.differs,
        "seeds": [entry_of(score) for score in found.seeds],
    }
    yield "{\n" + "".join(f" {dump(key)}: {dump(value)},\n" for key, value in head.items())
    lists: dict[str, Sequence[Any]] = {
        "rows": found.rows,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "misfits": found.misfits,
    }
    for key, rows in lists.items():
        yield f" {dump(key)}: "
        yield from json_list(rows)
        yield ",\n"
    yield f' "other_dtype": {dump(found.other_dtype)},\n "totals": {dump(values(found.total))}\n}}\n'


def _jsonl(found: Comparison) -> Iterator[str]:
    for row in found.rows:
        yield f"{dump(values(row))}\n"
    for key, rows in (("only_a", found.only_a), ("only_b", found.only_b), ("misfit", found.misfits)):
        for lone in rows:
            yield f"{dump({key: values(lone)})}\n"
    for score in found.seeds:
        yield f"{dump({'seed': entry_of(score)})}\n"
    yield f"{dump({'totals': values(found.total)})}\n"


def _csv_rows(found: Comparison) -> Iterator[dict[str, Any]]:
    for row in found.rows:
        yield {"status": "compared", **_cells(row)}
    for status, side, lones in (
        ("only-a", "dtype_a", found.only_a),
        ("only-b", "dtype_b", found.only_b),
    ):
        for lone in lones:
            name = escape(lone.name, None)
            yield {"status": status, "name": name, side: lone.dtype, "shape": _shape(lone.shape)}
    for misfit in found.misfits:
        yield {
            "status": "misfit",
            "name": escape(misfit.name, None),
            "dtype_a": misfit.dtype_a,
            "dtype_b": misfit.dtype_b,
            "shape": f"{_shape(misfit.shape_a)} {_shape(misfit.shape_b)}",
        }
    for score in found.seeds:
        yield {
            "status": "seed",
            "name": str(score.seed),
            "noise": score.distribution if score.found else "",
            "lam": score.lam,
            "lam_low": score.low,
            "lam_high": score.high,
        }
    yield {"status": "total", **_cells(found.total)}


def _cells(row: ChangeRow) -> dict[str, Any]:
    return {
        **values(row),
        "name": escape(row.name, None),
        "layer": None if row.layer is None else escape(row.layer, None),
        "b": None if row.b is None else escape(row.b, None),
        "shape": _shape(row.shape),
    }


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else str(list(shape))


def _side(side: Side) -> dict[str, Any]:
    return {"id": side.id, "revision": side.revision}


def _table(found: Comparison, blocks: bool) -> Iterator[str]:
    total = {**cells(found.total), "name": f"{found.total.tensors:,} compared", "tensors": ""}
    rows = [(cells(row), "") for row in found.rows] + [(total, "bold")]
    # Those with something to say: no blank ones, no count of tensors where each has a row.
    columns = [
        key
        for key in _COLUMNS
        if any(row[key] for row, _ in rows) and (key != "tensors" or found.by != "tensor")
    ]
    yield from lay_out(columns, rows, left=_LEFT, dispensable=_DISPENSABLE, all_in="--format csv")
    for text, names in listed(found).items():
        if names:
            yield f"{text} ({len(names):,}): {enumerate_some(names)}\n"
    width = max((len(str(score.seed)) for score in found.seeds), default=0)
    yield from (line_of(score, width) for score in found.seeds)
    if blocks and found.by == "layer" and found.heat_map.layers:
        yield from draw_blocks(found.heat_map)


def listed(found: Comparison) -> dict[str, list[str]]:
    """Return the names of what has no row of its own, or another dtype, by what is to be said of them."""
    return {
        "only in A": [lone.name for lone in found.only_a],
        "only in B": [lone.name for lone in found.only_b],
        "another shape, or dtypes that cannot be compared": [misfit.name for misfit in found.misfits],
        "another dtype": list(found.other_dtype),
    }


def cells(row: ChangeRow) -> dict[str, str]:
    """Return the cells of a row for people; what does not exist is blank."""
    dtype = row.dtype_a or ""
    return {
        "name": escape(row.name),
        "b": escape(row.b) if row.b else "",
        "tensors": f"{row.tensors:,}",
        "dtype": dtype if row.dtype_b in (None, dtype) else f"{dtype} → {row.dtype_b}",
        "shape": _shape(row.shape),
        "elements": f"{row.elements:,}",
        **{
            key: "" if (value := getattr(row, key)) is None else f"{value:.4g}"
            for key in ("norm_change", "change_norm", "l2", "largest")
        },
        "cosine": "" if row.cosine is None else f"{row.cosine:.6f}",
        "equal": "" if row.equal is None else f"{_percent(row.equal)}%",
        "noise": noise_text(row),
    }


def _percent(share: float) -> str:
    """Write a share in percent; only all is 100, and only nothing 0."""
    shown = f"{100 * share:.4g}"
    return ">99.99" if shown == "100" and share < 1 else shown


def noise_text(row: ChangeRow) -> str:
    """Say what noise the change of a tensor looks like."""
    if row.noise is None or row.lam is None or row.lam_low is None or row.lam_high is None:
        return ""
    return f"{row.noise} λ {row.lam:.4g} [{row.lam_low:.4g}, {row.lam_high:.4g}]"


def _page(found: Comparison) -> Iterator[str]:
    """Yield the page."""
    from noisytune_cli.cli import pages

    rows: list[dict[str, pages.Cell]] = []
    for row in found.rows:
        texts = cells(row)
        texts |= {"kind": row.kind or "", "layer": escape(row.layer or "")}
        # As what it looks like is a text, its order is that of λ.
        numbers: dict[str, Any] = {key: getattr(row, key, None) for key in _PAGE_COLUMNS}
        numbers["noise"] = row.lam
        rows.append({key: pages.Cell(text, pages.number_of(numbers.get(key))) for key, text in texts.items()})
    columns = [
        pages.Column(key, told, is_text=key in _TEXTS)
        for key, told in _PAGE_COLUMNS.items()
        if any(row[key].text for row in rows)
    ]
    noun = "tensor" if found.by == "tensor" else found.by
    total = cells(found.total)
    return pages.render(
        pages.Page(
            title=f"{escape(found.a.id)} → {escape(found.b.id)}",
            facts=[
                (label, value)
                for label, value in (
                    ("A", _named(found.a.id, found.a.revision)),
                    ("B", _named(found.b.id, found.b.revision)),
                    ("names", f"those of B are A's {found.renaming}" if found.renaming else ""),
                    ("compared", f"{found.total.tensors:,} tensors, {found.total.elements:,} elements"),
                    ("change of the L1 norm", total["norm_change"]),
                    ("L1 norm of the change", total["change_norm"]),
                    ("L2 norm of the change", total["l2"]),
                    ("largest change", total["largest"]),
                    ("cosine", total["cosine"]),
                    ("equal", total["equal"]),
                    *_seed_facts(found),
                )
                if value
            ],
            provenances=[
                (f"How {label} was made", side.provenance)
                for label, side in (("A", found.a), ("B", found.b))
                if side.provenance is not None
            ],
            lists=list(listed(found).items()),
            heat=pages.heat("The L1 norm of the change, by layer and kind", found.heat_map),
            rows_title=f"By {noun}",
            columns=columns,
            rows=[[row[column.name] for column in columns] for row in rows],
        )
    )


def _seed_facts(found: Comparison) -> Iterator[tuple[str, str]]:
    """Say of which seeds the noise is there; of all others together that it is not."""
    for score in found.seeds:
        if score.found:
            yield "noise of", line_of(score).strip()
    if others := [str(score.seed) for score in found.seeds if not score.found]:
        yield "no noise of", f"seed {enumerate_some(others)}"


def _named(id: str, revision: str | None) -> str:
    return escape(id) + (f" at commit {revision}" if revision else "")


def draw_blocks(heat_map: HeatMap) -> Iterator[str]:
    """Yield the lines of the heat map, drawn with blocks."""
    from rich.cells import cell_len

    values = [value for line in heat_map.values for value in line if value is not None]
    top = max(values, default=0.0)
    names = [escape(layer, 40) for layer in heat_map.layers]
    width = max(map(cell_len, (*names, "change_norm")))
    yield f"\n{'change_norm':{width}}  {'  '.join(heat_map.kinds)}\n"
    for name, line in zip(names, heat_map.values, strict=True):
        drawn = [
            (_block(value, top) * min(len(kind), 6)).ljust(len(kind))
            for kind, value in zip(heat_map.kinds, line, strict=True)
        ]
        yield f"{name}{' ' * (width - cell_len(name))}  {'  '.join(drawn).rstrip()}\n"
    if top:
        steps = [f"{mark} to {top * (step + 1) / 4:.2g}" for step, mark in enumerate(_BLOCKS[1:])]
        yield f"{_BLOCKS[0]} no change, {', '.join(steps)}\n"


def _block(value: float | None, top: float) -> str:
    if value is None:
        return " "
    return _BLOCKS[math.ceil(4 * value / top)] if top else _BLOCKS[0]


def _can_draw() -> bool:
    if not is_terminal(sys.stdout):
        return False
    try:
        _BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
