"""safetensors: a length, a JSON header, and the tensors' bytes without a gap.

    u64 little-endian N | N bytes of JSON, padded with spaces | data

Noise keeps dtype and shape, so the output's first 8 + N bytes are the source's, copied as they are: tensor
order, offsets, `__metadata__` and padding cannot change. Reads are plain positioned reads unless mapping is
asked for: a file that is truncated under a mapping kills the process, a read only comes back short.
"""

from __future__ import annotations

import contextlib
import errno
import mmap as mapping
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from noisytune_cli import system
from noisytune_cli.errors import (
    InputInvalid,
    Mismatch,
    NoisytuneError,
    ResourceExhausted,
    unreadable,
    unwritable,
)
from noisytune_cli.formats._header import PREFIX, HeaderFault, parse_header
from noisytune_cli.reading import open_regular
from noisytune_cli.records import TensorSpec
from noisytune_cli.signatures import HEAD, recognise

_MAX_HEADER = 100_000_000  # the safetensors package's own limit
_WRITEBACK_BYTES = 32 << 20

_FETCH = "The file is damaged or unfinished: fetch it again"
_REWRITE = (
    "The file is damaged or wrongly written: fetch it again, or save it anew with the safetensors package"
)


class SafetensorsSource:
    """One open safetensors file (see `formats.Source`); `header` is its first 8 + N bytes."""

    def __init__(self, fd: int, path: Path, name: str, mmap: bool) -> None:
        """Take over `fd`; where this raises, an OSError included, the caller closes it."""
        self.path = path
        self.name = name
        self._fd = fd
        self._at_open = _fingerprint(os.fstat(fd))
        self.identity = self._at_open[:2]
        self.size = self._at_open[2]
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
        self.warnings: tuple[str, ...] = () if self.tensors else (f"{name} holds no tensors",)
        self._mapped = self._map() if mmap else None

    def fileno(self) -> int:
        """Return the open descriptor."""
        return self._fd

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        """Return `len(buffer)` bytes of `tensor`: in `buffer`, or as a read-only view of the mapping.

        Raises Mismatch if the file ends before, InputUnreadable if the read fails.
        """
        offset = tensor.offset + start
        if self._mapped is None:
            self._read_into(offset, buffer)
            return buffer
        end = offset + len(buffer)
        # Touching a page beyond the end is fatal (SIGBUS), so look first; what is cut off later still is.
        try:
            size = os.fstat(self._fd).st_size
        except OSError as error:
            raise unreadable(error, self.path) from error
        if size < end:
            raise self._changed("it is shorter than it was")
        return self._mapped[offset:end]

    def create_sink(self, path: Path) -> SafetensorsSink:
        """Create the file at `path`, which must not exist, with this file's header and empty slots."""
        return create_sink(path, self)

    def check_unchanged(self) -> None:
        """Raise Mismatch if size, mtime or inode differ from what they were at open."""
        try:
            by_name = _fingerprint(os.stat(self.path))
            by_descriptor = _fingerprint(os.fstat(self._fd))
        except FileNotFoundError as error:
            raise self._changed("it was removed") from error
        except OSError as error:
            raise unreadable(error, self.path) from error
        if by_name[:2] != self.identity:
            raise self._changed("another file took its place")
        if by_descriptor != self._at_open or by_name != self._at_open:
            raise self._changed("its size or its time of modification is another")

    def close(self) -> None:
        """Release the descriptor (twice is fine); a mapping lives as long as the views into it."""
        self._mapped = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _read_header(self) -> bytearray:
        if self.size == 0:
            raise self._not_safetensors("it is empty", b"")
        head = bytearray(min(self.size, HEAD))
        self._read_into(0, memoryview(head))
        if self.size < PREFIX:
            raise self._not_safetensors(f"it has only {self.size} bytes", head)
        length = int.from_bytes(head[:PREFIX], "little")
        if length == 0:
            raise self._not_safetensors("it says that its header has 0 bytes", head)
        if length > _MAX_HEADER:
            raise self._not_safetensors(
                f"it says that its header has {length:,} bytes; {_MAX_HEADER:,} is the limit", head
            )
        if length > self.size - PREFIX:
            raise self._not_safetensors(
                f"it says that its header has {length:,} bytes, but the whole file has {self.size:,}", head
            )
        if head[PREFIX] != ord("{"):
            raise self._not_safetensors("its header does not begin with a brace", head)
        header = bytearray(PREFIX + length)
        self._read_into(0, memoryview(header))
        return header

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        try:
            while done < len(buffer):
                got = os.preadv(self._fd, [buffer[done:]], offset + done)
                if got == 0:
                    raise self._changed("it is shorter than it was")
                done += got
        except OSError as error:
            raise unreadable(error, self.path) from error

    def _map(self) -> memoryview:
        try:
            return memoryview(mapping.mmap(self._fd, self.size, access=mapping.ACCESS_READ))
        except ValueError as error:
            raise self._changed("it is shorter than it was") from error

    def _changed(self, how: str) -> Mismatch:
        return Mismatch(
            "the input changed while it was read",
            path=self.path,
            why=how,
            next_step="Wait until nothing writes to it any more, then run again",
        )

    def _not_safetensors(self, why: str, head: bytes | bytearray) -> InputInvalid:
        known = recognise(bytes(head))
        why, next_step = (f"it is {known[0]}", known[1]) if known else (why, _FETCH)
        return InputInvalid("not a safetensors file", path=self.path, why=why, next_step=next_step)


