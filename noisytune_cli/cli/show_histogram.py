"""A histogram as lines of blocks, JSON, CSV, or a figure."""

from __future__ import annotations

import json
from collections.abc import Iterator

from noisytune_cli.cli.show import write_report
from noisytune_cli.commands.histogram import Counted
from noisytune_cli.errors import UsageError
from noisytune_cli.escape import escape

_WIDTH = 50


def check_format(format: str) -> None:
    """Raise UsageError for a format that a histogram has not."""
    if format not in ("table", "json", "csv"):
        raise UsageError(
            f"--format {format}",
            why="a histogram has no such format",
            next_step="Use table, json or csv, or --plot for a figure",
        )


def show_histogram(found: Counted, format: str, *, out: str | None = None, plot: str | None = None) -> None:
    """Print the histogram, or write it to the file `out`, and draw it into the file `plot`."""
    if plot is not None:
        from noisytune_cli.cli import plots

        plots.write(plot, plots.draw_histogram(found))
    write_report(render(found, format), out, spelled=format == "table")


def render(found: Counted, format: str) -> Iterator[str]:
    """Yield the histogram in a format, in chunks."""
    return {"table": _lines, "json": _json, "csv": _csv}[format](found)


def _lines(found: Counted) -> Iterator[str]:
    tensor, bins = found.tensor, found.histogram
    most = max(bins.counts, default=1)
    yield f"{escape(tensor.name)}  {tensor.dtype} {list(tensor.shape)}\n"
    edges = [f"{edge:.4g}" for edge in bins.edges]
    width = max(map(len, edges), default=0)
    for edge, count in zip(edges, bins.counts, strict=False):
        bar = "█" * round(_WIDTH * count / most) or ("▏" if count else "")
        yield f"{edge:>{width}}  {bar:{_WIDTH}}  {count:,}\n"
    if edges:
        yield f"{edges[-1]:>{width}}\n"
    if bins.left_out:
        yield f"left out: {bins.left_out:,} that are NaN or Inf\n"


def _json(found: Counted) -> Iterator[str]:
    bins = found.histogram
    document = {
        "id": found.id,
        "name": found.tensor.name,
        "dtype": found.tensor.dtype,
        "shape": found.tensor.shape,
        "edges": bins.edges,
        "counts": bins.counts,
        "left_out": bins.left_out,
    }
    yield json.dumps(document, allow_nan=False) + "\n"


def _csv(found: Counted) -> Iterator[str]:
    bins = found.histogram
    yield "low,high,count\n"
    for index, count in enumerate(bins.counts):
        yield f"{bins.edges[index]!r},{bins.edges[index + 1]!r},{count}\n"
