"""A file in whose storages weights lie: read where they are, written in place, its checksums made right.

What is common to the file that torch.save writes and to those of torch.distributed.checkpoint, in which many
such files lie end to end. The output is the source's copy, byte for byte, with the elements of the weights
written in place and the checksums of their ZIP records made right, so whatever loads the source loads it.

The header's digest covers the file but for the weights' elements and, since they follow from those, the
checksums of the records that hold weights, which count as zero.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from blake3 import blake3

from noisytune_cli.checkpoint.formats._direct import Room
from noisytune_cli.checkpoint.formats._file import InputFile, WritableFile, create_output
from noisytune_cli.checkpoint.formats.torch.archive import Archive, wrong_checksum
from noisytune_cli.checkpoint.formats.torch.crc32 import RangeSums
from noisytune_cli.checkpoint.formats.torch.globals import StoredTensor
from noisytune_cli.checkpoint.formats.torch.strided import (
    MAX_EXPANDED,
    MAX_RUNS,
    Held,
    Runs,
    find_runs,
    merge_extents,
)
from noisytune_cli.checkpoint.formats.torch.values import PickleFault
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import InputInvalid
from noisytune_cli.records import TensorSpec

_CHUNK = 1 << 20

#: Bytes of tensors out of order that stay in memory between two reads, the one read last aside.
_HELD_BYTES = 256 << 20


class StoredSource(InputFile, ABC):
    """One open file with storages (see `formats.Source`)."""

    def __init__(self, fd: int, path: Path, name: str, mmap: bool) -> None:
        """Take over `fd`; where this raises, an OSError included, the caller closes it."""
        super().__init__(fd, path, name)
        self.metadata: Mapping[str, str] = {}
        #: The paths through the file's containers that say more than the names.
        self.paths: Mapping[str, str] = {}
        tensor: str | None = None
        try:
            archive, weights = self._find()
            self.runs: dict[str, Runs] = {}
            room, expanded = MAX_RUNS, MAX_EXPANDED
            for tensor, stored in weights:
                # What may get noise has to have each of its elements for itself.
                most = 0 if stored.dtype.name in FLOAT_DTYPES else expanded
                self.runs[tensor] = runs = find_runs(stored, archive.starts[stored.key], room, most)
                room -= max(0, len(runs.starts) - 1)
                expanded -= 0 if runs.expanded is None else stored.nbytes
            tensor = None
            slots = _group(weights)
            _check_rest(archive, weights, slots)
            self.extents = merge_extents(self.runs[names[0]] for names in slots.values())
        except PickleFault as fault:
            raise self._invalid(fault, tensor) from fault
        self.tensors = tuple(
            TensorSpec(
                name=key,
                dtype=stored.dtype.name,
                shape=stored.shape,
                file=name,
                offset=archive.starts[stored.key] + stored.start,
                nbytes=stored.nbytes,
                path=self.paths.get(key, ""),
            )
            for key, stored in weights
        )
        self.ties = tuple(tuple(names) for names in slots.values() if len(names) > 1)
        if not self.tensors:
            self.warnings += (f"{name} holds no tensors",)
        self._records = tuple(archive.records.values())
        self.noised_records = tuple(
            r for r in self._records if self._holds_weights(r.start, r.start + r.size)
        )
        self._sums = RangeSums(self._bytes) if self._records else None
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._holding = threading.Lock()
        if mmap:
            self.map()

    @cached_property
    def header_digest(self) -> str:
        """`blake3:HEX` over every byte of the file that is not tensor data (see the module)."""
        digest = blake3()
        fields = sorted(field for record in self.noised_records for field in record.crc_fields)
        for start, chunk in self.rest():
            content = bytearray(chunk)
            for field in fields[bisect_left(fields, start - 3) : bisect_left(fields, start + len(chunk))]:
                # A chunk may end within a field.
                low, high = max(field - start, 0), min(field + 4 - start, len(content))
                if low < high:
                    content[low:high] = bytes(high - low)
            digest.update(content)
        return f"blake3:{digest.hexdigest()}"

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        """Return `len(buffer)` bytes of `tensor`: in `buffer`, or as a read-only view of the mapping.

        Raises Mismatch if the file ends before, InputUnreadable if the read fails.
        """
        runs = self.runs[tensor.name]
        if not runs.in_order:
            self._hold(tensor.name, runs).read(start, buffer)
            return buffer
        data = self.read_at(tensor.offset + start, buffer)
        self._add(tensor.offset + start, data)
        return data

    def rest(self) -> Iterator[tuple[int, bytes]]:
        """Yield all that is not tensor data, in file order, in pieces with their offsets."""
        place = 0
        for start, end in [*self.extents.tolist(), (self.size, self.size)]:
            while place < start:
                data = self._bytes(place, min(start - place, _CHUNK))
                self._add(place, data)
                yield place, data
                place += len(data)
            place = end

    def create_sink(self, path: Path, mode: int = 0o666, room: Room | None = None) -> StoredSink:
        """Create the file at `path`, which must not exist, as a copy of this file with empty slots."""
        return create_output(path, lambda fd: StoredSink(fd, path, self, room), self.mode & mode)

    def check_sums(self) -> None:
        """Raise InputInvalid if a record of which something was read does not fit its CRC-32."""
        if self._sums is None:
            return
        touched = self._sums.touched((record.start, record.start + record.size) for record in self._records)
        for record, read in zip(self._records, touched, strict=True):
            if read and self._sums.over(record.start, record.start + record.size) != record.crc:
                raise self._invalid(wrong_checksum(record))

    @abstractmethod
    def _find(self) -> tuple[Archive, list[tuple[str, StoredTensor]]]:
        """Return where everything lies, and the weights by name; raises PickleFault."""

    @abstractmethod
    def _invalid(self, fault: PickleFault, tensor: str | None = None) -> InputInvalid:
        """Return the error for a fault of this file."""

    def _bytes(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def _add(self, offset: int, data: bytes | memoryview) -> None:
        if self._sums is not None and not self._sums.has(offset, len(data)):
            self._sums.add(offset, data)

    def _hold(self, name: str, runs: Runs) -> Held:
        """Return a tensor out of order, from memory if it was read a while ago."""
        with self._holding:
            held = self._held.pop(name, None)
            if held is None:
                held = Held(runs)
                for offset, piece in held.pieces():
                    self.read_into(offset, piece)
                    self._add(offset, piece)
            self._held[name] = held
            while len(self._held) > 1 and sum(h.stored.nbytes for h in self._held.values()) > _HELD_BYTES:
                self._held.popitem(last=False)
            return held

    def _holds_weights(self, start: int, end: int) -> bool:
        index = int(np.searchsorted(self.extents[:, 0], start))
        return index < len(self.extents) and int(self.extents[index, 0]) < end


class StoredSink(WritableFile):
    """One file with storages being written (see `formats.Sink`): the source's copy, and its slots."""

    def __init__(self, fd: int, path: Path, source: StoredSource, room: Room | None) -> None:
        """Take over `fd`; where this raises, an OSError included, the caller closes it."""
        super().__init__(fd, path, source.size, room)
        self._source = source
        self._sums = RangeSums(self.read_at)
        self._held: dict[str, tuple[Held | None, int]] = {}
        self._holding = threading.Lock()
        for offset, data in source.rest():
            self.write_at(offset, data)

    def space(self, tensor: TensorSpec, start: int, nbytes: int) -> memoryview | None:
        """Return memory to make in what is written next from byte `start` of `tensor`, None for none."""
        in_order = self._source.runs[tensor.name].in_order
        return self.space_at(tensor.offset + start, nbytes) if in_order else None

    def write(self, tensor: TensorSpec, start: int, buffer: bytes | memoryview) -> None:
        """Write `buffer` from byte `start` of `tensor`, whole or not at all (an error otherwise)."""
        runs = self._source.runs[tensor.name]
        if runs.in_order:
            self._sums.add(tensor.offset + start, buffer)  # first: it may be ours no longer
            self.write_at(tensor.offset + start, buffer)
        elif whole := self._gather(tensor, runs, start, buffer):
            for offset, piece in whole.pieces():
                self.write_at(offset, piece)
                self._sums.add(offset, piece)

    def finish(self) -> None:
        """Make the checksums right, flush to the device (fsync) and close."""
        for record in self._source.noised_records:
            crc = struct.pack("<L", self._sums.over(record.start, record.start + record.size))
            for field in record.crc_fields:
                self.write_at(field, crc)
        super().finish()

    def _gather(self, tensor: TensorSpec, runs: Runs, start: int, buffer: bytes | memoryview) -> Held | None:
        """Take a part of a tensor out of order; return it once it is whole."""
        with self._holding:
            held, missing = self._held.pop(tensor.name, (None, tensor.nbytes))
            held = held or Held(runs)
            held.write(start, buffer)
            missing -= len(buffer)
            if missing:
                self._held[tensor.name] = held, missing
            return None if missing else held


