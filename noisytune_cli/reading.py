"""Opening input files safely.

A checkpoint is somebody else's folder: a name in it may be a FIFO that never answers, a device that acts
when it is opened, or a config of a terabyte. So an input is looked at before it is opened, opened without
waiting, looked at again through the descriptor, and read up to a limit. Every failure is one of errors.py.

A source ends at its folder, and the blobs that a snapshot in the hub's cache links to (`Reach`). A link out
of it would bring content into an output that nobody means to publish. So a file counts by where it really
lies, which is asked of its open descriptor: what happens to names in the meantime cannot change the answer.

JSON is read strictly: no key twice, no NaN or Infinity, no integer of more than 20 digits, no -0 for one. A
number past the range of float64 is infinite, which is for the reader of the field to refuse. `read_json`
reads a small file whole, and leniently where it is for another program to say what is right. A `Document` is
read piece by piece: it is one object, whose members are handed out one at a time, as are the entries of a
list. So memory is bounded by the longest piece (`JsonLimits`), not by what the text could unfold to, nor by
its length where it is fetched as it is read; and the reader can refuse a document at its first bad member.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

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

#: How many characters a value takes in a long document, its key counted, the least of many.
_LEAST_CHARACTERS = 12

_MAX_DIGITS = 20  # of 2^64
_MAX_SHOWN = 60  # characters of a key or number that a message quotes

_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACES = " \t\n\r"
_SPACE = re.compile(r"[ \t\n\r]*+")
_OPEN = re.compile(r"\{[ \t\n\r]*+(\}[ \t\n\r]*+)?")
_COLON = re.compile(r"[ \t\n\r]*+:[ \t\n\r]*+")
_BRACE = re.compile(r'\{[^"{}]*+(?:"(?:[^"\\]++|\\.)*+"[^"{}]*+)*+([{}])', re.DOTALL)
_NEXT_LINE = ",\n  "
_NEXT = re.compile(r"[ \t\n\r]*+([,}])[ \t\n\r]*+")


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


def is_folder(path: Path) -> bool:
    """Tell whether a path, of which links are followed, is a folder's; raises as `unreadable` says."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL, which no path has
        raise unreadable(error if isinstance(error, OSError) else OSError(str(error)), path) from error


def is_there(path: Path | str) -> bool:
    """Tell whether a name stands for something, a dead link too; InputUnreadable where that cannot be told.

    `os.path.lexists` says no then, and what is there would be passed over in silence.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL, which no path has
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise unreadable(error, path) from error
    return True


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
    return b"".join(read_chunks(path, limit, reach))


def read_chunks(path: Path, limit: int, reach: Reach | None = None) -> Generator[bytes]:
    """Yield the file at `path` little by little; InputInvalid if it has more than `limit` bytes."""
    fd = open_regular(path, reach)
    try:
        # Before the first chunk where its size tells, or a reader would work through all that is allowed.
        room = limit + 1 if os.fstat(fd).st_size <= limit else 0
        while room > 0 and (chunk := os.read(fd, min(room, _CHUNK))):
            room -= len(chunk)
            if room > 0:
                yield chunk
    except OSError as error:
        raise unreadable(error, path) from error
    finally:
        os.close(fd)
    if room <= 0:
        why = f"it is larger than {limit:,} bytes, which no file of its kind is"
        raise _cannot_read(path, why, "Check that it is the file its name says")


def read_json(path: Path, limit: int, reach: Reach | None = None, *, lenient: bool = False) -> object:
    """Return the JSON document at `path`, in UTF-8; InputInvalid if it is none, or too large.

    `lenient` is as most readers are: of a key given twice the last counts, NaN and Infinity are numbers, and
    so is -0.
    """
    content = read_small(path, limit, reach)
    try:
        return parse_json(content, lenient=lenient)
    except ValueError as error:
        raise not_json(path, str(error)) from error


def parse_json(content: bytes, *, lenient: bool = False) -> object:
    """Return the JSON document in `content`; ValueError if it is none, or has too many values."""
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ValueError(f"it holds more than {_MAX_VALUES:,} values, which no file of its kind does")
    try:
        document: object = (_lenient if lenient else _strict).decode(content.decode("utf-8"))
    except JsonFault as fault:
        raise ValueError(fault.why) from fault
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


def not_json(path: Path, why: str) -> InputInvalid:
    return InputInvalid(
        "not valid JSON", path=path, why=why, next_step="Fetch the file again from where it came"
    )


class JsonFault(Exception):
    """What is wrong with a document."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class JsonLimits(NamedTuple):
    """What is read of a document at most: characters of a piece, values, members of an object.

    A piece of two million characters can unfold to some 50 MB. In all pieces together there may be a value
    for every twelve characters, and `spare_values` more: so time is in proportion to the text. A flat object
    has limits of its own, its characters, and the values of all of them.
    """

    piece: int = 2 << 20
    spare_values: int = 1_000_000
    members: int = 0
    flat: int = 0
    flat_values: int = 0


