"""One `*.distcp` file: what torch.save writes of a tensor, many times, end to end.

The chunks of weights in it are its tensors, under labels of their own; the rest of the file, which is other
values and an optimizer's state, is never looked into.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from noisytune_cli.checkpoint.formats._file import open_input
from noisytune_cli.checkpoint.formats.dcp.metadata import Chunk
from noisytune_cli.checkpoint.formats.torch.archive import Archive, Read, read_zip
from noisytune_cli.checkpoint.formats.torch.globals import DType, StoredTensor
from noisytune_cli.checkpoint.formats.torch.storages import StoredSource
from noisytune_cli.checkpoint.formats.torch.values import PickleFault
from noisytune_cli.checkpoint.formats.torch.zip import Record
from noisytune_cli.checkpoint.layout import METADATA
from noisytune_cli.errors import InputInvalid
from noisytune_cli.reading import Reach, is_there

_FETCH = "The checkpoint is damaged or unfinished: fetch it again, or save it anew"
_WHOLE = "Fetch all files of the checkpoint, .metadata among them"

#: Chunks by label, each with the dtype that it has to have.
Chunks = Mapping[str, tuple[Chunk, DType]]


class ChunkFile(StoredSource):
    """One open `.distcp` file (see `formats.Source`)."""

    def __init__(self, fd: int, path: Path, name: str, mmap: bool, chunks: Chunks) -> None:
        """Take over `fd`; where this raises, an OSError included, the caller closes it."""
        self._chunks = chunks
        super().__init__(fd, path, name, mmap)

    def _find(self) -> tuple[Archive, list[tuple[str, StoredTensor]]]:
        weights: list[tuple[str, StoredTensor]] = []
        starts: dict[str, int] = {}
        records: dict[str, Record] = {}
        for label, (chunk, dtype) in self._chunks.items():
            if chunk.start + chunk.length > self.size:
                raise PickleFault(f"it is truncated: {label} would end beyond its end", _FETCH)
            try:
                archive = read_zip(self._window(chunk.start), chunk.length)
            except PickleFault as fault:
                raise PickleFault(f"{label}: {fault.why}", fault.next_step) from fault
            stored = archive.root
            if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (dtype, chunk.sizes):
                raise PickleFault(f"{label} is another tensor than .metadata says")
            weights.append((label, replace(stored, key=label)))
            starts[label] = chunk.start + archive.starts[stored.key]
            record = next(r for r in archive.records.values() if r.start == archive.starts[stored.key])
            records[label] = replace(
                record,
                name=f"{label}: {record.name}",
                start=chunk.start + record.start,
                crc_fields=tuple(chunk.start + field for field in record.crc_fields),
            )
        return Archive(None, (), starts, records), weights

    def _window(self, start: int) -> Read:
        """Return how to read what begins at `start`."""
        return lambda offset, length: self._bytes(start + offset, length)

    def _invalid(self, fault: PickleFault, tensor: str | None = None) -> InputInvalid:
        return invalid(self.path, fault, tensor)


def open_chunks(
    path: Path, name: str, mmap: bool, chunks: Chunks, opened: ExitStack, reach: Reach | None
) -> ChunkFile:
    """Open the file at `path`, and have `opened` close it; InputInvalid if it is absent or another."""
    if not is_there(path):
        raise InputInvalid(
            "the checkpoint is incomplete",
            path=path,
            why=f"{METADATA} names this file, which is absent",
            next_step=_WHOLE,
        )
    part = open_input(path, lambda fd: ChunkFile(fd, path, name, mmap, chunks), reach)
    opened.callback(part.close)
    return part


def invalid(path: Path, fault: PickleFault, tensor: str | None = None) -> InputInvalid:
    """Return the error for a fault of the file at `path`."""
    return InputInvalid(
        "not a valid torch.distributed.checkpoint",
        path=path,
        tensor=tensor,
        why=fault.why,
        next_step=fault.next_step or _FETCH,
    )
