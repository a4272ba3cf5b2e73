"""A weight file as the operating system sees it: positioned reads of one, positioned writes of its twin.

Formats say where bytes lie; this says how they get there. Reads are plain positioned reads unless mapping is
asked for: a file that is truncated under a mapping kills the process, a read only comes back short. Writes
reserve the whole size first, are flushed on the way, and count only once all of the file is.
"""

from __future__ import annotations

import contextlib
import errno
import mmap as mapping
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial, reduce
from operator import and_
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from noisytune_cli.checkpoint.background import begin
from noisytune_cli.checkpoint.formats import _system as system
from noisytune_cli.checkpoint.formats._direct import DirectFile, Room
from noisytune_cli.errors import Mismatch, NoisytuneError, ResourceExhausted, unreadable, unwritable
from noisytune_cli.reading import Reach, changed, fingerprint, open_regular
from noisytune_cli.records import Declared

if TYPE_CHECKING:
    from concurrent.futures import Future

_FLUSH_BYTES = 64 << 20

_Opened = TypeVar("_Opened")


class InputFile:
    """One open weight file: what every `formats.Source` has in common. Threads may read at once."""

    def __init__(self, fd: int, path: Path, name: str) -> None:
        """Take over `fd`; where this raises, an OSError included, the caller closes it."""
        self.path = path
        self.name = name
        self._fd = fd
        status = os.fstat(fd)
        self._at_open = fingerprint(status)
        self.mode = status.st_mode
        self.identity = self._at_open[:2]
        self.size = self._at_open[2]
        self._mapped: memoryview | None = None
        #: What the file holds beside the model's tensors, by name.
        self.beside: tuple[str, ...] = ()
        #: What it says of its tensors.
        self.declared = Declared()
        #: What is to be said of it.
        self.warnings: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that it is made of: this one."""
        return (self.name,)

    def map(self) -> None:
        """Let later reads be views of a mapping of the whole file."""
        try:
            self._mapped = memoryview(mapping.mmap(self._fd, self.size, access=mapping.ACCESS_READ))
        except ValueError as error:
            raise self._changed("it is shorter than it was") from error

    def read_at(self, offset: int, buffer: memoryview) -> memoryview:
        """Return the `len(buffer)` bytes at `offset`: in `buffer`, or as a read-only view of the mapping.

        Raises Mismatch if the file ends before, InputUnreadable if the read fails.
        """
        if self._mapped is None:
            self.read_into(offset, buffer)
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

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` by plain reads, whatever is mapped; raises as `read_at` does."""
        done = 0
        try:
            while done < len(buffer):
                got = os.preadv(self._fd, [buffer[done:]], offset + done)
                if got == 0:
                    raise self._changed("it is shorter than it was")
                done += got
        except OSError as error:
            raise unreadable(error, self.path) from error

    def check_unchanged(self) -> None:
        """Raise Mismatch if size, mtime, ctime or inode differ from what they were at open."""
        try:
            by_name = fingerprint(os.stat(self.path))
            by_descriptor = fingerprint(os.fstat(self._fd))
        except FileNotFoundError as error:
            raise self._changed("it was removed") from error
        except OSError as error:
            raise unreadable(error, self.path) from error
        if by_name[:2] != self.identity:
            raise self._changed("another file took its place")
        if by_descriptor != self._at_open or by_name != self._at_open:
            raise self._changed("its size or its time of modification or change is another")

    def close(self) -> None:
        """Release the descriptor (twice is fine); a mapping lives as long as the views into it."""
        self._mapped = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # It was only read, and what was read is checked by other means.
            with contextlib.suppress(OSError):
                os.close(fd)

    def _changed(self, how: str) -> Mismatch:
        return changed(self.path, how)


