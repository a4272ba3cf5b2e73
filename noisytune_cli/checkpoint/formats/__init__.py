"""Checkpoint formats: one file each, behind one contract.

A format module's name is the name a user types. It offers

    open_source(path, name, mmap, reach=None) -> Source    parse and validate the header; read no tensor data
    recognise(head) -> bool                    whether a file that begins so is one

A `Source` is one weight file: where its tensors lie, and plain positioned reads. A `Sink` is its twin in
the output: the same header, and a slot for every tensor. Nothing here knows about noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from noisytune_cli.checkpoint.formats._signatures import HEAD
from noisytune_cli.checkpoint.layout import METADATA
from noisytune_cli.errors import unreadable
from noisytune_cli.reading import Reach, open_regular
from noisytune_cli.records import Declared, TensorSpec

if TYPE_CHECKING:
    from noisytune_cli.checkpoint.formats._direct import Room


class Source(Protocol):
    """One open weight file, or a directory that is read as one; `name` is then its main file's.

    `files` are the names of all files it is made of, `size` their bytes, `mode` what all of
    them allow. Threads may read at once; nothing is
    ever written to it.
    """

    path: Path
    name: str
    size: int
    mode: int
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...]
    #: What the file holds beside the model's tensors (an optimizer's state), by name.
    beside: tuple[str, ...]
    #: What the file itself says of them.
    declared: Declared

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that it is made of, its own first."""

    @property
    def header_digest(self) -> str:
        """`blake3:HEX` over every byte of the file that is not tensor data."""

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Names that the file itself stores as one: for each group the same slot, read and written alike."""

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        """Return the `len(buffer)` bytes from byte `start` of `tensor`, its elements in row-major order.

        They are in `buffer`, or a read-only view of the mapping. Raises Mismatch if the file ends before,
        InputUnreadable if the read fails.
        """

    def create_sink(self, path: Path, mode: int = 0o666, room: Room | None = None) -> Sink:
        """Create the file at `path`, which must not exist, with this file's header and empty slots.

        Nobody may read it who may not read this file, nor one of `mode`. With a `room` it is written
        past the page cache.
        """

    def check_unchanged(self) -> None:
        """Raise Mismatch if size, mtime, ctime or inode differ from what they were at open."""

    def check_sums(self) -> None:
        """Raise InputInvalid if what was read so far does not fit the checksums that the format keeps."""

    def close(self) -> None:
        """Release the descriptor (twice is fine)."""


class Sink(Protocol):
    """One weight file being written; slots may be filled in any order, by several threads."""

    def space(self, tensor: TensorSpec, start: int, nbytes: int) -> memoryview | None:
        """Return memory to make in what `write` gets next from byte `start`, so that it need not be copied.

        None where there is none. After `write` it is no longer the caller's.
        """

    def write(self, tensor: TensorSpec, start: int, buffer: bytes | memoryview) -> None:
        """Write `buffer` from byte `start` of `tensor`, whole or not at all (an error otherwise)."""

    def finish(self) -> None:
        """Flush to the device (fsync) and close; an error here means that nothing may be published."""

    def abort(self) -> None:
        """Close without a promise (twice is fine)."""


class Nowhere:
    """A sink for what only has to be computed."""

    def space(self, tensor: TensorSpec, start: int, nbytes: int) -> memoryview | None:
        """Have none."""

    def write(self, tensor: TensorSpec, start: int, buffer: bytes | memoryview) -> None:
        """Keep nothing."""

    def finish(self) -> None:
        """Have nothing to flush."""

    def abort(self) -> None:
        """Have nothing to close."""


def check_read(sources: Iterable[Source]) -> None:
    """Raise Mismatch if a file is not what it was at open, InputInvalid if it does not fit its checksums."""
    for source in sources:
        source.check_unchanged()
        source.check_sums()


def open_source(path: Path, name: str, mmap: bool, reach: Reach | None = None) -> Source:
    """Open the weight file at `path` in its format: the name's where it is plain, else the content's.

    `name` is the file's name relative to the checkpoint, for the TensorSpecs. No tensor data is read.
    """
    from noisytune_cli.checkpoint.formats import safetensors

    if path.name == METADATA:
        from noisytune_cli.checkpoint.formats import dcp

        return dcp.open_source(path, name, mmap, reach)
    if path.name.endswith(safetensors.SUFFIX) or safetensors.recognise(head := _read_head(path, reach)):
        return safetensors.open_source(path, name, mmap, reach)
    from noisytune_cli.checkpoint.formats import torch

    if torch.recognise(head) or path.name.endswith(torch.SUFFIXES):
        return torch.open_source(path, name, mmap, reach)
    return safetensors.open_source(path, name, mmap, reach)


def begins_weights(path: Path, reach: Reach | None = None) -> bool:
    """Tell whether a file begins as weights of one of the formats do, whether or not it can be read."""
    from noisytune_cli.checkpoint.formats import safetensors, torch

    head = _read_head(path, reach)
    return safetensors.recognise(head) or torch.recognise(head)


def _read_head(path: Path, reach: Reach | None) -> bytes:
    fd = open_regular(path, reach)
    try:
        return os.pread(fd, HEAD, 0)
    except OSError as error:
        raise unreadable(error, path) from error
    finally:
        os.close(fd)
