"""The header of a safetensors file, parsed strictly.

A header is one flat JSON object: tensor name to {dtype, shape, data_offsets}, and `__metadata__`, string to
string. So it is read one entry at a time, each validated and turned into a record before the next is
decoded: memory is bounded by the cap on entries, not by what the JSON could unfold to, and an error names
its tensor. Refused although the safetensors package takes them: a key given twice (which of the two is
meant?), white space before the brace, entries as lists. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from noisytune_cli.dtypes import DTYPES, stored_bytes
from noisytune_cli.reading import Document, JsonFault, JsonLimits
from noisytune_cli.records import TensorSpec

#: The bytes of N.
PREFIX = 8

#: More entries than any checkpoint has in one file (the largest, expert by expert, have some 90,000), and
#: more numbers: reading as many takes a second, so that a hostile header is refused soon.
MAX_ENTRIES = 120_000
_MAX_NUMBERS = 1_000_000

#: A header that names 100,000 tensors. As text it takes four times as much, and once more while it is read:
#: what the safetensors package allows (100 MB) would take nearly 1 GB to refuse.
MAX_HEADER = 16 << 20

_METADATA = "__metadata__"
_MAX_ENTRY = 1 << 16  # characters in one tensor's entry: room for a shape of thousands of dimensions
_MAX_SHOWN = 60  # characters of a key that a message quotes
_MAX_INT = 2**63 - 1

# Outside strings a brace opens an entry. The possessive quantifiers and the optional closing quote make
# the scan linear, whatever the bytes.
_BRACE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|(\{)', re.DOTALL)


class HeaderFault(Exception):
    """What is wrong with a header, and in which tensor's entry if in one."""

    def __init__(self, why: str, tensor: str | None = None) -> None:
        super().__init__(why)
        self.why, self.tensor = why, tensor


class Header(NamedTuple):
    """A header's tensors, in the order of their data, and its metadata."""

    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]


def header_end(head: bytes) -> int:
    """Return where the header ends of a file that begins with `head`, 0 where it says nothing possible."""
    length = int.from_bytes(head[:PREFIX], "little")
    return PREFIX + length if len(head) >= PREFIX and length <= MAX_HEADER else 0


def parse_header(header: bytearray, file: str, data_bytes: int) -> Header:
    """Return what `header` (N, then N bytes of JSON) says of the `data_bytes` bytes that follow it.

    `file` is the name that the TensorSpecs carry. Raises HeaderFault where the JSON is not a header, or not
    one of a file with so many bytes.
    """
    _bound_entries(header)
    data_start = len(header)
    metadata: dict[str, str] = {}
    tensors: list[TensorSpec] = []
    limits = JsonLimits(members=MAX_ENTRIES, flat=_MAX_ENTRY, flat_values=_MAX_NUMBERS)
    try:
        document = Document(memoryview(header)[PREFIX:], limits, name="its header", encoding="UTF-8")
        for name in document.members("its header"):
            if name == _METADATA:
                metadata = _metadata(document)
            else:
                tensors.append(_tensor(name, _entry(document, name), file, data_start))
        document.end_of_text()
    except JsonFault as fault:
        raise HeaderFault(fault.why) from fault
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
            raise HeaderFault(f"its header has more than {MAX_ENTRIES:,} entries")


def _metadata(document: Document) -> dict[str, str]:
    """Return the metadata that begin here: strings by name, or null, as some writers put for none."""
    if document.null():
        return {}
    return {
        key: document.string(f'the value of "{key[:_MAX_SHOWN]}"')
        for key in document.members(f"its {_METADATA}")
    }


def _entry(document: Document, name: str) -> dict[str, Any]:
    try:
        return document.flat("its entry")
    except JsonFault as fault:
        raise HeaderFault(fault.why, name) from fault


def _tensor(name: str, entry: dict[str, Any], file: str, data_start: int) -> TensorSpec:
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
