"""A report or a figure as a file: new, and whole or absent. It never takes the place of anything."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from noisytune_cli.errors import OutputUnsafe


def check_new(path: str) -> None:
    """Raise OutputUnsafe where something lies at `path`, or no folder is there for it, before the work."""
    target = Path(os.path.expanduser(path))
    if os.path.lexists(target):
        raise _exists(path)
    if not os.path.isdir(target.parent):  # Path's raises for a name that is too long
        raise OutputUnsafe(
            "cannot write there",
            path=path,
            why="the folder it is to lie in is not there",
            next_step="Make that folder first, or choose another name",
        )


def write_new(path: str, content: bytes | Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write a file that must not exist, text in UTF-8, durably; what fails leaves nothing.

    Return warnings, and the names of what killed runs had left and this one has removed.
    """
    from noisytune_cli.output.publish import Publication  # most reports are printed

    target = Path(os.path.expanduser(path))
    pieces = content if isinstance(content, bytes) else (text.encode() for text in content)
    try:
        # A file without another beside it, as a recipe is.
        with Publication(target, directory=False, overwrite=False, recipe=True) as publication:
            publication.publish(pieces)
    except OutputUnsafe as error:
        if os.path.lexists(target):  # it has appeared meanwhile
            raise _exists(path) from error
        raise
    return publication.warnings, publication.cleared


def _exists(path: str) -> OutputUnsafe:
    return OutputUnsafe(
        "cannot write there",
        path=path,
        why="it exists, and a report replaces nothing",
        next_step="Choose another name, or remove it first",
    )
