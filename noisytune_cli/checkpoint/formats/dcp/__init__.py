"""torch.distributed.checkpoint: a folder of `.metadata` and `*.distcp` files, as FSDP and torchtitan write.

The folder is one checkpoint, and one Source: a tensor may lie in chunks in several files. `.metadata` says in
which (`metadata.py`), each chunk is what torch.save writes of a tensor (`chunks.py`), and chunks are
rectangles (`rectangles.py`). No process group, and no torch, is needed. The output is the same files with
the same bytes but for the elements of the weights; optimizer state and all else is carried over.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from noisytune_cli.checkpoint.formats._direct import Room
from noisytune_cli.checkpoint.formats._file import (
    InputFile,
    WritableFile,
    common_mode,
    create_output,
    open_input,
)
from noisytune_cli.checkpoint.formats.dcp.chunks import ChunkFile, invalid, open_chunks
from noisytune_cli.checkpoint.formats.dcp.metadata import Chunk, ChunkedTensor, read_metadata
from noisytune_cli.checkpoint.formats.dcp.rectangles import Rectangle, check_tiles, move_run
from noisytune_cli.checkpoint.formats.torch.globals import DType
from noisytune_cli.checkpoint.formats.torch.pickle import MAX_BYTES, MAX_OPCODES
from noisytune_cli.checkpoint.formats.torch.state_dict import declared_by, sort_content
from noisytune_cli.checkpoint.formats.torch.storages import StoredSink
from noisytune_cli.checkpoint.formats.torch.values import PickleFault
from noisytune_cli.checkpoint.layout import CHUNKS_SUFFIX
from noisytune_cli.errors import unreadable
from noisytune_cli.reading import Reach
from noisytune_cli.records import TensorSpec

#: `.metadata` may be larger, by as much again, for each of so many stored bytes of chunks, up to a limit: a
#: checkpoint of 64 processes has 10 opcodes for each KB, and a small file may cost but little to refuse.
_BYTES_FOR_MORE, _MOST_TIMES = 1 << 30, 16

#: A chunk as its file's tensor.
_Piece = tuple["ChunkFile", TensorSpec]


class DcpSource:
    """One open directory (see `formats.Source`); `path` and `name` are those of its `.metadata`."""

    def __init__(self, metadata: InputFile, opened: ExitStack, mmap: bool, reach: Reach | None) -> None:
        """Open the files that `metadata` names; where this raises, `opened` closes what it had opened."""
        self.path, self.name = metadata.path, metadata.name
        try:
            most = MAX_BYTES * (times := _times_larger(self.path.parent))
            if metadata.size > most:
                raise PickleFault(f"it has {metadata.size:,} bytes; {most:,} is the limit for these chunks")
            self._content = bytearray(metadata.size)
            metadata.read_into(0, memoryview(self._content))
            saved = read_metadata(bytes(self._content), MAX_OPCODES * times)
            content = sort_content(saved.root, ChunkedTensor)
            found = content.weights
            weights = {weight.name: weight.tensor for weight in found}
            for name, tensor in weights.items():
                _check_chunks(name, tensor)
        except PickleFault as fault:
            raise invalid(self.path, fault) from fault
        chunks: dict[str, dict[str, tuple[Chunk, DType]]] = {file: {} for file in saved.files}
        for name, tensor in weights.items():
            for number, chunk in _with_elements(tensor):
                chunks[chunk.file][_label(name, number)] = chunk, tensor.dtype
        home = posixpath.dirname(self.name)
        self._parts = [
            open_chunks(
                self.path.with_name(file), posixpath.join(home, file), mmap, chunks[file], opened, reach
            )
            for file in saved.files
        ]
        self._inputs: tuple[InputFile, ...] = (metadata, *self._parts)
        self.mode = common_mode(file.mode for file in self._inputs)
        self.files = tuple(file.name for file in self._inputs)
        self.size = sum(file.size for file in self._inputs)
        pieces = {spec.name: (part, spec) for part in self._parts for spec in part.tensors}
        self._rectangles = {name: _rectangles(name, t, pieces) for name, t in weights.items()}
        paths = {weight.name: weight.path for weight in found}
        self.tensors = tuple(
            TensorSpec(name, t.dtype.name, t.shape, self.name, self._offset(name), _nbytes(t), paths[name])
            for name, t in weights.items()
        )
        self.metadata: Mapping[str, str] = {}
        self.beside = content.beside
        self.declared = declared_by(saved.root, found)
        self.ties: tuple[tuple[str, ...], ...] = ()
        self.warnings = content.warnings(self.name)
        if not self.tensors:
            self.warnings += (f"{self.name} names no tensors of a model",)
        self._opened = opened.pop_all()

    @cached_property
    def header_digest(self) -> str:
        """`blake3:HEX` over `.metadata` and, for each file, its name, size and own header's digest."""
        digest = blake3(self._content)
        for part in self._parts:
            name = posixpath.basename(part.name)
            digest.update(f"\n{name} {part.size} {part.header_digest}".encode())
        return f"blake3:{digest.hexdigest()}"

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        """Return `len(buffer)` bytes of `tensor`: in `buffer`, or as a read-only view of a mapping.

        Raises Mismatch if a file ends before, InputUnreadable if the read fails.
        """
        rectangles = self._rectangles[tensor.name]
        if len(rectangles) == 1:
            part, spec = rectangles[0].piece
            data: memoryview = part.read(spec, start, buffer)
            return data
        move_run(_byte_shape(tensor), rectangles, start, np.frombuffer(buffer, np.uint8), _read_piece)
        return buffer

    def create_sink(self, path: Path, mode: int = 0o666, room: Room | None = None) -> DcpSink:
        """Create all files beside `path`, which becomes `.metadata`; none of them may exist."""
        return DcpSink(self, path, mode, room)

    def piece_sinks(
        self, folder: Path, mode: int, room: Room | None
    ) -> Iterator[tuple[ChunkFile, StoredSink]]:
        """Create each chunk file in `folder`, with empty slots."""
        for part in self._parts:
            yield part, part.create_sink(folder / posixpath.basename(part.name), mode, room)

    def metadata_sink(self, path: Path, mode: int) -> WritableFile:
        """Create `.metadata` at `path`."""
        sink = create_output(path, lambda fd: WritableFile(fd, path, len(self._content)), self.mode & mode)
        sink.write_at(0, self._content)
        return sink

    def rectangles(self, tensor: TensorSpec) -> list[Rectangle]:
        """Return where a tensor lies, in bytes; each piece is a chunk file and its tensor."""
        return self._rectangles[tensor.name]

    def check_unchanged(self) -> None:
        """Raise Mismatch if size, mtime, ctime or inode of a file differ from what they were at open."""
        for file in self._inputs:
            file.check_unchanged()

    def check_sums(self) -> None:
        """Raise InputInvalid if a record of which something was read does not fit its CRC-32."""
        for part in self._parts:
            part.check_sums()

    def close(self) -> None:
        """Release all descriptors (twice is fine)."""
        self._opened.close()

    def _offset(self, name: str) -> int:
        """Return where a tensor in one piece begins in its file, and 0 for others: they are never mapped."""
        rectangles = self._rectangles[name]
        if len(rectangles) != 1:
            return 0
        spec: TensorSpec = rectangles[0].piece[1]
        return spec.offset


