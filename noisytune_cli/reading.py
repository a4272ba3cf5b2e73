"""Opening input files safely.

A checkpoint is somebody else's folder: a name in it may be a FIFO that never answers, a device that acts
when it is opened, or a config of a terabyte. So an input is looked at before it is opened, opened without
waiting, looked at again through the descriptor, and read up to a limit. Every failure is one of errors.py.

A source ends at its folder, and the blobs that a snapshot in the hub's cache links to (`Reach`). A link out
of it would bring content into an output that nobody means to publish. So a file counts by where it really
lies, which is asked of its open descriptor: what happens to names in the meantime cannot change the answer.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from noisytune_cli.errors import InputInvalid, Mismatch, unreadable

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}

_CHUNK = 1 << 20

#: Device, inode, size, and the times of modification and of any change, in ns.
Fingerprint = tuple[int, int, int, int, int]

#: Values in a JSON document, or what looks like one inside a string: 16 MB of `[],` would unfold to 400 MB.
_MAX_VALUES = 1_000_000

#: A snapshot in a cache of the hub, which tells id and commit. What it links to lies in its model's `blobs`,
#: or in the whole cache's.
SNAPSHOT = re.compile(
    r"(?P<cache>.*)/models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/|$)", re.DOTALL
)

_BLOBS = "blobs"

_PATH_BYTES = 4096


@dataclass(frozen=True)
class Reach:
    """The folders, as real paths, that the files of a source may lie in."""

    folders: tuple[str, ...]

    def check(self, fd: int, path: Path) -> None:
        """Raise InputInvalid unless the open file lies in reach; `path` is what it was opened by."""
        self.check_place(_place(fd, path), path)

    def check_place(self, place: str | None, path: Path) -> None:
        """Raise InputInvalid unless a real path lies in reach."""
        if place is None or not any(place.startswith(f"{folder.rstrip('/')}/") for folder in self.folders):
            raise InputInvalid(
                "it is a link out of the checkpoint",
                path=path,
                why="what it leads to would become part of the output",
                next_step="Put the file itself there, or pass --follow-links if it is meant",
            )


def reach_of(folder: Path) -> Reach:
    """Return what a checkpoint in `folder` may consist of."""
    real = os.path.realpath(folder)
    folders = [real]
    if found := SNAPSHOT.match(real):
        cache = found["cache"]
        blobs = (f"{cache}/models--{found['id']}/{_BLOBS}", f"{cache}/{_BLOBS}")
        folders += [blob for blob in blobs if os.path.realpath(blob) == blob]
    return Reach(tuple(folders))


def _place(fd: int, path: Path) -> str | None:
    """Return the real path of an open file; None where it has none that can be found."""
    try:
        if hasattr(fcntl, "F_GETPATH"):
            return os.fsdecode(fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(_PATH_BYTES)).rstrip(b"\0"))
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # no /proc: the name has to lead to the same file still
        place = os.path.realpath(path)
        try:
            return place if os.path.samestat(os.lstat(place), os.fstat(fd)) else None
        except OSError:
            return None


def open_regular(path: Path, reach: Reach | None = None) -> int:
    """Return a descriptor of the regular file at `path` (symlinks followed), without ever waiting for one.

    Raises InputInvalid for anything else that has a name (FIFO, device, socket, directory), and for what lies
    out of `reach`, where that is given; InputUnreadable if it is missing or may not be read.
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
        if reach is not None:
            reach.check(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def fingerprint(status: os.stat_result) -> Fingerprint:
    """Return what tells a file from what it was; ctime, for a writer can set mtime as it likes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def changed(path: Path, how: str) -> Mismatch:
    """Return the error for an input that is no longer what it was when it was opened."""
    return Mismatch(
        "the input changed while it was read",
        path=path,
        why=how,
        next_step="Wait until nothing writes to it any more, then run again",
    )


def read_small(path: Path, limit: int, reach: Reach | None = None) -> bytes:
    """Return the whole file at `path`; InputInvalid if it has more than `limit` bytes."""
    fd = open_regular(path, reach)
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


def read_json(path: Path, limit: int, reach: Reach | None = None) -> object:
    """Return the JSON document at `path`, strictly UTF-8; InputInvalid if it is none, or too large.

    As in most readers, of a key given twice the last counts, and NaN and Infinity are numbers.
    """
    content = read_small(path, limit, reach)
    try:
        return parse_json(content)
    except ValueError as error:
        raise _not_json(path, str(error)) from error


def parse_json(content: bytes) -> object:
    """Return the JSON document in `content`; ValueError if it is none, or has too many values."""
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ValueError(f"it holds more than {_MAX_VALUES:,} values, which no file of its kind does")
    try:
        document: object = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise ValueError("it holds a number with too many digits") from error
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
