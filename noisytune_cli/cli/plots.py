"""Figures of a comparison or an inspection, as PNG, SVG or PDF. Needs matplotlib (noisytune[plots])."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from noisytune_cli.cli.show import warn_all
from noisytune_cli.commands.compare import Comparison
from noisytune_cli.commands.heat_map import HeatMap
from noisytune_cli.commands.histogram import Counted
from noisytune_cli.errors import UsageError
from noisytune_cli.escape import escape
from noisytune_cli.output.reports import check_new, write_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What would tell when, and by which version, a file was made.
_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}

#: Layers that fit on a screen. Of more, what is said of all of them stands at the top.
_MOST_AT_A_GLANCE = 16

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Names come from checkpoints: a dollar sign is no mathematics.
    "text.parse_math": False,
    "svg.hashsalt": "noisytune",
}


def check(path: str) -> None:
    """Raise UsageError where no figure can be drawn, OutputUnsafe where the file exists."""
    if _ending(path) not in _METADATA:
        raise UsageError(
            f"--plot {path}",
            why="its ending tells no kind of figure",
            next_step="Give a name that ends in .png, .svg or .pdf",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "cannot draw",
            why="matplotlib is not installed",
            next_step="pip install '.[plots]' in a clone of noisytune, or leave --plot out",
        )
    check_new(path)


def write(path: str, figure: Figure) -> None:
    """Write a figure to a new file, in the format of its ending; the same figure is the same bytes."""
    import matplotlib

    content = io.BytesIO()
    kind = _ending(path)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure.savefig(content, format=kind, dpi=200, metadata=_METADATA[kind])
    warn_all(*write_new(path, content.getvalue()))


def draw_comparison(found: Comparison) -> Figure:
    """Draw the change by layer and kind, and by kind both measures of it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=(9.0, _height(found.heat_map)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _heat_map(figure, left, found.heat_map, "‖b - a‖₁ / ‖a‖₁")
        kinds = [row for row in found.kinds if row.change_norm is not None][::-1]
        for shift, key, label in (
            (0.2, "norm_change", "change of the norm"),
            (-0.2, "change_norm", "norm of the change"),
        ):
            values = [getattr(row, key) or 0.0 for row in kinds]
            right.barh([place + shift for place in range(len(kinds))], values, 0.38, label=label)
        right.set_yticks(range(len(kinds)), [row.name for row in kinds])
        right.set_xlabel("change, as a share of the L1 norm")
        right.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0))
        if len(found.heat_map.layers) > _MOST_AT_A_GLANCE:
            right.set_box_aspect(1.0)
            right.set_anchor("N")
        figure.suptitle(f"{escape(found.a.id, 60)} → {escape(found.b.id, 60)}")
    return figure


def draw_map(heat_map: HeatMap, title: str, label: str) -> Figure:
    """Draw a heat map alone."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=(6.0, _height(heat_map)), layout="constrained")
        _heat_map(figure, figure.subplots(), heat_map, label)
        figure.suptitle(title)
    return figure


def draw_histogram(found: Counted) -> Figure:
    """Draw how the values of a tensor are spread."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=(6.0, 3.6), layout="constrained")
        axes = figure.subplots()
        if found.histogram.counts:
            axes.stairs(found.histogram.counts, found.histogram.edges, fill=True)
        axes.set_xlabel("value")
        axes.set_ylabel("elements")
        axes.set_title(escape(found.tensor.name, 80))
    return figure


def _heat_map(figure: Figure, axes: Axes, heat_map: HeatMap, label: str) -> None:
    """Draw a heat map, with its scale beside it."""
    import numpy as np

    if not heat_map.layers:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing to draw", ha="center")
        return
    values = np.array(
        [[np.nan if value is None else value for value in line] for line in heat_map.values], float
    )
    drawn = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0.0)
    axes.set_xticks(range(len(heat_map.kinds)), heat_map.kinds)
    axes.tick_params(axis="x", labelrotation=30, labeltop=len(heat_map.layers) > _MOST_AT_A_GLANCE)
    axes.set_yticks(range(len(heat_map.layers)), [escape(layer, 40) for layer in heat_map.layers])
    figure.colorbar(drawn, ax=axes, label=label, anchor=(0.0, 1.0))


def _height(heat_map: HeatMap) -> float:
    """Return the inches that the rows of a heat map take, 40 at most."""
    return min(40.0, 1.6 + 0.24 * max(4, len(heat_map.layers)))


def _ending(path: str) -> str:
    return path.rpartition(".")[2].lower()
