"""The header of a safetensors file, parsed strictly.

A header is one flat JSON object: tensor name to {dtype, shape, data_offsets}, and `__metadata__`, string to
string. So it is read one entry at a time, each validated and turned into a record before the next is
decoded: memory is bounded by the cap on entries, not by what the JSON could unfold to, and an error names
its tensor. Refused although the safetensors package takes them: a key given twice (which of the two is
meant?), white space before the brace, entries as lists. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from noisytune_cli.dtypes import DTYPES, stored_bytes
from noisytune_cli.records import TensorSpec

#: The bytes of N.
PREFIX = 8

#: More entries than any checkpoint has in one file (the largest, expert by expert, have some 90,000), and
#: more numbers: reading as many takes a second, so that a hostile header is refused soon.
MAX_ENTRIES = 120_000
_MAX_NUMBERS = 1_000_000

_METADATA = "__metadata__"
_MAX_ENTRY = 1 << 16  # characters in one tensor's entry: room for a shape of thousands of dimensions
_MAX_DIGITS = 20  # of 2^64
_MAX_SHOWN = 60  # characters of a key that a message quotes
_MAX_INT = 2**63 - 1

# Outside strings a brace opens an entry. The possessive quantifiers and the optional closing quote make
# the scan linear, whatever the bytes.
_BRACE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|(\{)', re.DOTALL)
_OPEN = re.compile(r"\{[ \t\n\r]*(\}[ \t\n\r]*)?")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_SEPARATOR = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


class HeaderFault(Exception):
    """What is wrong with a header, and in which tensor's entry if in one."""

    def __init__(self, why: str, tensor: str | None = None) -> None:
        super().__init__(why)
        self.why, self.tensor = why, tensor


@dataclass(frozen=True, slots=True)
class Header:
    """A header's tensors, in the order of their data, and its metadata."""

    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]


def parse_header(header: bytearray, file: str, data_bytes: int) -> Header:
    """Return what `header` (N, then N bytes of JSON) says of the `data_bytes` bytes that follow it.

    `file` is the name that the TensorSpecs carry. Raises HeaderFault where the JSON is not a header, or not
    one of a file with so many bytes.
    """
    _bound_entries(header)
    data_start = len(header)
    try:
        text = str(memoryview(header)[PREFIX:], "utf-8")
    except UnicodeDecodeError as error:
        raise HeaderFault(f"its header is not UTF-8: byte {error.start:,} of it") from error
    metadata: dict[str, str] = {}
    tensors: list[TensorSpec] = []
    scanner = _Scanner(text)
    for name in scanner.members("header"):
        if name == _METADATA:
            metadata = scanner.metadata()
        else:
            tensors.append(_tensor(name, scanner.entry(name), file, data_start))
    scanner.end()
    # Stable, so that empty tensors at one offset keep the header's order.
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _require_layout(tensors, data_start, data_bytes)
    return Header(tuple(tensors), metadata)


def _bound_entries(header: bytearray) -> None:
    """Refuse a header with too many entries before anything is built from it."""
    limit = MAX_ENTRIES + 2  # the header's own brace, and the metadata's
    if header.count(b"{", PREFIX) <= limit:
        return
    braces = 0
    for match in _BRACE.finditer(header, PREFIX):
        braces += match.lastindex is not None
        if braces > limit:
            _refuse_more_entries()


def _refuse_more_entries() -> NoReturn:
    raise HeaderFault(f"its header has more than {MAX_ENTRIES:,} entries")


