"""An inspection as a table, JSON, JSONL, CSV or a page.

    table   for people: numbers rounded; on a terminal too narrow, less telling columns give way
    json    one document: id, revision, lambda, quantized, tensors, totals
    jsonl   a tensor a line, then {"totals": …}, in which no key of a tensor occurs: sums in jq stay right
    csv     a header, a tensor a row, then a row named TOTAL without a dtype
    html    one file that opens offline (page.html)

In JSON, JSONL and CSV floats round-trip and what does not exist is null or empty. JSON spells control
characters as escapes, so names in it are verbatim; elsewhere names are escaped, one line for each row, and in
CSV they are no formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import chain
from typing import Any

from noisytune_cli.cli.pages import Cell, Column, Page, heat, number_of
from noisytune_cli.cli.pages import render as render_page
from noisytune_cli.cli.rows import csv_lines, dump, json_list, values
from noisytune_cli.cli.show import TOLD_BY, note, warn, warn_all, write_out
from noisytune_cli.cli.table import lay_out
from noisytune_cli.commands.heat_map import HeatMap, arrange
from noisytune_cli.commands.inspect import Inspection, TensorReport, Totals
from noisytune_cli.escape import escape
from noisytune_cli.plan.groups import kinds_of, layers_of

_KEYS = tuple(field.name for field in fields(TensorReport))

#: The table's columns, and those that a narrow terminal does without, the first to go first.
_COLUMNS = (
    "name",
    "file",
    "dtype",
    "shape",
    "elements",
    "mean",
    "std",
    "min",
    "max",
    "l1",
    "l2",
    "zeros",
    "nan",
    "inf",
    "noise",
    "action",
)
_DISPENSABLE = ("file", "l1", "elements", "nan", "inf", "l2", "zeros", "mean", "max", "min", "dtype", "shape")
#: What a narrow terminal shows without its middle, and how much of it at the least.
_SHORTENED = {"name": 30, "action": 16}

_LEFT = {"name", "file", "dtype", "shape", "action"}


def show_inspection(
    inspection: Inspection,
    format: str,
    *,
    out: str | None = None,
    plot: str | None = None,
    raw: bool = False,
) -> None:
    """Print the inspection in one of FORMATS, or write it to the file `out`, and draw it into `plot`.

    On stderr is what the user should know of it. `raw` leaves CSV without the apostrophes before what could
    be a formula.
    """
    from noisytune_cli.output.reports import write_new

    warn_all(inspection.warnings)
    if inspection.quantized is not None:
        warn(f"perturb would refuse this checkpoint: {inspection.quantized}")
    if inspection.earlier is not None:
        note(inspection.earlier)
    if plot is not None:
        from noisytune_cli.cli import plots

        plots.write(plot, plots.draw_map(std_map(inspection), f"std of {escape(inspection.id, 60)}", "std"))
    if out is None:
        write_out(render(inspection, format, raw=raw), spelled=format == "table")
    else:
        write_new(out, render(inspection, format, raw=raw))


def render(inspection: Inspection, format: str, *, raw: bool = False) -> Iterator[str]:
    """Yield the inspection in one of FORMATS, in chunks."""
    return _csv(inspection, raw=raw) if format == "csv" else FORMATS[format](inspection)


def std_map(inspection: Inspection) -> HeatMap:
    """Return the std by layer and kind: the root mean square, over all values, of their tensors' own."""
    kinds, layers = _groups(inspection)
    squares: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in inspection.tensors:
        if row.std is not None:
            cell = layers[row.name], kinds[row.name]
            squares.setdefault(cell, []).append((row.elements, row.elements * row.std**2))
    return arrange(
        {
            cell: math.sqrt(sum(square for _, square in found) / sum(count for count, _ in found))
            for cell, found in squares.items()
        }
    )


def _groups(inspection: Inspection) -> tuple[dict[str, str], dict[str, str]]:
    """Return the kind and the layer of each name."""
    names = [row.name for row in inspection.tensors]
    buffers = {row.name for row in inspection.tensors if row.reason == "buffer"}
    return kinds_of(names, buffers), layers_of(names)


def _json(inspection: Inspection) -> Iterator[str]:
    head = {
        "id": inspection.id,
        "revision": inspection.revision,
        "lambda": inspection.lam,
        **({} if inspection.sigma is None else {"sigma": inspection.sigma}),
        "quantized": inspection.quantized,
    }
    yield "{\n" + "".join(f" {dump(key)}: {dump(value)},\n" for key, value in head.items())
    yield ' "tensors": '
    yield from json_list(inspection.tensors)
    yield f',\n "totals": {dump(values(inspection.totals))}\n}}\n'


def _jsonl(inspection: Inspection) -> Iterator[str]:
    for row in inspection.tensors:
        yield f"{dump(values(row))}\n"
    yield f"{dump({'totals': values(inspection.totals)})}\n"


