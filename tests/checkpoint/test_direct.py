"""Direct writes give the file that buffered ones give, whatever comes in which order from which thread."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noisytune_cli.checkpoint.formats import _direct, _file
from noisytune_cli.checkpoint.formats._direct import Room, room_for
from noisytune_cli.checkpoint.formats._file import WritableFile, create_output
from noisytune_cli.errors import ResourceExhausted

BLOCK = 4096

Piece = tuple[int, bytes]


def create(path: Path, size: int, room: Room) -> WritableFile:
    return create_output(path, lambda fd: WritableFile(fd, path, size, room), 0o666)


def write(path: Path, size: int, room: Room, rounds: Sequence[Sequence[Piece]], threads: int = 1) -> bytes:
    """Write each round's pieces in any number of threads, one round after the other."""
    with room:
        file = create(path, size, room)
        try:
            return _write(file, rounds, threads)
        finally:
            file.abort()


def _write(file: WritableFile, rounds: Sequence[Sequence[Piece]], threads: int) -> bytes:
    for pieces in rounds:
        failed: list[BaseException] = []

        def work(mine: Sequence[Piece], failed: list[BaseException] = failed) -> None:
            try:
                for offset, content in mine:
                    file.write_at(offset, content)
            except BaseException as error:
                failed.append(error)

        workers = [threading.Thread(target=work, args=(pieces[n::threads],)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failed:
            raise failed[0]
    file.finish()
    return file.path.read_bytes()


def cut(size: int, edges: Sequence[int]) -> list[Piece]:
    """Cut a file whose bytes are known into pieces at these offsets."""
    content = random.Random(size).randbytes(size)
    places = sorted({0, size, *(edge for edge in edges if edge < size)})
    return [(a, content[a:b]) for a, b in itertools.pairwise(places)]


@pytest.fixture
def direct_writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return where what was written directly lies, as (offset, bytes); skip where there is no such thing."""
    made: list[tuple[int, int]] = []
    opened = set[int]()
    real_open, real_write = _direct._open_directly, os.pwrite

    def open_directly(fd: int) -> int | None:
        direct = real_open(fd)
        if direct is None:
            pytest.skip("this file system has no direct writes")
        opened.add(direct)
        return direct

    def pwrite(fd: int, content: bytes, offset: int) -> int:
        done = real_write(fd, content, offset)
        if fd in opened:
            made.append((offset, done))
        return done

    monkeypatch.setattr(_direct, "_open_directly", open_directly)
    monkeypatch.setattr(_direct.os, "pwrite", pwrite)
    return made


edges = st.one_of(
    st.integers(0, 9 * BLOCK),
    st.builds(lambda block, by: max(0, block * BLOCK + by), st.integers(0, 9), st.integers(-5, 5)),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=edges,
    places=st.lists(edges, max_size=40),
    order=st.randoms(use_true_random=False),
    threads=st.sampled_from([1, 2, 4]),
    chunks=st.integers(1, 12),
    again=st.booleans(),
)
def test_any_pieces_in_any_order_give_the_same_file(
    tmp_path: Path,
    size: int,
    places: list[int],
    order: random.Random,
    threads: int,
    chunks: int,
    again: bool,
) -> None:
    pieces = cut(size, places)
    shuffled = order.sample(pieces, len(pieces))
    # What is written a second time counts, wherever the first went.
    rounds = [[(at, bytes(len(content))) for at, content in shuffled], pieces] if again else [shuffled]
    path = tmp_path / "out"
    path.unlink(missing_ok=True)
    room = Room(BLOCK, chunks * BLOCK)
    assert write(path, size, room, rounds, threads) == b"".join(content for _, content in pieces)
    assert not room.chunks


def test_whole_chunks_are_written_directly_and_once(
    tmp_path: Path, direct_writes: list[tuple[int, int]]
) -> None:
    size = 8 * BLOCK + 7
    pieces = cut(size, range(100, size, 1000))
    assert write(tmp_path / "out", size, Room(BLOCK), [pieces], 2) == b"".join(c for _, c in pieces)
    assert sorted(direct_writes) == [(block * BLOCK, BLOCK) for block in range(8)]


def test_what_is_written_directly_is_flushed_meanwhile(
    tmp_path: Path, direct_writes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, flush = threading.Event(), os.fsync

    def fsync(fd: int) -> None:
        flush(fd)
        flushed.set()

    monkeypatch.setattr(_file, "_FLUSH_BYTES", 2 * BLOCK)
    monkeypatch.setattr(os, "fsync", fsync)
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", 3 * BLOCK, room)
        file.write_at(0, bytes(2 * BLOCK))
        assert flushed.wait(20)
        file.abort()
    assert sorted(direct_writes) == [(0, BLOCK), (BLOCK, BLOCK)]


def test_what_is_not_whole_goes_through_the_page_cache(
    tmp_path: Path, direct_writes: list[tuple[int, int]]
) -> None:
    pieces = [(BLOCK, b"x" * BLOCK), (3 * BLOCK + 1, b"y" * (BLOCK - 1)), (4 * BLOCK + 5, b"z")]
    expected = bytearray(5 * BLOCK)
    for at, content in pieces:
        expected[at : at + len(content)] = content
    assert write(tmp_path / "out", 5 * BLOCK, Room(BLOCK), [pieces]) == expected
    assert direct_writes == [(BLOCK, BLOCK)]


def test_a_full_room_gives_way_to_what_comes(tmp_path: Path, direct_writes: list[tuple[int, int]]) -> None:
    # Every chunk is begun before any is whole, and there is memory for two of eight.
    size = 8 * BLOCK
    first = cut(size, range(0, size, BLOCK // 2))
    pieces = [*first[::2], *first[1::2]]
    assert write(tmp_path / "out", size, Room(BLOCK, 2 * BLOCK), [pieces]) == b"".join(c for _, c in first)
    assert len(direct_writes) < 8


def test_written_bytes_can_be_read_before_the_end(tmp_path: Path) -> None:
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", 3 * BLOCK, room)
        file.write_at(10, b"a" * BLOCK)
        assert file.read_at(10, BLOCK) == b"a" * BLOCK
        file.write_at(10, b"b" * 5)
        file.write_at(0, b"c" * 10)
        file.finish()
    content = (tmp_path / "out").read_bytes()
    assert content == (b"c" * 10 + b"b" * 5 + b"a" * (BLOCK - 5)).ljust(3 * BLOCK, b"\0")


def refuse_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, flags: int) -> int:
        raise OSError(errno.EINVAL, path)

    monkeypatch.setattr(_direct.os, "open", refused)


def refuse_write(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def pwrite(fd: int, content: bytes, offset: int) -> int:
        if len(content) == BLOCK and offset % BLOCK == 0 and is_direct(fd):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, content, offset)

    monkeypatch.setattr(_direct.os, "pwrite", pwrite)


def have_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_direct.os, "O_DIRECT")


def broken(file: _direct.DirectFile, offset: int, memory: memoryview) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("refuse", [refuse_open, refuse_write, have_no_flag])
@pytest.mark.parametrize("threads", [1, 4])
def test_where_it_is_refused_nobody_notices(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[pytest.MonkeyPatch], None],
    threads: int,
) -> None:
    size = 20 * BLOCK + 3
    pieces = cut(size, range(7, size, 1500))
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", size, room)
        refuse(monkeypatch)
        # Of the first chunks a part has come when the first one is refused; what is written again counts.
        for at, _ in pieces[1:9]:
            file.write_at(at, b"before")
        for at, content in [*pieces, *pieces[3:5]]:
            file.write_at(at, content)
        file.finish()
    assert (tmp_path / "out").read_bytes() == b"".join(content for _, content in pieces)
    if refuse is not refuse_open:
        assert (
            write(tmp_path / "in threads", size, Room(BLOCK), [pieces], threads)
            == (tmp_path / "out").read_bytes()
        )


@pytest.mark.parametrize("most", [1, 512, BLOCK - 1])
def test_short_direct_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.pwrite

    def short(fd: int, content: bytes, offset: int) -> int:
        if not is_direct(fd):
            return real(fd, content, offset)
        # A device may have taken any number of bytes, of which no direct write could be made.
        plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
        done = real(plain, memoryview(content)[:most], offset)
        os.close(plain)
        return done

    monkeypatch.setattr(_direct.os, "pwrite", short)
    pieces = cut(6 * BLOCK, [100, 5000, 9000])
    assert write(tmp_path / "out", 6 * BLOCK, Room(BLOCK), [pieces]) == b"".join(c for _, c in pieces)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("threads", [1, 4])
def test_failed_direct_writes_are_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_files: Callable[[], int],
    code: int,
    threads: int,
) -> None:
    real = os.pwrite

    def pwrite(fd: int, content: bytes, offset: int) -> int:
        if is_direct(fd):
            raise OSError(code, os.strerror(code))
        return real(fd, content, offset)

    monkeypatch.setattr(_direct.os, "pwrite", pwrite)
    pieces = cut(6 * BLOCK, [100, 5000, 9000])
    before = open_files()
    with pytest.raises(ResourceExhausted, match="nothing was published"):
        write(tmp_path / "out", 6 * BLOCK, Room(BLOCK), [pieces], threads)
    assert open_files() == before


def test_an_abandoned_file_leaves_its_memory_to_others(tmp_path: Path) -> None:
    with Room(BLOCK, 2 * BLOCK) as room:
        file = create(tmp_path / "out", 4 * BLOCK, room)
        file.write_at(0, b"a")
        file.write_at(BLOCK, b"a")
        file.abort()
        file.abort()
    assert not room.chunks
    assert room.take() is not None
    assert room.take() is not None
    assert room.take() is None


def test_a_descriptor_is_held_while_there_is_something_to_write(
    tmp_path: Path, open_files: Callable[[], int]
) -> None:
    with Room(BLOCK) as room:
        before = open_files()
        files = [create(tmp_path / str(n), 2 * BLOCK, room) for n in range(5)]
        for file in files:
            file.write_at(0, bytes(BLOCK))
            file.write_at(BLOCK, bytes(BLOCK))
            file.read_at(0, 1)
        assert open_files() == before + 5
        for file in files:
            file.finish()
        assert open_files() == before


def test_what_fails_behind_is_said_by_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_direct.DirectFile, "_write_directly", broken)
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", 4 * BLOCK, room)
        file.write_at(0, bytes(BLOCK))
        with room.change:
            assert room.change.wait_for(lambda: not room.leaving, timeout=60)
        with pytest.raises(ResourceExhausted, match="nothing was published"):
            file.write_at(BLOCK, b"a")
        with pytest.raises(ResourceExhausted, match="nothing was published"):
            file.finish()
        file.abort()


def test_where_no_thread_can_be_started_who_brings_the_last_byte_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_writes: list[tuple[int, int]]
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_direct.threading.Thread, "start", start)
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", 2 * BLOCK, room)
        file.write_at(0, b"a" * 2 * BLOCK)
        file.finish()
    assert (tmp_path / "out").read_bytes() == b"a" * 2 * BLOCK
    assert direct_writes == [(0, BLOCK), (BLOCK, BLOCK)]


def test_a_file_given_up_does_not_wait_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both threads are busy with the first chunks; the others are not written any more.
    may_go, written = threading.Event(), []

    def slow(file: _direct.DirectFile, offset: int, memory: memoryview) -> int:
        written.append(offset)
        assert may_go.wait(60)
        return len(memory)

    monkeypatch.setattr(_direct.DirectFile, "_write_directly", slow)
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", 9 * BLOCK, room)
        file.write_at(0, bytes(8 * BLOCK))
        threading.Timer(0.1, may_go.set).start()
        file.abort()
        assert not room.leaving
    assert len(written) <= 2


@pytest.mark.parametrize(
    ("direct", "nbytes", "files", "threads", "chunk"),
    [
        (None, (4 << 30) - 1, 1, 2, None),
        (None, 4 << 30, 1, 2, 2 << 20),
        (None, 1 << 40, 1, 2, 2 << 20),
        (None, 1 << 40, 1, 8, 1 << 19),
        (None, 1 << 40, 8, 2, None),
        (None, 1 << 40, 1000, 8, None),
        (False, 1 << 40, 1, 2, None),
        (True, 0, 1, 1, 2 << 20),
        (True, 1, 8, 2, 1 << 18),
        (True, 1, 1000, 256, 1 << 18),
    ],
)
def test_what_would_fill_the_memory_is_written_directly(
    monkeypatch: pytest.MonkeyPatch,
    direct: bool | None,
    nbytes: int,
    files: int,
    threads: int,
    chunk: int | None,
) -> None:
    monkeypatch.setattr(_direct, "free_memory", lambda: 8 << 30)
    room = room_for(direct, nbytes, files, threads)
    assert (None if room is None else room.chunk_bytes) == chunk


@pytest.mark.parametrize("free", [None, 0, 100 << 20])
def test_what_is_small_or_unknown_is_not(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(_direct, "free_memory", lambda: free)
    assert room_for(None, (64 << 20) - 1, 1, 2) is None
    assert (room_for(None, 1 << 40, 1, 2) is None) == (free is None)


def test_what_is_made_in_its_place_is_not_copied(
    tmp_path: Path, direct_writes: list[tuple[int, int]]
) -> None:
    content = random.Random(0).randbytes(2 * BLOCK)
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", 2 * BLOCK, room)
        for start in (0, BLOCK // 2, BLOCK, 3 * BLOCK // 2):
            space = file.space_at(start, BLOCK // 2)
            assert space is not None
            assert file.space_at(start + 1, 8) is None, "it is being made"
            space[:] = content[start : start + BLOCK // 2]
            assert len(direct_writes) <= start // BLOCK, "it is not whole before it is written"
            file.write_at(start, space)
        file.finish()
    assert (tmp_path / "out").read_bytes() == content
    assert sorted(direct_writes) == [(0, BLOCK), (BLOCK, BLOCK)]


def test_nothing_leaves_while_a_thread_makes_a_part_of_it(
    tmp_path: Path, direct_writes: list[tuple[int, int]]
) -> None:
    # Ties have one place, so what another thread brings may be all of it.
    content = random.Random(0).randbytes(BLOCK)
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", BLOCK, room)
        space = file.space_at(7, 100)
        assert space is not None
        file.write_at(0, content)
        assert not room.leaving
        assert not direct_writes
        space[:] = content[7:107]
        file.write_at(7, space)
        file.finish()
    assert (tmp_path / "out").read_bytes() == content
    assert direct_writes == [(0, BLOCK)]


def test_there_is_no_space_for_what_is_there_lies_in_two_chunks_or_in_none(tmp_path: Path) -> None:
    with Room(BLOCK) as room:
        file = create(tmp_path / "out", 3 * BLOCK + 5, room)
        file.write_at(10, b"ab")
        assert file.space_at(8, 3) is None
        assert file.space_at(BLOCK - 1, 2) is None
        assert file.space_at(3 * BLOCK, 5) is None
        assert file.space_at(12, 3) is not None
        file.abort()
    with Room(BLOCK, 0) as room:
        file = create(tmp_path / "no memory", 3 * BLOCK, room)
        assert file.space_at(0, 8) is None
        file.abort()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("_write_directly", OSError(errno.EIO, "Input/output error")),
        ("_write_directly", MemoryError()),
        # A network's file system may tell only then.
        ("_close_direct", OSError(errno.EIO, "Input/output error")),
    ],
)
def test_what_fails_in_a_thread_of_its_own_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    def fails(*_: object) -> int:
        raise error

    with monkeypatch.context() as patched, Room(BLOCK) as room:
        file = create(tmp_path / "out", BLOCK, room)
        patched.setattr(_direct.DirectFile, call, fails)
        file.write_at(0, bytes(BLOCK))
        with pytest.raises((ResourceExhausted, MemoryError)):
            file.finish()
    file.abort()
