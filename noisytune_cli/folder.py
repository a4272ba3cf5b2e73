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

from noisytune_cli.errors import InputInvalid, unreadable
from noisytune_cli.escape import escape
from noisytune_cli.layout import Listing, why_folder_left_out

#: No checkpoint comes near; linked folders can multiply without end.
_MAX_ENTRIES = 100_000

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def list_folder(root: Path) -> Listing:
    """List the files under `root`; raises InputUnreadable where a folder cannot be read."""
    files: list[str] = []
    special: dict[str, str] = {}
    folders: dict[str, str] = {}
    real_root = os.path.realpath(root)
    pending: list[tuple[str, str, frozenset[str]]] = [("", real_root, frozenset())]
    seen = 0
    while pending:
        prefix, real, above = pending.pop()
        for entry in _entries(root / prefix):
            seen += 1
            if seen > _MAX_ENTRIES:
                raise InputInvalid(
                    "cannot read the checkpoint",
                    path=root,
                    why=f"it has more than {_MAX_ENTRIES:,} files",
                    next_step="Give the folder that holds the weights alone",
                )
            name = prefix + entry.name
            try:
                name.encode()
            except UnicodeEncodeError:
                special[escape(name)] = "its name is not UTF-8"
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise unreadable(error, entry.path) from error
                special[name] = "a broken link"
                continue
            if stat.S_ISREG(mode):
                files.append(name)
            elif not stat.S_ISDIR(mode):
                special[name] = _KINDS.get(stat.S_IFMT(mode), "no regular file")
            elif why := why_folder_left_out(entry.name):
                folders[f"{name}/"] = why
            else:
                target = (
                    os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                )
                if why := _why_not_entered(target, real_root, above | {real}):
                    folders[f"{name}/"] = why
                else:
                    pending.append((f"{name}/", target, above | {real}))
    return Listing(tuple(sorted(files)), special, folders)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise unreadable(error, folder) from error


def _why_not_entered(target: str, real_root: str, above: frozenset[str]) -> str | None:
    if target in above:
        return "a link to a folder it lies in"
    if os.path.commonpath([target, real_root]) != real_root:
        return "a link out of the checkpoint"
    return None