class SafetensorsSink:
    """One safetensors file being written (see `formats.Sink`): the source's header, and its slots."""

    def __init__(self, fd: int, path: Path, source: SafetensorsSource) -> None:
        """Take over `fd`; where this raises, an OSError included, the caller closes it."""
        self.path = path
        self._fd = fd
        self._since_writeback = 0
        self._lock = threading.Lock()
        self._reserve(source.size)
        self._write_from(0, source.header)

    def write(self, tensor: TensorSpec, start: int, buffer: bytes | memoryview) -> None:
        """Write `buffer` from byte `start` of `tensor`, whole or not at all (an error otherwise)."""
        self._write_from(tensor.offset + start, buffer)

    def _write_from(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        view = memoryview(buffer)
        done = 0
        try:
            while done < len(view):
                wrote = os.pwrite(self._fd, view[done:], offset + done)
                if wrote == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                done += wrote
        except OSError as error:
            raise unwritable(error, self.path) from error
        self._count_towards_writeback(done)

    def finish(self) -> None:
        """Flush to the device (fsync) and close; an error here means that nothing may be published."""
        fd, self._fd = self._fd, -1
        try:
            try:
                # Once: a failed fsync forgets the lost pages, and a second one would succeed.
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise unwritable(error, self.path) from error

    def abort(self) -> None:
        """Close without a promise (twice is fine, and after `finish`)."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # What the file holds no longer matters, nor whether it got there.
            with contextlib.suppress(OSError):
                os.close(fd)

    def _reserve(self, size: int) -> None:
        try:
            system.reserve(self._fd, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise self._no_space(size) from error
            # Not every file system can reserve; then a full disk shows while writing.
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise

    def _no_space(self, size: int) -> NoisytuneError:
        status = os.fstatvfs(self._fd)
        free = status.f_bavail * status.f_frsize
        return ResourceExhausted(
            "cannot write",
            path=self.path,
            why=f"it needs {size:,} bytes and {free:,} are free; nothing was published",
            next_step="Free space or choose another place with -o, then run again",
        )

    def _count_towards_writeback(self, nbytes: int) -> None:
        """Keep the device busy while the CPU is: otherwise all the writing waits for the final fsync."""
        with self._lock:
            self._since_writeback += nbytes
            due = self._since_writeback >= _WRITEBACK_BYTES
            if due:
                self._since_writeback = 0
        if due:
            system.start_writeback(self._fd, 0, 0)


def open_source(path: Path, name: str, mmap: bool) -> SafetensorsSource:
    """Open the safetensors file at `path` and validate its header; no tensor data is read.

    `name` is the file's name relative to the checkpoint, for the TensorSpecs. Raises InputInvalid for
    whatever is not a safetensors file, InputUnreadable if it is missing or cannot be read.
    """
    fd = open_regular(path)
    try:
        return SafetensorsSource(fd, path, name, mmap)
    except OSError as error:
        os.close(fd)
        raise unreadable(error, path) from error
    except BaseException:
        os.close(fd)
        raise


def create_sink(path: Path, source: SafetensorsSource) -> SafetensorsSink:
    """Create the file at `path`, which must not exist, with the source's header and room for its tensors."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise unwritable(error, path) from error
    try:
        return SafetensorsSink(fd, path, source)
    except OSError as error:
        os.close(fd)
        raise unwritable(error, path) from error
    except BaseException:
        os.close(fd)
        raise


def _fingerprint(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return what tells a file from what it was: device, inode, size, time of modification in ns."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