class Document:
    """A position in the text of one object, and what can be read from there.

    `member` moves to the value of the next one in a known order, `members` to one after the other in any;
    then `value`, `entries`, `string` or `flat` reads it. `name` is what the document is called in a fault.

    What is read by `member`, `value` and `entries` alone may come little by little, in ASCII: `more` gives
    the bytes that follow, none at the end. In memory is then a window with room for the longest piece.
    """

    def __init__(
        self,
        content: bytes | memoryview,
        limits: JsonLimits,
        *,
        name: str = "it",
        encoding: Literal["ASCII", "UTF-8"] = "ASCII",
        more: Callable[[], bytes] | None = None,
    ) -> None:
        self._name, self._limits, self._encoding, self._more = name, limits, encoding, more
        #: How many characters lie before the window, and where in it the reader is.
        self._before = self._at = 0
        self._text = self._decode(content)
        self._first = True
        self._spare, self._values_left = limits.spare_values, limits.flat_values

    def members(self, what: str) -> Iterator[str]:
        """Yield the keys of the object that begins here; the consumer reads each key's value."""
        opening = self._pass(_OPEN)
        if opening is None:
            raise JsonFault(f"{what} does not begin with a brace")
        seen: set[str] = set()
        more = not opening[1]
        while more:
            key = self.string(f"a key of {what}")
            if key in seen:
                raise JsonFault(f'{what} has the key "{key[:_MAX_SHOWN]}" twice')
            if len(seen) == self._limits.members:
                raise JsonFault(f"{what} has more than {self._limits.members:,} entries")
            seen.add(key)
            if self._pass(_COLON) is None:
                self._fail("no colon after a key", self._at)
            yield key
            following = self._pass(_NEXT)
            if following is None:
                self._fail("neither a comma nor a closing brace", self._at)
            more = following[1] == ","

    def string(self, what: str) -> str:
        """Return the string that begins here, however long it is."""
        if not self._text.startswith('"', self._at):
            self._fail(f"{what} is not a string", self._at)
        try:
            value, self._at = _strict.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            self._fail(error.msg, self._at)
        assert isinstance(value, str)
        if not value.isascii() and _SURROGATE.search(value):
            self._fail("half a surrogate pair", self._at)
        return value

    def null(self) -> bool:
        """Pass over null, if it is here."""
        found = self._text.startswith("null", self._at)
        self._at += len("null") if found else 0
        return found

    def flat(self, what: str) -> dict[str, Any]:
        """Return the object that begins here, of integers and strings, no object in it."""
        if not self._text.startswith("{", self._at):
            raise JsonFault(f"{what} is not an object")
        end = self._text.find("}", self._at) + 1
        try:
            return self._flat_until(end, what)
        except json.JSONDecodeError as error:
            # A string may hold a closing brace too: to ask first costs more than to decode what has none.
            brace = _BRACE.match(self._text, self._at)
            if brace is not None and brace[1] == "{":
                raise JsonFault(f"{what} has an object in it") from error
            if brace is None or brace.end() == end:
                self._fail(error.msg, self._at)
        try:
            return self._flat_until(brace.end(), what)
        except json.JSONDecodeError as error:
            self._fail(error.msg, self._at)

    def _flat_until(self, end: int, what: str) -> dict[str, Any]:
        if end == 0:
            raise JsonFault(f"{self._name} ends within {what}")
        if end - self._at > self._limits.flat:
            raise JsonFault(f"{what} is longer than {self._limits.flat:,} characters")
        self._values_left -= self._text.count(",", self._at, end)
        if self._values_left < 0:
            raise JsonFault(f"{self._name} has more than {self._limits.flat_values:,} numbers by {what}")
        try:
            value, length = _strict_integers.raw_decode(self._text[self._at : end])
        except RecursionError as error:
            raise JsonFault("it is nested too deep") from error
        self._at += length
        assert isinstance(value, dict)
        return value

    def member(self, key: str) -> None:
        """Go to the value of the next member, which must be `key`."""
        found = self.key(key)
        if found != key:
            raise JsonFault(f'"{found[:_MAX_SHOWN]}" stands where "{key}" is due')

    def key(self, due: str) -> str:
        """Go to the value of the next member, and return its key; `due` is named where there is none."""
        if self._first or self._peek() != "}":
            self._take("{" if self._first else ",", "it is no JSON object, or not a whole one:")
        self._first = False
        if self._peek() == "}":
            raise JsonFault(f'it has no "{due}"')
        found = str(self.value())
        self._take(":", "it is not valid JSON: no colon:")
        return found

    def value(self) -> Any:
        """Read one value."""
        self._skip()
        try:
            value, end = _strict.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            self._fail(error.msg, error.pos)
        except RecursionError as error:
            raise JsonFault("it is nested too deep") from error
        length = end - self._at
        self._spare += length // _LEAST_CHARACTERS - self._text.count(",", self._at, end)
        if length > self._limits.piece:
            raise JsonFault(f"{self._name} has a value of more than {self._limits.piece:,} characters")
        if self._spare < 0:
            raise JsonFault(f"{self._name} has far too many values for its length")
        self._at = end
        return value

    def entries(self, limit: int) -> Iterator[Any]:
        """Read a list element by element, at most `limit`."""
        self._take("[", "it is no list:")
        if self._peek() == "]":
            self._at += 1
            return
        for _ in range(limit):
            yield self.value()
            if self._text.startswith(_NEXT_LINE, self._at):
                self._at += len(_NEXT_LINE)
                continue
            if self._peek() == "]":
                self._at += 1
                return
            self._take(",", "it is not valid JSON: no comma:")
        raise JsonFault(f"it has a list of more than {limit:,} entries")

    def end(self) -> None:
        """Refuse anything that follows the last member, in an object of a known order."""
        if self._peek() == ",":
            raise JsonFault("it has more members than a manifest")
        self._take("}", "it is not valid JSON: no closing brace:")
        self.end_of_text()

    def end_of_text(self) -> None:
        """Refuse anything that follows the object."""
        if self._peek():
            self._fail("something follows the closing brace", self._at)

    def _pass(self, token: re.Pattern[str]) -> re.Match[str] | None:
        match = token.match(self._text, self._at)
        if match is not None:
            self._at = match.end()
        return match

    def _skip(self) -> None:
        """Go to the next character that is no space, and see that the longest piece from there is at hand."""
        while True:
            if self._more is not None and len(self._text) - self._at <= self._limits.piece:
                self._fetch(self._more)
            if self._text[self._at : self._at + 1] not in _SPACES:
                return
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            if match.end() == self._at:
                return
            self._at = match.end()

    def _fetch(self, more: Callable[[], bytes]) -> None:
        """Let the window begin here, and hold more than the longest piece, or all that follows."""
        window = [self._text[self._at :]]
        self._before += self._at
        self._at = 0
        length = len(window[0])
        while length <= self._limits.piece:
            content = more()
            if not content:
                self._more = None
                break
            window.append(self._decode(content, length))
            length += len(content)
        self._text = "".join(window)

    def _decode(self, content: bytes | memoryview, at: int = 0) -> str:
        try:
            return str(content, self._encoding)
        except UnicodeDecodeError as error:
            byte = self._before + at + error.start
            raise JsonFault(f"{self._name} is not {self._encoding}: byte {byte:,} of it") from error

    def _peek(self) -> str:
        self._skip()
        return self._text[self._at : self._at + 1]

    def _take(self, token: str, complaint: str) -> None:
        found = self._peek()
        if found != token:
            raise JsonFault(f'{complaint} "{token}" is due at character {self._before + self._at:,}')
        self._at += 1

    def _fail(self, why: str, at: int) -> NoReturn:
        raise JsonFault(f"{self._name} is not valid JSON: {why}, near character {self._before + at:,}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise JsonFault(f'an object has the key "{twice[:_MAX_SHOWN]}" twice')
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise JsonFault(f"it has a number of {len(digits):,} digits, more than {_MAX_DIGITS}")
    if digits == "-0":
        raise JsonFault("it has -0 for an integer")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise JsonFault(f"it has {name}, which is no number in JSON")


def _no_integer(number: str) -> NoReturn:
    raise JsonFault(f"it has {number[:_MAX_DIGITS]}, which is not an integer")


_lenient = json.JSONDecoder()
_strict = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_number)
_strict_integers = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_no_integer, parse_constant=_no_number
)
