"""safetensors: a length, a JSON header, and the tensors' bytes without a gap.

    u64 little-endian N | N bytes of JSON, padded with spaces | data

Noise keeps dtype and shape, so the output's first 8 + N bytes are the source's, copied as they are: tensor
order, offsets, `__metadata__` and padding cannot change. Where dtypes change on the way, or the source is a
pickle, `output/convert.py` makes the header.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from blake3 import blake3

from noisytune_cli.checkpoint.formats._direct import Room
from noisytune_cli.checkpoint.formats._file import InputFile, WritableFile, create_output, open_input
from noisytune_cli.checkpoint.formats._signatures import CONVERT, FETCH, HEAD
from noisytune_cli.checkpoint.formats._signatures import recognise as recognise_other
from noisytune_cli.checkpoint.formats.safetensors.header import (
    MAX_HEADER,
    PREFIX,
    HeaderFault,
    parse_header,
)
from noisytune_cli.errors import InputInvalid
from noisytune_cli.reading import Reach
from noisytune_cli.records import TensorSpec

#: What a file's name ends in.
SUFFIX = ".safetensors"

#: What names of texts end in that lie beside weights: who gives one means them.
_OF_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".toml", ".py")

_FETCH = "The file is damaged or unfinished: fetch it again"
_REWRITE = (
    "The file is damaged or wrongly written: fetch it again, or save it anew with the safetensors package"
)


class SafetensorsSource(InputFile):
    """One open safetensors file (see `formats.Source`); `header` is its first 8 + N bytes."""

    def __init__(self, fd: int, path: Path, name: str, mmap: bool) -> None:
        """Take over `fd`; where this raises, an OSError included, the caller closes it."""
        super().__init__(fd, path, name)
        self.header = self._read_header()
        try:
            parsed = parse_header(self.header, name, self.size - len(self.header))
        except HeaderFault as fault:
            raise InputInvalid(
                "not a valid safetensors file",
                path=path,
                tensor=fault.tensor,
                why=fault.why,
                next_step=_REWRITE,
            ) from fault
        self.tensors = parsed.tensors
        self.metadata: Mapping[str, str] = parsed.metadata
        self.header_digest = f"blake3:{blake3(self.header).hexdigest()}"
        #: Whether the header is all that is here of the file (`checkpoint/remote.py`): a value is asked for
        #: by `fetch`, which is given where its bytes begin and end, or cannot be read.
        self.has_header_alone = False
        self.fetch: Callable[[int, int], bytes] | None = None
        if not self.tensors:
            self.warnings = (f"{name} holds no tensors",)
        self.ties: tuple[tuple[str, ...], ...] = ()
        if mmap:
            self.map()

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        """Return `len(buffer)` bytes of `tensor`: in `buffer`, or as a read-only view of the mapping.

        Raises Mismatch if the file ends before, InputUnreadable if the read fails.
        """
        if self.has_header_alone:
            if self.fetch is None:
                raise AssertionError("a value was asked for where there is a header alone")
            buffer[:] = self.fetch(tensor.offset + start, tensor.offset + start + len(buffer))
            return buffer
        return self.read_at(tensor.offset + start, buffer)

    def check_sums(self) -> None:
        """Do nothing: the format keeps no checksums."""

    def create_sink(self, path: Path, mode: int = 0o666, room: Room | None = None) -> SafetensorsSink:
        """Create the file at `path`, which must not exist, with this file's header and empty slots."""
        return create_file(path, self.header, self.size, self.mode & mode, room)

    def _read_header(self) -> bytearray:
        if self.size == 0:
            raise self._not_safetensors("it is empty", b"")
        head = bytearray(min(self.size, HEAD))
        self.read_into(0, memoryview(head))
        if self.size < PREFIX:
            raise self._not_safetensors(f"it has only {self.size} bytes", head)
        length = int.from_bytes(head[:PREFIX], "little")
        if length == 0:
            raise self._not_safetensors("it says that its header has 0 bytes", head)
        if length > MAX_HEADER:
            raise self._not_safetensors(
                f"it says that its header has {length:,} bytes; {MAX_HEADER:,} is the limit", head
            )
        if length > self.size - PREFIX:
            raise self._not_safetensors(
                f"it says that its header has {length:,} bytes, but the whole file has {self.size:,}", head
            )
        if head[PREFIX] != ord("{"):
            raise self._not_safetensors("its header does not begin with a brace", head)
        header = bytearray(PREFIX + length)
        self.read_into(0, memoryview(header))
        return header

    def _not_safetensors(self, why: str, head: bytes | bytearray) -> InputInvalid:
        known = recognise_other(bytes(head))
        why, next_step = (f"it is {known[0]}", known[1]) if known else (why, _FETCH)
        if not known and self.path.suffix not in ("", SUFFIX) and not recognise(bytes(head)):
            why, next_step = "it begins like none of the formats that are read", CONVERT
        if next_step == FETCH and self.path.suffix in _OF_TEXTS:
            next_step = "Give the file with the weights, or the folder that they lie in"
        return InputInvalid("not a safetensors file", path=self.path, why=why, next_step=next_step)


class SafetensorsSink(WritableFile):
    """One safetensors file being written (see `formats.Sink`): a header, and its slots."""

    def __init__(self, fd: int, path: Path, header: bytes | bytearray, size: int, room: Room | None) -> None:
        """Take over `fd`; where this raises, an OSError included, the caller closes it."""
        super().__init__(fd, path, size, room)
        self.write_at(0, header)

    def space(self, tensor: TensorSpec, start: int, nbytes: int) -> memoryview | None:
        """Return memory to make in what is written next from byte `start` of `tensor`, None for none."""
        return self.space_at(tensor.offset + start, nbytes)

    def write(self, tensor: TensorSpec, start: int, buffer: bytes | memoryview) -> None:
        """Write `buffer` from byte `start` of `tensor`, whole or not at all (an error otherwise)."""
        self.write_at(tensor.offset + start, buffer)


def recognise(head: bytes) -> bool:
    """Tell whether a file that begins with `head` has a header's length and its opening brace."""
    return int.from_bytes(head[:PREFIX], "little") <= MAX_HEADER and head[PREFIX : PREFIX + 1] == b"{"


def open_source(path: Path, name: str, mmap: bool, reach: Reach | None = None) -> SafetensorsSource:
    """Open the safetensors file at `path` and validate its header; no tensor data is read.

    `name` is the file's name relative to the checkpoint, for the TensorSpecs. Raises InputInvalid for
    whatever is not a safetensors file, InputUnreadable if it is missing or cannot be read.
    """
    return open_input(path, lambda fd: SafetensorsSource(fd, path, name, mmap), reach)


def create_file(
    path: Path, header: bytes | bytearray, size: int, mode: int, room: Room | None = None
) -> SafetensorsSink:
    """Create the file at `path`, which must not exist: `size` bytes that begin with the whole `header`."""
    return create_output(path, lambda fd: SafetensorsSink(fd, path, header, size, room), mode)
