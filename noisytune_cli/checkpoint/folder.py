"""What lies in a local checkpoint folder, found without opening a file.

Links are followed by content, for the hub's cache is made of them, but a linked folder that leads back to
where we are, or out of the checkpoint, is not entered. What is neither a file nor a folder is never
touched: it is listed with what it is.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

from noisytune_cli.checkpoint.layout import Listing, why_folder_left_out
from noisytune_cli.errors import InputInvalid, unreadable
from noisytune_cli.escape import escape, is_text

#: No checkpoint comes near; a home directory given by mistake does.
_MAX_ENTRIES = 100_000

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class _Folder(NamedTuple):
    """A folder to list: what its names begin with, where it really is, and what it lies in."""

    prefix: str
    real: str
    above: frozenset[str]
    linked: bool


def list_folder(root: Path) -> Listing:
    """List the files under `root`; raises InputUnreadable where a folder cannot be read."""
    files: list[str] = []
    special: dict[str, str] = {}
    folders: dict[str, str] = {}
    top = _Folder("", os.path.realpath(root), frozenset(), linked=False)
    pending = [top]
    seen = 0
    while pending:
        folder = pending.pop()
        entries = _entries(root / folder.prefix)
        seen += len(entries)
        if seen > _MAX_ENTRIES:
            raise InputInvalid(
                "cannot read the checkpoint",
                path=root,
                why=f"it has more than {_MAX_ENTRIES:,} files",
                next_step="Give the folder that holds the weights alone",
            )
        for entry in entries:
            name = folder.prefix + entry.name
            mode = _mode(entry)
            if not is_text(entry.name):
                special[escape(name)] = "a file whose name is not UTF-8"
            elif mode is None:
                special[name] = "a broken link"
            elif stat.S_ISREG(mode):
                files.append(name)
            elif not stat.S_ISDIR(mode):
                special[name] = _KINDS.get(stat.S_IFMT(mode), "no regular file")
            else:
                inner = _enter(folder, entry)
                if why := why_folder_left_out(entry.name) or _why_not_entered(folder, entry, inner, top):
                    folders[f"{name}/"] = why
                else:
                    pending.append(inner)
    return Listing(tuple(sorted(files)), special, folders)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise unreadable(error, folder) from error


def _mode(entry: os.DirEntry[str]) -> int | None:
    """Return the mode of what the entry is or links to; None for a link to nothing, or to itself."""
    try:
        return entry.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise unreadable(error, entry.path) from error


def _enter(folder: _Folder, entry: os.DirEntry[str]) -> _Folder:
    linked = entry.is_symlink()
    real = os.path.realpath(entry.path) if linked else os.path.join(folder.real, entry.name)
    return _Folder(
        f"{folder.prefix}{entry.name}/", real, folder.above | {folder.real}, linked or folder.linked
    )


def _why_not_entered(folder: _Folder, entry: os.DirEntry[str], inner: _Folder, top: _Folder) -> str | None:
    if inner.real in inner.above:
        return "a link to a folder it lies in"
    if os.path.commonpath([inner.real, top.real]) != top.real:
        return "a link out of the checkpoint"
    if folder.linked and entry.is_symlink():
        # Ten folders that link to one another make millions of paths.
        return "a link inside a linked folder"
    return None
