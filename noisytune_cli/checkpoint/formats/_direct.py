"""Writing past the page cache: bytes that come in any order, gathered into chunks that go out whole.

Direct writes take aligned blocks from aligned memory alone, and tensors begin anywhere. So a file is a row of
chunks. What comes for a chunk is gathered in memory, and once all of it is there a thread of its own writes
it. A chunk that never gets whole (the file's end, what there is no memory for) goes through the page cache,
and so does whatever comes for one that was written already. No chunk is ever written both ways at once: page
cache and device would not agree on it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from noisytune_cli.checkpoint.formats._system import free_memory

#: Bytes of a chunk. Below the least, a write costs more than what it spares.
_MOST, _LEAST = 2 << 20, 1 << 18

#: Bytes of a huge page. Memory that is not made of these reaches the device in small requests.
_HUGE = 2 << 20

#: Bytes from which it is worth while, of all that is written and of a chunk, unless the user says.
_WORTH, _LEAST_UNASKED = 64 << 20, 1 << 19

#: Bytes of the chunks of a run that are in memory at a time.
_ROOM = 16 << 20

#: Threads that do nothing but write: with two, one's bytes are on their way when the other's have arrived.
_WRITERS = 2

#: Where direct writes are not to be had: from the file system, or from what lies below it.
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}

#: Writes bytes through the page cache, at an offset.
Buffered = Callable[[int, memoryview], None]


class _Chunk:
    """The bytes of a chunk that have come so far."""

    def __init__(self, file: DirectFile, index: int, memory: memoryview) -> None:
        self.file, self.index, self.memory = file, index, memory
        self.address = _address(memory)
        #: Which bytes are there, as (start, end) in order; and how many threads are copying some.
        self.runs: list[tuple[int, int]] = []
        self.users = 0
        #: Where a thread makes what it will bring.
        self.lent: set[tuple[int, int]] = set()

    def lend(self, start: int, end: int) -> bool:
        """Note that a thread makes bytes here, unless another does or has: ties have one place."""
        is_free = all(end <= first or last <= start for first, last in (*self.runs, *self.lent))
        if is_free:
            self.lent.add((start, end))
        return is_free

    def cover(self, start: int, end: int) -> None:
        """Note that bytes are there."""
        apart = [run for run in self.runs if run[1] < start or run[0] > end]
        for first, last in self.runs:
            if last >= start and first <= end:
                start, end = min(start, first), max(end, last)
        self.runs = sorted([*apart, (start, end)])

    @property
    def is_whole(self) -> bool:
        """Whether every byte is there, and no thread is changing one."""
        return self.users == 0 and self.runs == [(0, len(self.memory))]


class Room:
    """The memory for the chunks of all files of a run, and the threads that write what is whole.

    Whoever computes then never waits for the device, but where there is no memory left: `with room`, all is
    written or given up.
    """

    def __init__(self, chunk_bytes: int = _MOST, nbytes: int = _ROOM) -> None:
        """Take the size of a chunk, a power of two, and that of all."""
        self.chunk_bytes = chunk_bytes
        #: Tells that chunks have arrived; and those that write, that there are more of them.
        lock = threading.Lock()
        self.change = threading.Condition(lock)
        self._more = threading.Condition(lock)
        #: Chunks that are filled, by file and index; and how many are on their way to the device.
        self.chunks: dict[tuple[DirectFile, int], _Chunk] = {}
        self.leaving = 0
        self._queue: deque[_Chunk] = deque()
        self._free = _aligned(chunk_bytes, nbytes // chunk_bytes)
        self._writers: list[threading.Thread] = []
        self._is_over = False

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        with self.change:
            self._is_over = True
            self._more.notify_all()
        for writer in self._writers:
            writer.join()

    def take(self) -> memoryview | None:
        """Return memory for a chunk, None if there is none left."""
        return self._free.pop() if self._free else None

    def give_back(self, memory: memoryview) -> None:
        """Let others have it."""
        self._free.append(memory)

    def send(self, chunk: _Chunk) -> bool:
        """Have a chunk written by a thread here; False where the system has none to give."""
        if len(self._writers) < _WRITERS:
            writer = threading.Thread(target=self._write, name=f"write-{len(self._writers)}", daemon=True)
            with suppress(RuntimeError):
                writer.start()
                self._writers.append(writer)
        if self._writers:
            self._queue.append(chunk)
            self._more.notify()
        return bool(self._writers)

    def give_up(self, file: DirectFile) -> list[_Chunk]:
        """Take back the chunks of a file that no thread is writing yet."""
        found = [chunk for chunk in self._queue if chunk.file is file]
        self._queue = deque(chunk for chunk in self._queue if chunk.file is not file)
        return found

    def _write(self) -> None:
        while True:
            with self.change:
                self._more.wait_for(lambda: self._queue or self._is_over)
                if not self._queue:
                    return
                chunk = self._queue.popleft()
            chunk.file.write_chunk(chunk)


class DirectFile:
    """One file being written, whole chunks of it directly; for any number of threads."""

    def __init__(
        self, fd: int, size: int, room: Room, buffered: Buffered, wrote: Callable[[int], None]
    ) -> None:
        """Take a descriptor of a file of `size` bytes, and what writes to it through the page cache.

        `wrote` is told how many bytes went past it.
        """
        self._fd = fd
        self._room = room
        self._buffered, self._wrote = buffered, wrote
        #: For each whole chunk of the file, whether what comes for it goes through the page cache, and how
        #: many there are of which that is not so.
        self._closed = bytearray(size // room.chunk_bytes)
        self._left = len(self._closed)
        self._leaving: set[int] = set()
        self._error: BaseException | None = None
        #: For direct writes; open from the first to the last of them, since files may be many.
        self._direct: int | None = None

    def space_at(self, offset: int, nbytes: int) -> memoryview | None:
        """Return memory to make in what `write_at` gets next for this place; None where there is none."""
        index, at = divmod(offset, self._room.chunk_bytes)
        if at + nbytes > self._room.chunk_bytes or (chunk := self._claim(index)) is None:
            return None
        with self._room.change:
            if chunk.lend(at, at + nbytes):
                return chunk.memory[at : at + nbytes]
            chunk.users -= 1
        return None

    def write_at(self, offset: int, view: memoryview) -> None:
        """Take what is to lie at `offset`; OSError where it, or what came before, cannot be written."""
        size = self._room.chunk_bytes
        while view:
            index, at = divmod(offset, size)
            piece = view[: size - at]
            if (chunk := self._claim(index)) is None:
                self._buffered(offset, piece)
            else:
                self._put(chunk, at, piece)
            offset, view = offset + len(piece), view[len(piece) :]

    def flush(self) -> None:
        """Have all written that has come, and raise the OSError of what could not be.

        No thread may be writing.
        """
        with self._room.change:
            self._room.change.wait_for(lambda: not self._leaving)
            parts = [chunk for chunk in self._room.chunks.values() if chunk.file is self]
            for chunk in parts:
                self._leave(chunk)
        for chunk in parts:
            self.write_chunk(chunk)
        self._check()

    def close(self) -> None:
        """Release what it has opened, and the memory; what is not written yet will not be.

        No thread may be writing.
        """
        room = self._room
        with room.change:
            for chunk in room.give_up(self):
                self._arrive(chunk)
            room.change.wait_for(lambda: not self._leaving)
            for chunk in [chunk for chunk in room.chunks.values() if chunk.file is self]:
                del room.chunks[self, chunk.index]
                room.give_back(chunk.memory)
            self._close_direct()

    def write_chunk(self, chunk: _Chunk) -> None:
        """Write a chunk to which nothing more can be added; an error is kept for whoever asks next."""
        start = chunk.index * len(chunk.memory)
        try:
            done = self._write_directly(start, chunk.memory) if chunk.is_whole else 0
            self._wrote(done)
            for first, last in chunk.runs:
                if left := chunk.memory[max(first, done) : last]:
                    self._buffered(start + max(first, done), left)
        except BaseException as error:
            self._error = self._error or error
        with self._room.change:
            self._arrive(chunk)
            try:
                if not (self._left or self._leaving):
                    self._close_direct()
            except OSError as error:
                self._error = self._error or error

    def _claim(self, index: int) -> _Chunk | None:
        """Return the chunk of an index, to be given back by `_put`; None where bytes go through the cache."""
        room = self._room
        while True:
            self._check()
            with room.change:
                room.change.wait_for(lambda: index not in self._leaving)
                chunk = room.chunks.get((self, index))
                if chunk is None and (index >= len(self._closed) or self._closed[index]):
                    return None
                if chunk is None and (memory := room.take()) is not None:
                    chunk = room.chunks[self, index] = _Chunk(self, index, memory)
                if chunk is not None:
                    chunk.users += 1
                    return chunk
                if room.leaving:
                    room.change.wait()
                    continue
                oldest = next((chunk for chunk in room.chunks.values() if not chunk.users), None)
                if oldest is None:
                    self._close(index)
                    return None
                oldest.file._leave(oldest)
            oldest.file.write_chunk(oldest)

    def _put(self, chunk: _Chunk, at: int, piece: memoryview) -> None:
        is_sent = True
        # What was made where `space_at` said, holds the chunk a second time.
        is_there = _address(piece) == chunk.address + at
        try:
            if not is_there:
                # NumPy lets other threads run meanwhile.
                np.asarray(chunk.memory)[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        finally:
            with self._room.change:
                chunk.users -= 1 + is_there
                if is_there:
                    chunk.lent.remove((at, at + len(piece)))
                chunk.cover(at, at + len(piece))
                if chunk.is_whole:
                    self._leave(chunk)
                    is_sent = self._room.send(chunk)
        if not is_sent:
            self.write_chunk(chunk)

    def _check(self) -> None:
        if isinstance(self._error, OSError):
            raise OSError(self._error.errno, self._error.strerror)
        if self._error is not None:
            raise self._error

    def _leave(self, chunk: _Chunk) -> None:
        """Let nothing more be added to a chunk: it is about to be written."""
        del self._room.chunks[self, chunk.index]
        self._close(chunk.index)
        self._leaving.add(chunk.index)
        self._room.leaving += 1

    def _arrive(self, chunk: _Chunk) -> None:
        self._leaving.remove(chunk.index)
        self._room.leaving -= 1
        self._room.give_back(chunk.memory)
        self._room.change.notify_all()

    def _close(self, index: int) -> None:
        self._left -= not self._closed[index]
        self._closed[index] = True

    def _write_directly(self, offset: int, memory: memoryview) -> int:
        """Write as much as can be, and return how much that is; what is refused once is not tried again."""
        with self._room.change:
            if self._direct is None:
                self._direct = _open_directly(self._fd)
            direct = self._direct
        if direct is not None:
            try:
                return os.pwrite(direct, memory, offset)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
        with self._room.change:
            for index in range(len(self._closed)):
                self._close(index)
        return 0

    def _close_direct(self) -> None:
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)


def room_for(direct: bool | None, nbytes: int, files: int, threads: int) -> Room | None:
    """Return where to gather what is written directly, None where it shall go through the page cache.

    `nbytes` are those of all that is written, `files` how many files are written at a time, by `threads`.
    What is asked for holds; else it is what would fill half of the memory that is free, unless so many files
    leave each too little room.
    """
    # A thread is in two chunks of a file at a time, and leaves one where its tensor begins.
    share = _ROOM // (files * (2 * threads + 2))
    if direct is None:
        free = free_memory()
        direct = free is not None and nbytes >= max(free // 2, _WORTH) and share >= _LEAST_UNASKED
    if not direct:
        return None
    return Room(max(_LEAST, min(_MOST, 1 << max(share, 1).bit_length() - 1)))


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _aligned(nbytes: int, count: int) -> list[memoryview]:
    """Return memory in `count` pieces, of huge pages as far as there are any; nothing is touched yet."""
    whole = mmap.mmap(-1, count * nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    with suppress(AttributeError, OSError):
        whole.madvise(mmap.MADV_HUGEPAGE)
    first = -_address(memoryview(whole)) % _HUGE
    return [memoryview(whole)[at : at + nbytes] for at in range(first, first + count * nbytes, nbytes)][::-1]


def _open_directly(fd: int) -> int | None:
    """Return a descriptor for direct writes to the file that `fd` is open on; None where there is none."""
    with suppress(AttributeError, OSError):
        # By no path: what stands there by now may be another file.
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    return None
