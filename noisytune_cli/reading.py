"""Opening input files safely.

A checkpoint is somebody else's folder: a name in it may be a FIFO that never answers, a device that acts
when it is opened, or a config of a terabyte. So an input is looked at before it is opened, opened without
waiting, looked at again through the descriptor, and read up to a limit. Every failure is one of errors.py.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from noisytune_cli.errors import InputInvalid, unreadable

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}

_CHUNK = 1 << 20

#: Values in a JSON document, or what looks like one inside a string: 16 MB of `[],` would unfold to 400 MB.
_MAX_VALUES = 1_000_000


def open_regular(path: Path) -> int:
    """Return a descriptor of the regular file at `path` (symlinks followed), without ever waiting for one.

    Raises InputInvalid for anything else that has a name (FIFO, device, socket, directory),
    InputUnreadable if it is missing or may not be read.
    """
    try:
        # Opening a device can have effects of its own (a tape rewinds), so ask before.
        _require_regular(os.stat(path), path)
        fd = os.open(path, _FLAGS)
    except OSError as error:
        raise unreadable(error, path) from error
    except ValueError as error:  # a NUL, or a surrogate that the file system cannot spell
        raise _cannot_read(path, "no file can have such a name", "Rename it, or fetch it again") from error
    try:
        # Ask again: the name may mean another file by now.
        _require_regular(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_small(path: Path, limit: int) -> bytes:
    """Return the whole file at `path`; InputInvalid if it has more than `limit` bytes."""
    fd = open_regular(path)
    chunks: list[bytes] = []
    room = limit + 1
    try:
        while room > 0 and (chunk := os.read(fd, min(room, _CHUNK))):
            chunks.append(chunk)
            room -= len(chunk)
    except OSError as error:
        raise unreadable(error, path) from error
    finally:
        os.close(fd)
    if room <= 0:
        why = f"it is larger than {limit:,} bytes, which no file of its kind is"
        raise _cannot_read(path, why, "Check that it is the file its name says")
    return b"".join(chunks)


def read_json(path: Path, limit: int) -> object:
    """Return the JSON document at `path`, strictly UTF-8; InputInvalid if it is none, or too large.

    As in most readers, of a key given twice the last counts, and NaN and Infinity are numbers.
    """
    content = read_small(path, limit)
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise _not_json(path, f"it holds more than {_MAX_VALUES:,} values, which no file of its kind does")
    try:
        document: object = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_json(path, f"byte {error.start:,} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _not_json(path, f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise _not_json(path, "it is nested too deep") from error
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise _not_json(path, "it holds a number with too many digits") from error
    return document


def _require_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
    raise _cannot_read(path, f"it is {kind}, not a regular file", "Name a regular file instead")


def _cannot_read(path: Path, why: str, next_step: str) -> InputInvalid:
    return InputInvalid("cannot read", path=path, why=why, next_step=next_step)


def _not_json(path: Path, why: str) -> InputInvalid:
    return InputInvalid(
        "not valid JSON", path=path, why=why, next_step="Fetch the file again from where it came"
    )
