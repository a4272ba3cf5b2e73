"""A report as one HTML file that opens offline: no request to any address, by a policy that browsers hold.

The page is a Jinja template that escapes whatever it is given, so a tensor called `<script>` stays text, and
its policy runs no script but its own, which it names by digest. The table is in the page, whole, without a
script too; sorting and filtering move its rows.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from noisytune_cli.commands.heat_map import HeatMap
from noisytune_cli.commands.provenance import Provenance
from noisytune_cli.escape import escape
from noisytune_cli.version import __version__


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table; `help` says what is in it."""

    name: str
    help: str = ""
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell shows, and what it is sorted by where that is a number."""

    text: str
    number: float | None = None


@dataclass(frozen=True, slots=True)
class HeatCell:
    """A cell of the heat map; `share` (0 to 1) of the largest makes its colour, `full` is for its tooltip."""

    kind: str
    text: str
    full: str
    share: float


@dataclass(frozen=True, slots=True)
class Heat:
    """A heat map: a row for each layer, a cell or None for each kind."""

    title: str
    kinds: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """What the template is given; `body` is HTML, that of a report whose text was escaped."""

    title: str
    facts: Sequence[tuple[str, str]]
    provenances: Sequence[tuple[str, Provenance]]
    lists: Sequence[tuple[str, Sequence[str]]]
    heat: Heat | None
    rows_title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    body: str = ""


def render(page: Page) -> Iterator[str]:
    """Yield the page in chunks."""
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["shown"] = lambda text: escape(text, None)
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").generate(
        page=page, script=script, script_digest=f"sha256-{digest}", version=__version__
    )


def heat(title: str, heat_map: HeatMap) -> Heat | None:
    """Return a heat map as the template takes it, None where it has no layers."""
    top = max((value for line in heat_map.values for value in line if value is not None), default=0.0)
    rows = [
        (
            layer,
            tuple(
                None
                if value is None
                else HeatCell(kind, f"{value:.2g}", f"{value:.6g}", value / top if top else 0.0)
                for kind, value in zip(heat_map.kinds, line, strict=True)
            ),
        )
        for layer, line in zip(heat_map.layers, heat_map.values, strict=True)
    ]
    return Heat(title, heat_map.kinds, tuple(rows)) if rows else None


def number_of(value: object) -> float | None:
    """Return what a cell is sorted by where that is a number."""
    return value if isinstance(value, int | float) else None
