"""The records of a ZIP archive as torch.save writes it: stored, end to end, nothing before, between or after.

A ZIP reader follows the central directory and ignores the rest; noise is written in place, so every byte has
to be accounted for. Whatever a lenient reader would forgive is refused: compressed or encrypted members,
names that leave the archive, two headers that disagree, overlaps, and bytes that belong to nothing.

    local header | name | padding | payload | data descriptor   … for each record
    central directory | end records                             (the format: PKWARE APPNOTE 6.3.10)
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

#: What a ZIP archive with at least one record begins with.
MAGIC = b"PK\x03\x04"

_MAX_RECORDS = 200_000
_MAX_DIRECTORY = 64 << 20

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

_ENCRYPTED, _DESCRIPTOR_FOLLOWS = 1, 8
#: Of a record's external attributes, as MS-DOS has them: torch.load gives what is in memory for such a one.
_FOLDER = 0x10
_CENTRAL_CRC, _LOCAL_CRC = 16, 14  # where in its header a CRC-32 stands

#: Sizes of a data descriptor (with a signature or without, sizes of 4 or 8 bytes), and where the CRC stands.
_DESCRIPTORS = {12: 0, 16: 4, 20: 0, 24: 4}

Read = Callable[[int, int], bytes]


class ZipFault(ValueError):
    """Why a file is no archive to be trusted; `record` is the member at fault, where that tells more."""

    def __init__(self, why: str, record: str = "") -> None:
        super().__init__(why)
        self.record = record


@dataclass(frozen=True, slots=True)
class Record:
    """One stored member: its payload is `size` bytes at `start`; `crc` stands in the file at `crc_fields`."""

    name: str
    start: int
    size: int
    crc: int
    crc_fields: tuple[int, ...]


class _Entry(NamedTuple):
    """A line of the central directory: the local header's offset first, to sort by."""

    header: int
    name: bytes
    size: int
    crc: int
    crc_field: int


def read_records(read: Read, size: int) -> dict[str, Record]:
    """Return the records by name, in the order they lie in the file of `size` bytes; raises ZipFault.

    `read(offset, length)` returns bytes of the file; payloads are not read.
    """
    directory, length, count = _find_directory(read, size)
    entries = sorted(_read_directory(read(directory, length), directory, count))
    records: dict[str, Record] = {}
    place = 0
    for index, entry in enumerate(entries):
        if entry.header != place:
            raise ZipFault(
                f"{entry.header - place} bytes before a record belong to nothing"
                if entry.header > place
                else "two records overlap"
            )
        place = entries[index + 1].header if index + 1 < len(entries) else directory
        record = _read_record(read, entry, place)
        if record.name in records:
            raise ZipFault(f"it has two records of the name {record.name}")
        records[record.name] = record
    if place != directory:
        raise ZipFault("it does not begin with a record")
    return records


def _find_directory(read: Read, size: int) -> tuple[int, int, int]:
    """Return where the central directory starts, its length in bytes and its number of entries."""
    at = size - _END.size
    end = _END.unpack(read(at, _END.size)) if at >= 0 else (b"",)
    if end[0] != b"PK\x05\x06" or end[-1] != 0:
        length = min(size, (1 << 16) + _END.size)
        last = read(size - length, length).rfind(b"PK\x05\x06")
        if last >= 0 and length - last >= _END.size:
            raise ZipFault("bytes follow the end of the archive")
        raise ZipFault("it is truncated: the central directory at its end is missing")
    _, disk, directory_disk, here, count, length, directory, _ = end
    if at >= _LOCATOR.size and read(at - _LOCATOR.size, 4) == b"PK\x06\x07":
        at -= _LOCATOR.size
        _, disk, place, _ = _LOCATOR.unpack(read(at, _LOCATOR.size))
        if place != at - _END64.size:
            raise ZipFault("its two end records do not lie together")
        at = place
        signature, _, _, _, disk, directory_disk, here, count, length, directory = _END64.unpack(
            read(at, _END64.size)
        )
        if signature != b"PK\x06\x06":
            raise ZipFault("its 64-bit end record is damaged")
    if disk or directory_disk or here != count:
        raise ZipFault("it is one part of an archive in several files")
    if directory + length != at:
        raise ZipFault(
            "its central directory does not lie where it says: it is truncated, or bytes were added"
        )
    if count > _MAX_RECORDS or length > _MAX_DIRECTORY:
        raise ZipFault(f"it has {count:,} records; {_MAX_RECORDS:,} is the limit")
    return directory, length, count


