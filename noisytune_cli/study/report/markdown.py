"""The few pieces of Markdown that a report is made of; text from users and files is shown as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from noisytune_cli.escape import escape

#: What Markdown, or a renderer's mathematics, would take for markup.
_MARKUP = set("\\`*_[]<>|#$~")


def text(words: str) -> str:
    """Return text from a user or a file so that it is shown as it is, on one line."""
    return "".join(f"\\{c}" if c in _MARKUP else c for c in escape(words, None))


def bullets(items: Iterable[str]) -> str:
    """Return a list."""
    return "\n".join(f"- {item}" for item in items)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def image(path: str, caption: str) -> str:
    """Return a figure with its caption, which is read where the image is not seen."""
    return f"![{caption}]({path})\n\n*{caption}*"
