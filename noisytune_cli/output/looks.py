"""What stands at a path: taken down before it is replaced, and compared once it is out of the way.

An exchange of names cannot ask what it moves. So what was moved is looked at again, and swapped back if it is
not what was seen: somebody has added to it, changed it, or put another thing there meanwhile.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

#: Type, inode, and for what is no directory size and times, by the name in what was looked at.
Look = Mapping[str, tuple[int, ...]]


def look(path: Path) -> Look | None:
    """Return what stands at `path`, with all that is in it; None where nothing does."""
    try:
        status = os.lstat(path)
        # A rename changes the ctime of what it renames, and of nothing in it.
        top = _status(status)[:-1] if not stat.S_ISDIR(status.st_mode) else _status(status)
        return {"": top, **dict(_inner(path, "") if stat.S_ISDIR(status.st_mode) else ())}
    except FileNotFoundError:
        return None


def _inner(root: Path, folder: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in os.listdir(root / folder):
        path = f"{folder}{name}"
        status = os.lstat(root / path)
        yield path, _status(status)
        if stat.S_ISDIR(status.st_mode):
            yield from _inner(root, f"{path}/")


def _status(status: os.stat_result) -> tuple[int, ...]:
    identity = (stat.S_IFMT(status.st_mode), status.st_ino)
    if stat.S_ISDIR(status.st_mode):
        return identity
    return (*identity, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