class WritableFile:
    """One weight file being written: what every `formats.Sink` has in common."""

    def __init__(self, fd: int, path: Path, size: int, room: Room | None = None) -> None:
        """Take over `fd` and reserve `size` bytes; where this raises, the caller closes it.

        With a `room` it is written directly, as far as the file system can.
        """
        self.path = path
        self._fd = fd
        self._since_flush = 0
        self._lock = threading.Lock()
        #: The last flush that was begun before all is written.
        self._flushed: Future[None] | None = None
        self._reserve(size)
        self._direct: DirectFile | None = None
        if room is not None:
            self._direct = DirectFile(fd, size, room, self._write_buffered, self._wrote)

    def space_at(self, offset: int, nbytes: int) -> memoryview | None:
        """Return memory to make in what is written next at `offset`, which is then not copied; None for none.

        After `write_at` it is no longer the caller's.
        """
        try:
            return None if self._direct is None else self._direct.space_at(offset, nbytes)
        except OSError as error:
            raise unwritable(error, self.path) from error

    def write_at(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        """Write `buffer` at byte `offset` of the file, whole or not at all (an error otherwise)."""
        write = self._write_buffered if self._direct is None else self._direct.write_at
        try:
            write(offset, memoryview(buffer))
        except OSError as error:
            raise unwritable(error, self.path) from error

    def _write_buffered(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            wrote = os.pwrite(self._fd, view[done:], offset + done)
            if wrote == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += wrote
        self._wrote(done)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return `length` bytes that were written at `offset`; no thread may be writing."""
        try:
            if self._direct is not None:
                self._direct.flush()
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise unwritable(error, self.path) from error

    def finish(self) -> None:
        """Flush to the device (fsync) and close; an error here means that nothing may be published."""
        try:
            if self._direct is not None:
                self._direct.flush()
                self._close_direct()
            if self._flushed is not None:
                self._flushed.result()
            fd, self._fd = self._fd, -1
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
        # What the file holds no longer matters, nor whether it got there.
        with contextlib.suppress(OSError):
            self._close_direct()
        if fd >= 0 and self._flushed is not None:
            self._flushed.add_done_callback(lambda _: _close(fd))
        elif fd >= 0:
            _close(fd)

    def _close_direct(self) -> None:
        direct, self._direct = self._direct, None
        if direct is not None:
            direct.close()

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

    def _wrote(self, nbytes: int) -> None:
        """Flush beside the writing, once at a time: else a device begins to write for good at the end."""
        with self._lock:
            self._since_flush += nbytes
            if self._since_flush < _FLUSH_BYTES or (self._flushed is not None and not self._flushed.done()):
                return
            self._since_flush = 0
            if self._flushed is not None:
                self._flushed.result()  # the pages of one that failed are lost, whatever comes after
                self._flushed = None
            with contextlib.suppress(ResourceExhausted):  # of threads: the last flush does it all
                self._flushed = begin(partial(os.fsync, self._fd))


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def common_mode(modes: Iterable[int]) -> int:
    """Return a mode that allows what all of these allow."""
    return reduce(and_, modes, 0o666)


def output_mode(mode: int) -> int:
    """Return the mode for a file that is made from one of `mode`: for nobody who may not read that."""
    return 0o600 | (mode & 0o066)


def open_input(path: Path, open_as: Callable[[int], _Opened], reach: Reach | None = None) -> _Opened:
    """Open the regular file at `path` and return what `open_as` makes of the descriptor.

    Raises InputInvalid if it is no regular file or out of `reach`, InputUnreadable if it is missing
    or cannot be read.
    """
    fd = open_regular(path, reach)
    try:
        return open_as(fd)
    except OSError as error:
        os.close(fd)
        raise unreadable(error, path) from error
    except BaseException:
        os.close(fd)
        raise


def create_output(path: Path, open_as: Callable[[int], _Opened], mode: int) -> _Opened:
    """Create the file at `path`, which must not exist, and return what `open_as` makes of the descriptor.

    Nobody may read it who may not read a file of `mode`.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, output_mode(mode))
    except OSError as error:
        raise unwritable(error, path) from error
    try:
        return open_as(fd)
    except OSError as error:
        os.close(fd)
        raise unwritable(error, path) from error
    except BaseException:
        os.close(fd)
        raise