def _csv(inspection: Inspection, *, raw: bool) -> Iterator[str]:
    totals = inspection.totals
    total = {
        "name": "TOTAL",
        "elements": totals.parameters,
        "bytes": totals.bytes,
        "nan": totals.nan,
        "inf": totals.inf,
        "action": f"{totals.perturbed} of {totals.tensors} perturbed",
    }
    return csv_lines(_KEYS, chain(map(_cells, inspection.tensors), [total]), raw=raw)


def _cells(row: TensorReport) -> dict[str, Any]:
    return {
        **values(row),
        "name": escape(row.name, None),
        "file": escape(row.file, None),
        "stream": escape(row.stream, None),
        "shape": str(list(row.shape)),
        "unsure": " ".join(row.unsure),
        "path": None if row.path is None else escape(row.path, None),
    }


def _noise(row: TensorReport) -> str:
    if row.noise_std is not None:
        return f"σ {_number(row.noise_std)}"
    return "" if row.high is None else f"±{_number(row.high)}"


def _table(inspection: Inspection) -> Iterator[str]:
    rows = [(_row(row), "yellow" if row.nan or row.inf else "") for row in inspection.tensors]
    rows.append((_total_row(inspection.totals), "bold"))
    several = len({row.file for row in inspection.tensors}) != 1
    # Those with something to say: no blank ones, no file's name where there is one file.
    columns = [key for key in _COLUMNS if any(row[key] for row, _ in rows) and (several or key != "file")]
    return lay_out(
        columns, rows, left=_LEFT, dispensable=_DISPENSABLE, all_in="--format csv", shortened=_SHORTENED
    )


def _page(inspection: Inspection) -> Iterator[str]:
    """Yield the page."""
    kinds, layers = _groups(inspection)
    rows = []
    for row in inspection.tensors:
        texts = {**_row(row), "kind": kinds[row.name], "layer": escape(layers[row.name])}
        numbers = {**values(row), "noise": row.noise_std if row.high is None else row.high}
        rows.append({key: Cell(text, number_of(numbers.get(key))) for key, text in texts.items()})
    wanted = ("name", "kind", "layer", *_COLUMNS[1:])
    columns = [
        Column(key, is_text=key in _LEFT or key in ("kind", "layer"))
        for key in wanted
        if any(row[key].text for row in rows)
    ]
    totals = inspection.totals
    strength = f"λ {inspection.lam:g}" if inspection.sigma is None else f"σ {inspection.sigma:g}"
    facts = [
        ("checkpoint", escape(inspection.id)),
        ("commit", inspection.revision or ""),
        ("tensors", f"{totals.perturbed:,} of {totals.tensors:,} would be perturbed"),
        ("parameters", f"{totals.parameters:,} in {totals.bytes:,} bytes"),
        ("NaN, Inf", f"{totals.nan:,}, {totals.inf:,}" if totals.nan or totals.inf else ""),
        ("quantised", escape(inspection.quantized or "", 500)),
    ]
    return render_page(
        Page(
            title=escape(inspection.id),
            facts=[(label, value) for label, value in facts if value],
            provenances=[("How it was made", inspection.provenance)] if inspection.provenance else [],
            lists=[],
            heat=heat("The std, by layer and kind", std_map(inspection)),
            rows_title=f"By tensor (noise of {strength})",
            columns=columns,
            rows=[[row[column.name] for column in columns] for row in rows],
        )
    )


def _row(row: TensorReport) -> dict[str, str]:
    """Return the cells of a tensor; what does not exist is blank."""
    action = row.action if row.reason is None else row.reason
    if row.reason == "buffer":
        action += f", told by {TOLD_BY[row.told_by]}"
    if row.unsure:
        action += f", unless {' or '.join(row.unsure)}"
    if row.stream != row.name:
        action += f", noise of {escape(row.stream)}"
    if row.undivided is not None:
        action += f"; one matrix: {escape(row.undivided)}"
    shown = row.path or row.name
    return {
        "name": escape(shown) if row.part is None else f"{escape(shown)}[{escape(row.part)}]",
        "file": escape(row.file),
        "dtype": row.dtype,
        "shape": str(list(row.shape)),
        "elements": f"{row.elements:,}",
        **{key: _number(getattr(row, key)) for key in ("mean", "std", "min", "max", "l1", "l2")},
        "zeros": "" if row.zeros is None else f"{_number(100 * row.zeros)}%",
        "nan": _count(row.nan),
        "inf": _count(row.inf),
        "noise": _noise(row),
        "action": action,
    }


def _total_row(totals: Totals) -> dict[str, str]:
    noun = "tensor" if totals.tensors == 1 else "tensors"
    return {
        **dict.fromkeys(_COLUMNS, ""),
        "name": f"{totals.tensors:,} {noun}, {totals.bytes:,} bytes",
        "elements": f"{totals.parameters:,}",
        "nan": _count(totals.nan),
        "inf": _count(totals.inf),
        "action": f"{totals.perturbed:,} of {totals.tensors:,} perturbed",
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


FORMATS: dict[str, Callable[..., Iterator[str]]] = {
    "table": _table,
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
    "html": _page,
}
