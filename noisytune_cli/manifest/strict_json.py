"""A JSON document from a stranger, read piece by piece.

The document is one object whose members come in a known order; a member is one value, or a list of objects
that are handed out one at a time. So memory is bounded by the longest piece, not by what the text could
unfold to, and the reader can refuse a document at its first bad member. Stricter than JSON: no key twice, no
NaN or Infinity, no integer of more than 20 digits, ASCII only (as `json.dumps` writes). A number past the
range of float64 is read as infinite, which is for the reader of the field to refuse. All this takes time, so
only so much of a document is read this way; a long list is for a quicker reader of its usual entries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

Record = TypeVar("Record")

#: Reads the entry that begins at a character of the text, where it is spelt as usual and in order; returns
#: what it stands for and where it ends, or None where that is for the strict reader to say.
LineReader = Callable[[str, int], tuple[Record, int] | None]

#: Characters that one piece may have (they can unfold to some 50 MB), how many are looked at first, and how
#: that grows.
_LONGEST_PIECE, _FIRST_LOOK, _GROWTH = 2 << 20, 4096, 8

#: Characters that are read piece by piece in all, and how many a short piece counts for.
_MOST_READ, _LEAST_COUNTED = 8 << 20, 256

_MAX_DIGITS = 20  # of 2^64
_MAX_SHOWN = 40  # characters of a key or number that a message quotes

_SPACE = re.compile(r"[ \t\n\r]*+")
_NEXT_LINE = ",\n  "
_SEPARATOR = re.compile(r"[ \t\n\r]*+([,\]])[ \t\n\r]*+")


class JsonFault(Exception):
    """What is wrong with a document."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Document:
    """A position in the text; `member` moves to a member's value, `value` or `entries` reads it."""

    def __init__(self, content: bytes) -> None:
        try:
            self._text = content.decode("ascii")
        except UnicodeDecodeError as error:
            raise JsonFault(f"byte {error.start:,} is not ASCII") from error
        self._at = 0
        self._first = True
        self._left = _MOST_READ

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
        look = _FIRST_LOOK
        while True:
            window = self._text[self._at : self._at + look]
            try:
                value, length = _decoder.raw_decode(window)
            except json.JSONDecodeError as error:
                if look >= _LONGEST_PIECE or self._at + look >= len(self._text):
                    self._fail(error.msg, self._at + error.pos)
                look *= _GROWTH
                continue
            except RecursionError as error:
                raise JsonFault("it is nested too deep") from error
            self._at += length
            self._left -= max(length, _LEAST_COUNTED)
            if self._left < 0:
                raise JsonFault("too much of it is laid out in another way than noisytune's")
            return value

    def entries(self, limit: int, read_line: LineReader[Record] | None = None) -> Iterator[Any | Record]:
        """Read a list element by element, at most `limit`: what `read_line` makes of one, or its value."""
        self._take("[", "it is no list:")
        if self._peek() == "]":
            self._at += 1
            return
        for count in range(limit + 1):
            if count == limit:
                raise JsonFault(f"it has a list of more than {limit:,} entries")
            line = None if read_line is None else read_line(self._text, self._at)
            if line is None:
                yield self.value()
            else:
                self._at = line[1]
                yield line[0]
                if self._text.startswith(_NEXT_LINE, self._at):
                    self._at += len(_NEXT_LINE)
                    continue
            found = _SEPARATOR.match(self._text, self._at)
            if found is None:
                self._take(",", "it is not valid JSON: no comma:")
            else:
                self._at = found.end()
                if found[1] == "]":
                    return

    def end(self) -> None:
        """Refuse anything that follows the last member."""
        if self._peek() == ",":
            raise JsonFault("it has more members than a manifest")
        self._take("}", "it is not valid JSON: no closing brace:")
        if self._peek():
            self._fail("something follows the closing brace", self._at)

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _peek(self) -> str:
        self._skip()
        return self._text[self._at : self._at + 1]

    def _take(self, token: str, complaint: str) -> None:
        found = self._peek()
        if found != token:
            raise JsonFault(f'{complaint} "{token}" is due at character {self._at:,}')
        self._at += 1

    def _fail(self, why: str, at: int) -> NoReturn:
        raise JsonFault(f"it is not valid JSON: {why}, near character {at:,}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonFault(f'an object has the key "{twice[:_MAX_SHOWN]}" twice')
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise JsonFault(f"it has a number of more than {_MAX_DIGITS} digits")
    if digits == "-0":
        raise JsonFault("it has -0 for an integer")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise JsonFault(f"it has {name}, which is no number in JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_number)
