"""An inspection as a table, JSON, JSONL, CSV or a page.

    table   for people: numbers rounded; on a terminal too narrow, less telling columns give way
    json    one document: id, revision, lambda, quantized, tensors, totals
    jsonl   a tensor a line, then {"totals": …}, in which no key of a tensor occurs: sums in jq stay right
    csv     a header, then a tensor a row
    html    one file that opens offline (page.html)

Of several checkpoints there is a table each, a list of documents, a key or column `id` in every line.

In JSON, JSONL and CSV floats round-trip and what does not exist is null or empty. JSON spells control
characters as escapes, so names in it are verbatim; elsewhere names are escaped, one line for each row, and in
CSV they are no formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from noisytune_cli.cli.rows import csv_lines, dump, json_list, values
from noisytune_cli.cli.show import TOLD_BY, note, warn, warn_all, write_report
from noisytune_cli.cli.table import lay_out
from noisytune_cli.commands.heat_map import HeatMap, arrange
from noisytune_cli.commands.inspect import Inspection, TensorReport, Totals
from noisytune_cli.escape import escape
from noisytune_cli.plan.groups import kinds_of, layers_of

_KEYS = tuple(field.name for field in fields(TensorReport) if field.name != "percentiles")

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


def show_inspections(
    inspections: Sequence[Inspection],
    format: str,
    *,
    out: str | None = None,
    plot: str | None = None,
    raw: bool = False,
) -> None:
    """Print what was found in a format, or write it to the file `out`; draw that of the first in `plot`.

    On stderr is what the user should know of it. `raw` leaves CSV without the apostrophes before what could
    be a formula.
    """
    for inspection in inspections:
        whose = f"{escape(inspection.id)}: " if len(inspections) > 1 else ""
        warn_all(f"{whose}{warning}" for warning in inspection.warnings)
        if inspection.quantized is not None:
            warn(f"{whose}perturb would refuse this checkpoint: {inspection.quantized}")
        if inspection.earlier is not None:
            note(f"{whose}{inspection.earlier}")
    if plot is not None:
        from noisytune_cli.cli import plots

        inspection = inspections[0]
        plots.write(plot, plots.draw_map(std_map(inspection), f"std of {escape(inspection.id, 60)}", "std"))
    write_report(render(inspections, format, raw=raw), out, spelled=format == "table")


def render(inspections: Sequence[Inspection], format: str, *, raw: bool = False) -> Iterator[str]:
    """Yield inspections in a format, in chunks."""
    if format == "csv":
        yield from _csv(inspections, raw=raw)
    elif format == "html":
        yield from _page(*inspections)
    elif format == "jsonl":
        for inspection in inspections:
            yield from _jsonl(inspection, named=len(inspections) > 1)
    elif len(inspections) == 1:
        yield from (_json if format == "json" else _table)(*inspections)
    elif format == "json":
        for index, inspection in enumerate(inspections):
            yield ",\n" if index else "[\n"
            yield from _json(inspection)
        yield "]\n"
    else:
        for index, inspection in enumerate(inspections):
            yield "\n" if index else ""
            yield f"{escape(inspection.id)}\n"
            yield from _table(inspection)


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
    shapes = {row.name: row.shape for row in inspection.tensors if row.part is None}
    return kinds_of(names, buffers, shapes), layers_of(names)


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


def _jsonl(inspection: Inspection, *, named: bool = False) -> Iterator[str]:
    whose = {"id": inspection.id} if named else {}
    for row in inspection.tensors:
        yield f"{dump(whose | values(row))}\n"
    yield f"{dump(whose | {'totals': values(inspection.totals)})}\n"


def _csv(inspections: Sequence[Inspection], *, raw: bool) -> Iterator[str]:
    named = ("id",) if len(inspections) > 1 else ()
    keys = (*named, *_KEYS, *_percentiles(*inspections))
    return csv_lines(keys, (_cells(of, row, keys) for of in inspections for row in of.tensors), raw=raw)


def _percentiles(*inspections: Inspection) -> tuple[str, ...]:
    """Return the names of the percentiles that were asked for."""
    rows = (row for inspection in inspections for row in inspection.tensors)
    return next((tuple(row.percentiles) for row in rows if row.percentiles), ())


def _cells(inspection: Inspection, row: TensorReport, keys: Sequence[str]) -> dict[str, Any]:
    cells = {
        **values(row),
        **(row.percentiles or {}),
        "id": escape(inspection.id, None),
        "name": escape(row.name, None),
        "file": escape(row.file, None),
        "stream": escape(row.stream, None),
        "shape": str(list(row.shape)),
        "unsure": " ".join(row.unsure),
        "path": None if row.path is None else escape(row.path, None),
    }
    return {key: cells.get(key) for key in keys}


def _with(percentiles: Sequence[str]) -> tuple[str, ...]:
    """Return the table's columns with percentiles among them."""
    at = _COLUMNS.index("max") + 1
    return (*_COLUMNS[:at], *percentiles, *_COLUMNS[at:])


def _noise(row: TensorReport) -> str:
    if row.noise_std is not None:
        return f"σ {_number(row.noise_std)}"
    return "" if row.high is None else f"±{_number(row.high)}"


def _table(inspection: Inspection) -> Iterator[str]:
    percentiles = _percentiles(inspection)
    several = len({row.file for row in inspection.tensors}) != 1
    # Those with something to say: no blank ones, no file's name where there is one file.
    columns = [key for key in _with(percentiles) if several or key != "file"]
    return lay_out(
        columns,
        _Rows(inspection, dict.fromkeys(percentiles, "")),
        left=_LEFT,
        dispensable=(*_DISPENSABLE, *percentiles),
        all_in="--format csv",
        shortened=_SHORTENED,
        without_blanks=True,
    )


class _Rows:
    """The rows of a table with their styles, made whenever they are gone through: kept they take 100 MB."""

    def __init__(self, inspection: Inspection, blank: Mapping[str, str]) -> None:
        self._inspection, self._blank = inspection, dict(blank)

    def __iter__(self) -> Iterator[tuple[dict[str, str], str]]:
        for row in self._inspection.tensors:
            yield self._blank | _row(row), "yellow" if row.nan or row.inf else ""
        yield self._blank | _total_row(self._inspection.totals), "bold"


def _page(inspection: Inspection) -> Iterator[str]:
    """Yield the page."""
    from noisytune_cli.cli import pages

    kinds, layers = _groups(inspection)
    blank = dict.fromkeys(_percentiles(inspection), "")
    rows = []
    for row in inspection.tensors:
        texts = {**blank, **_row(row), "kind": kinds[row.name], "layer": escape(layers[row.name])}
        numbers = {
            **values(row),
            **(row.percentiles or {}),
            "noise": row.noise_std if row.high is None else row.high,
        }
        rows.append({key: pages.Cell(text, pages.number_of(numbers.get(key))) for key, text in texts.items()})
    wanted = ("name", "kind", "layer", *_with(_percentiles(inspection))[1:])
    columns = [
        pages.Column(key, is_text=key in _LEFT or key in ("kind", "layer"))
        for key in wanted
        if any(key in row and row[key].text for row in rows)
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
    return pages.render(
        pages.Page(
            title=escape(inspection.id),
            facts=[(label, value) for label, value in facts if value],
            provenances=[("How it was made", inspection.provenance)] if inspection.provenance else [],
            lists=[],
            heat=pages.heat("The std, by layer and kind", std_map(inspection)),
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
        **{key: _number(value) for key, value in (row.percentiles or {}).items()},
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
        "action": f"{totals.perturbed:,} of {totals.tensors:,}",
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
