"""A report or a figure as a file: new, and whole or absent. It never takes the place of anything."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from noisytune_cli.errors import OutputUnsafe, unwritable


def check_new(path: str) -> None:
    """Raise OutputUnsafe where something lies at `path` already, before the work is done."""
    if os.path.lexists(os.path.expanduser(path)):
        raise _exists(path)


def write_new(path: str, content: bytes | Iterable[str]) -> None:
    """Write a file that must not exist, text in UTF-8; what fails leaves nothing."""
    target = Path(os.path.expanduser(path))
    try:
        with target.open("xb") as file:
            try:
                for chunk in (content,) if isinstance(content, bytes) else content:
                    file.write(chunk if isinstance(chunk, bytes) else chunk.encode())
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    target.unlink()
                raise
    except OSError as error:
        raise _exists(path) if error.errno == errno.EEXIST else unwritable(error, path) from error


def _exists(path: str) -> OutputUnsafe:
    return OutputUnsafe(
        "cannot write there",
        path=path,
        why="it exists, and a report replaces nothing",
        next_step="Choose another name, or remove it first",
    )
