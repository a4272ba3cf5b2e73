"""A study's report as one page: its methods in a table that sorts and filters, and below it report.md whole.

The text is what report.md says, through a Markdown parser that passes no HTML on; figures are its SVGs, each
as an image of its own inside the page, so that no style or name of one reaches another.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisytune_cli.cli.pages import Cell, Column, Page, render
from noisytune_cli.errors import unreadable
from noisytune_cli.escape import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markdown_it.renderer import RendererProtocol
    from markdown_it.token import Token

#: The page in a study's folder.
NAME = "report.html"

_NUMBER = re.compile(r"[<>]? ?([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?)")


def study_page(
    results: Mapping[str, Any], folder: Path, columns: Sequence[str], rows: Iterator[Mapping[str, str]]
) -> Iterator[str]:
    """Yield the page of a study in its folder, with the rows of its table, in chunks."""
    from noisytune_cli.study.report import wording

    study = results["study"]
    model, metric = study["model"], wording.METRICS[study["primary"]]
    commit = f" at commit {model['revision']}" if model.get("revision") else ""
    texts = {"method", "verdict"}
    return render(
        Page(
            title=f"{escape(model['id'])} on {escape(study['task'])}",
            facts=[
                ("model", f"{escape(model['id'])}{commit}"),
                ("task", escape(study["task"])),
                ("scores", f"{metric} × 100 on the dev rows"),
                ("runs", f"{results['finished']} of {results['planned']} finished"),
            ],
            provenances=(),
            lists=(),
            heat=None,
            rows_title="Scores",
            columns=[Column(name, is_text=name in texts) for name in columns],
            rows=[
                [Cell(row[name], None if name in texts else _number(row[name])) for name in columns]
                for row in rows
            ],
            body=_report(folder),
        )
    )


def _number(text: str) -> float | None:
    """Return the number that a cell begins with, by which it is sorted."""
    found = _NUMBER.match(text.replace("−", "-"))
    return None if found is None else float(found[1].replace(",", ""))


def _report(folder: Path) -> str:
    """Return report.md as HTML, without its title, which is the page's."""
    from markdown_it import MarkdownIt

    try:
        report = (folder / "report.md").read_text(encoding="utf-8")
        figures = {f"figures/{svg.stem}.png": svg.read_bytes() for svg in folder.glob("figures/*.svg")}
    except OSError as error:
        raise unreadable(error, folder) from error

    def image(renderer: RendererProtocol, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        token = tokens[at]
        content = figures.get(str(token.attrs.get("src")))
        if content is None:
            return _escaped(token.content)
        data = base64.b64encode(content).decode()
        return f'<img alt="{_escaped(token.content)}" src="data:image/svg+xml;base64,{data}">'

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("image", image)
    markdown.add_render_rule(
        "table_open",
        lambda *given: '<div class="scroll" role="region" aria-label="table" tabindex="0"><table>\n',
    )
    markdown.add_render_rule("table_close", lambda *given: "</table></div>\n")
    return str(markdown.render(report.partition("\n\n")[2]))


def _escaped(text: str) -> str:
    from markupsafe import escape as html

    return str(html(text))