class _Scanner:
    """A position in the header's text, and what can be read from there."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._commas = 0

    def members(self, where: str) -> Iterator[str]:
        """Yield the keys of the object that begins here; the consumer reads each key's value."""
        opening = self._take(_OPEN)
        if opening is None:
            raise HeaderFault(f"its {where} does not begin with a brace")
        seen: set[str] = set()
        more = not opening[1]
        while more:
            key = self.string(f"a key of its {where}")
            if key in seen:
                raise HeaderFault(f'its {where} has the key "{key[:_MAX_SHOWN]}" twice')
            if len(seen) == MAX_ENTRIES:
                _refuse_more_entries()
            seen.add(key)
            if self._take(_COLON) is None:
                self._fail("no colon after a key")
            yield key
            separator = self._take(_SEPARATOR)
            if separator is None:
                self._fail("neither a comma nor a closing brace")
            more = separator[1] == ","

    def string(self, what: str) -> str:
        """Return the string that begins here."""
        if not self._text.startswith('"', self._at):
            self._fail(f"{what} is not a string")
        value, self._at = self._decode(self._text, self._at, _decoder)
        assert isinstance(value, str)
        if not value.isascii() and _SURROGATE.search(value):
            self._fail("half a surrogate pair")
        return value

    def metadata(self) -> dict[str, str]:
        """Return the metadata that begin here: strings by name, or null, as some writers put for none."""
        if self._text.startswith("null", self._at):
            self._at += len("null")
            return {}
        return {key: self.string(f'the value of "{key[:_MAX_SHOWN]}"') for key in self.members(_METADATA)}

    def entry(self, name: str) -> dict[str, object]:
        """Return the tensor's entry that begins here: a flat object, ended by the first closing brace."""
        if not self._text.startswith("{", self._at):
            raise HeaderFault("its entry in the header is not an object", name)
        end = self._text.find("}", self._at) + 1
        if end == 0:
            raise HeaderFault("the header ends within its entry", name)
        if end - self._at > _MAX_ENTRY:
            raise HeaderFault(f"its entry in the header is longer than {_MAX_ENTRY:,} characters", name)
        self._commas += self._text.count(",", self._at, end)
        if self._commas > _MAX_NUMBERS:
            raise HeaderFault(f"the header has more than {_MAX_NUMBERS:,} numbers by its entry", name)
        try:
            value, length = self._decode(self._text[self._at : end], 0, _entry_decoder)
        except HeaderFault as fault:
            raise HeaderFault(fault.why, name) from fault
        self._at += length
        assert isinstance(value, dict)
        return value

    def end(self) -> None:
        """Refuse anything but padding from here on."""
        if self._at != len(self._text):
            self._fail("something follows the closing brace")

    def _take(self, token: re.Pattern[str]) -> re.Match[str] | None:
        match = token.match(self._text, self._at)
        if match is not None:
            self._at = match.end()
        return match

    def _decode(self, text: str, at: int, decoder: json.JSONDecoder) -> tuple[object, int]:
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            self._fail(error.msg)
        except RecursionError as error:
            raise HeaderFault("it is nested too deep") from error
        return value, end

    def _fail(self, why: str) -> NoReturn:
        raise HeaderFault(f"its header is not valid JSON: {why}, near character {self._at:,}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        raise HeaderFault("its entry in the header has a key twice")
    return entry


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise HeaderFault(f"its entry in the header has a number of {len(digits):,} digits")
    if digits == "-0":
        raise HeaderFault("its entry in the header has -0 for an integer")
    return int(digits)


def _no_integer(number: str) -> NoReturn:
    raise HeaderFault(f"its entry in the header has {number[:_MAX_DIGITS]}, which is not an integer")


_decoder = json.JSONDecoder()
_entry_decoder = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_no_integer, parse_constant=_no_integer
)


def _tensor(name: str, entry: dict[str, object], file: str, data_start: int) -> TensorSpec:
    """Return the tensor that `entry` describes; its extent agrees with its dtype and shape."""
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise HeaderFault(f"its entry in the header has no {key}", name)
    stated = entry["dtype"]
    dtype = DTYPES.get(stated) if isinstance(stated, str) else None
    if dtype is None:
        shown = f'"{stated[:_MAX_SHOWN]}"' if isinstance(stated, str) else "not a string"
        raise HeaderFault(f"its dtype is {shown}, which the format does not have", name)
    shape = _integers(entry["shape"])
    if shape is None:
        raise HeaderFault("its shape is not a list of integers from 0 to 2^63 - 1", name)
    extent = _integers(entry["data_offsets"])
    if extent is None or len(extent) != 2:
        raise HeaderFault("its data_offsets are not two integers from 0 to 2^63 - 1", name)
    begin, end = extent
    if begin > end:
        raise HeaderFault("its data_offsets run backwards", name)
    try:
        nbytes = stored_bytes(dtype, shape)
    except ValueError as error:
        raise HeaderFault(str(error), name) from error
    if nbytes != end - begin:
        raise HeaderFault(
            f"its data_offsets hold {end - begin:,} bytes, its dtype and shape {nbytes:,}", name
        )
    return TensorSpec(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _integers(value: object) -> list[int] | None:
    """Return `value` if it is a list of integers from 0 to 2^63 - 1 (true and false are none), else None."""
    if isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_INT for item in value):
        return value
    return None


def _require_layout(tensors: list[TensorSpec], data_start: int, data_bytes: int) -> None:
    """Refuse tensors that overlap, leave a hole, or do not end where the file does."""
    at = data_start
    for tensor in tensors:
        if tensor.offset < at:
            raise HeaderFault("its data overlap those of another tensor", tensor.name)
        if tensor.offset > at:
            raise HeaderFault(
                f"{tensor.offset - at:,} bytes before its data belong to no tensor", tensor.name
            )
        at += tensor.nbytes
    missing = at - data_start - data_bytes
    if missing > 0:
        raise HeaderFault(f"it is truncated: {missing:,} bytes of its tensors are missing")
    if missing < 0:
        raise HeaderFault(f"{-missing:,} bytes after its last tensor belong to no tensor")