def _group(weights: list[tuple[str, StoredTensor]]) -> dict[tuple[object, ...], list[str]]:
    """Return the names of each slot; an empty tensor has a slot of its own."""
    slots: dict[tuple[object, ...], list[str]] = {}
    for name, stored in weights:
        slots.setdefault(stored.slot if stored.nbytes else (name,), []).append(name)
    return slots


def _check_rest(
    archive: Archive, weights: list[tuple[str, StoredTensor]], slots: Mapping[tuple[object, ...], object]
) -> None:
    """Raise PickleFault if a tensor that is no weight would change with a part of one that is."""
    ours = {id(stored) for _, stored in weights}
    spans: dict[str, list[tuple[int, int]]] = {}
    for _, stored in weights:
        spans.setdefault(stored.key, []).append((stored.start, stored.start + stored.span))
    ends: dict[str, list[int]] = {}  # of the spans so far, in the order of their starts
    for key, pairs in spans.items():
        pairs.sort()
        ends[key] = list(accumulate((end for _, end in pairs), max))
    for view in archive.views:
        if id(view) in ours or view.slot in slots or view.key not in spans:
            continue
        before = bisect_left(spans[view.key], (view.start + view.span, 0))
        if view.span and before and ends[view.key][before - 1] > view.start:
            raise PickleFault(
                "a tensor of its training state shares a part of a weight's storage",
                "Load it in torch, and save the model's state dict alone",
            )