def _read_directory(directory: bytes, offset: int, count: int) -> list[_Entry]:
    entries = []
    at = 0
    for _ in range(count):
        if len(directory) - at < _CENTRAL.size:
            raise ZipFault("its central directory is damaged")
        fields = _CENTRAL.unpack_from(directory, at)
        signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment = fields[
            :13
        ]
        if signature != b"PK\x01\x02":
            raise ZipFault("its central directory is damaged")
        name_at = at + _CENTRAL.size
        extra_at = name_at + name_length
        name = directory[name_at:extra_at]
        extra = directory[extra_at : extra_at + extra_length]
        size, packed, header = _widen(extra, size, packed, fields[16])
        if flags & _ENCRYPTED:
            raise ZipFault(f"its record {_decode(name)} is encrypted")
        if method or packed != size:
            record = _decode(name)
            raise ZipFault(f"its record {record} is compressed, which torch.save never does", record)
        if fields[15] & _FOLDER:
            raise ZipFault(f"its record {_decode(name)} is marked as a folder")
        entries.append(_Entry(header, name, size, crc, offset + at + _CENTRAL_CRC))
        at = extra_at + extra_length + comment
    if at != len(directory):
        raise ZipFault("its central directory is damaged")
    return entries


def _widen(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Return size, packed size and offset, from the 64-bit extra field where they are too large for 32."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra[: at + length].ljust(at + length), at))
            size, packed, header = (
                next(wide, value) if value == 0xFFFFFFFF else value for value in (size, packed, header)
            )
        at += length
    return size, packed, header


def _read_record(read: Read, entry: _Entry, end: int) -> Record:
    """Check a record's own header, and that it fills the room up to `end`, with its CRC stated alike."""
    name = _decode(entry.name)
    room = _LOCAL.size + len(entry.name)
    if entry.header + room > end:
        raise ZipFault(f"its record {name} is damaged")
    header = read(entry.header, room)
    signature, _, flags, method, _, _, crc, _, _, name_length, extra_length = _LOCAL.unpack_from(header)
    if signature != MAGIC or name_length != len(entry.name) or header[_LOCAL.size :] != entry.name or method:
        raise ZipFault(f"the two headers of its record {name} disagree")
    start = entry.header + room + extra_length
    gap = end - start - entry.size
    if gap < 0:
        raise ZipFault(f"its record {name} overlaps what follows it")
    if not flags & _DESCRIPTOR_FOLLOWS or (gap == 0 and entry.size == 0):
        field, stated = entry.header + _LOCAL_CRC, crc
        fits = gap == 0
    else:
        fits = gap in _DESCRIPTORS
        field = end - gap + _DESCRIPTORS.get(gap, 0)
        stated = int.from_bytes(read(field, 4), "little") if fits else 0
    if not fits:
        raise ZipFault(f"{gap} bytes after its record {name} belong to nothing")
    if stated != entry.crc:
        raise ZipFault(f"the two headers of its record {name} disagree")
    return Record(name, start, entry.size, entry.crc, (field, entry.crc_field))


def _decode(name: bytes) -> str:
    """Return a member's name; raises ZipFault for one that could leave the folder it is unpacked to."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise ZipFault("a record's name is not UTF-8") from None
    if "\\" in text or "\0" in text or any(part in ("", ".", "..") for part in text.split("/")):
        raise ZipFault(f"its record {text} has an unsafe name")
    return text