class DcpSink:
    """One directory being written (see `formats.Sink`)."""

    def __init__(self, source: DcpSource, path: Path, mode: int, room: Room | None) -> None:
        """Create the files; where this raises, those that were made are closed."""
        self._source = source
        self._sinks: dict[ChunkFile, StoredSink] = {}
        self._metadata: WritableFile | None = None
        try:
            for part, sink in source.piece_sinks(path.parent, mode, room):
                self._sinks[part] = sink
            self._metadata = source.metadata_sink(path, mode)
        except BaseException:
            self.abort()
            raise

    def space(self, tensor: TensorSpec, start: int, nbytes: int) -> memoryview | None:
        """Have none: a tensor lies in several places."""

    def write(self, tensor: TensorSpec, start: int, buffer: bytes | memoryview) -> None:
        """Write `buffer` from byte `start` of `tensor`, whole or not at all (an error otherwise)."""
        run = np.frombuffer(buffer, np.uint8)
        move_run(_byte_shape(tensor), self._source.rectangles(tensor), start, run, self._write_piece)

    def finish(self) -> None:
        """Make the checksums right, flush all files (fsync) and close them, `.metadata` last."""
        for sink in self._sinks.values():
            sink.finish()
        assert self._metadata is not None
        self._metadata.finish()

    def abort(self) -> None:
        """Close without a promise (twice is fine)."""
        for sink in self._sinks.values():
            sink.abort()
        if self._metadata is not None:
            self._metadata.abort()

    def _write_piece(self, piece: _Piece, first: int, content: NDArray[np.uint8]) -> None:
        part, spec = piece
        self._sinks[part].write(spec, first, np.ascontiguousarray(content).reshape(-1).data)


