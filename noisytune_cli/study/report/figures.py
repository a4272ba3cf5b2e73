"""The figures of a study as files: PNG for the report, SVG for a paper.

The same results give the same bytes with the same matplotlib: no date, no random identifiers, and the font
that matplotlib brings.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noisytune_cli.errors import unwritable
from noisytune_cli.study.report.plots import PLOTS

#: Where the figures lie in a study's folder.
FOLDER = "figures"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    # Names come from users: a dollar sign is no mathematics.
    "text.parse_math": False,
    "svg.hashsalt": "noisytune",
}

#: What would tell when, and by which version, a file was made.
_METADATA: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def draw(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Write every figure that the results have data for, as PNG and SVG; return the figures' names.

    Files are whole or absent. Raises ResourceExhausted where they cannot be written.
    """
    import matplotlib

    drawn = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        for name, plot in PLOTS.items():
            figure = plot(results)
            if figure is None:
                continue
            for kind, metadata in _METADATA.items():
                content = io.BytesIO()
                figure.savefig(content, format=kind, dpi=200, metadata=metadata)
                _write(folder / f"{name}.{kind}", content.getvalue())
            drawn.append(name)
    return drawn


def _write(path: Path, content: bytes) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_bytes(content)
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(error, path) from error