def recognise(head: bytes) -> bool:
    """Tell whether a file that begins with `head` is a `.metadata`: it begins with the name of a class."""
    return b"torch.distributed.checkpoint.metadata" in head


def open_source(path: Path, name: str, mmap: bool, reach: Reach | None = None) -> DcpSource:
    """Open the directory whose `.metadata` is at `path` and read its structure; no tensor data is read.

    `name` is that file's name relative to the checkpoint, for the TensorSpecs. Raises InputInvalid for
    whatever is no checkpoint or not a safe one, InputUnreadable if `.metadata` is missing or cannot be read.
    """
    with ExitStack() as opened:
        metadata = open_input(path, lambda fd: InputFile(fd, path, name), reach)
        opened.callback(metadata.close)
        return DcpSource(metadata, opened, mmap, reach)


def _times_larger(folder: Path) -> int:
    """Return how many times larger than others `.metadata` may be, for what is stored beside it."""
    stored = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(CHUNKS_SUFFIX):
                    # Blocks, not bytes: a hole costs nothing to make.
                    stored += entry.stat().st_blocks * 512
    except OSError as error:
        raise unreadable(error, folder) from error
    return min(1 + stored // _BYTES_FOR_MORE, _MOST_TIMES)


def _check_chunks(name: str, tensor: ChunkedTensor) -> None:
    try:
        check_tiles(
            tensor.shape,
            [Rectangle(chunk.offsets, chunk.sizes, 0, None) for _, chunk in _with_elements(tensor)],
        )
    except PickleFault as fault:
        raise PickleFault(f"{name}: {fault.why}", fault.next_step) from fault


def _with_elements(tensor: ChunkedTensor) -> Iterator[tuple[int, Chunk]]:
    """Yield the chunks that are not empty, with their numbers."""
    return ((number, chunk) for number, chunk in enumerate(tensor.chunks) if chunk.elements)


def _label(name: str, number: int) -> str:
    return f"chunk {number} of {name}"


def _rectangles(name: str, tensor: ChunkedTensor, pieces: Mapping[str, _Piece]) -> list[Rectangle]:
    """Return the chunks of a tensor, counted in bytes."""
    size = tensor.dtype.itemsize
    return [
        Rectangle((*chunk.offsets, 0), (*chunk.sizes, size), 0, pieces[_label(name, number)])
        for number, chunk in _with_elements(tensor)
    ]


def _nbytes(tensor: ChunkedTensor) -> int:
    return sum(chunk.elements for chunk in tensor.chunks) * tensor.dtype.itemsize


def _byte_shape(tensor: TensorSpec) -> tuple[int, ...]:
    """Return a tensor's shape with an element's bytes as its innermost dimension."""
    return (*tensor.shape, tensor.nbytes // (tensor.elements or 1))


def _read_piece(piece: _Piece, first: int, target: NDArray[np.uint8]) -> None:
    """Fill `target` with the bytes of a piece from byte `first` on."""
    part, spec = piece
    straight = target.flags.c_contiguous
    flat = target.reshape(-1) if straight else np.empty(target.size, np.uint8)
    buffer = flat.data
    data = part.read(spec, first, buffer)
    if not straight or data is not buffer:
        target[...] = np.frombuffer(data, np.uint8).reshape(target.shape)
