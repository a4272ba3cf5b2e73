"""safetensors files: reading, noticing changes, and writing a twin."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from malformed import DATA, HEADER, frame

from noisytune_cli.checkpoint.formats import Sink
from noisytune_cli.checkpoint.formats import _file as file_module
from noisytune_cli.checkpoint.formats import _system as system
from noisytune_cli.checkpoint.formats.safetensors import SafetensorsSource, open_source
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, NoisytuneError, ResourceExhausted


def opened(path: Path, content: bytes, mmap: bool = False) -> SafetensorsSource:
    path.write_bytes(content)
    return open_source(path, "model.safetensors", mmap)


@pytest.fixture
def source(tmp_path: Path) -> SafetensorsSource:
    return opened(tmp_path / "in.safetensors", frame(HEADER.ljust(64), bytes(range(16))))


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_reads_any_range(tmp_path: Path, mmap: bool) -> None:
    content = frame(HEADER, bytes(range(16)))
    source = opened(tmp_path / "f", content, mmap)
    buffer = memoryview(bytearray(5))
    got = source.read(source.tensors[0], 9, buffer)
    assert bytes(got) == content[-7:-2]
    assert (got is buffer) is not mmap
    assert got.readonly is mmap
    source.close()
    source.close()
    assert bytes(got) == content[-7:-2]


def test_short_reads_are_continued(source: SafetensorsSource, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(
        file_module.os, "preadv", lambda fd, views, offset: real(fd, [v[:3] for v in views], offset)
    )
    (tensor,) = source.tensors
    assert bytes(source.read(tensor, 0, memoryview(bytearray(16)))) == bytes(range(16))


def test_a_failed_read_is_unreadable(source: SafetensorsSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_module.os, "preadv", broken)
    with pytest.raises(InputUnreadable, match="Input/output error"):
        source.read(source.tensors[0], 0, memoryview(bytearray(1)))


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_truncation_while_reading_is_a_mismatch(tmp_path: Path, mmap: bool) -> None:
    source = opened(tmp_path / "f", frame(HEADER, DATA), mmap)
    os.truncate(source.path, source.size - 1)
    with pytest.raises(Mismatch, match="shorter than it was"):
        source.read(source.tensors[0], 0, memoryview(bytearray(16)))
    source.close()


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(0, 1))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_overwrite, "time of modification"),
        (_replace, "another file"),
        (Path.unlink, "removed"),
        (lambda path: os.truncate(path, 9), "size"),
    ],
)
def test_changes_are_noticed(source: SafetensorsSource, change: Callable[[Path], None], words: str) -> None:
    source.check_unchanged()
    change(source.path)
    with pytest.raises(Mismatch, match=words):
        source.check_unchanged()


def test_a_time_of_modification_that_was_set_back_hides_nothing(source: SafetensorsSource) -> None:
    before = source.path.stat()
    _overwrite(source.path)
    os.utime(source.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Mismatch, match="time of modification"):
        source.check_unchanged()


def test_identity_and_digest(source: SafetensorsSource) -> None:
    status = source.path.stat()
    assert source.identity == (status.st_dev, status.st_ino)
    assert os.fstat(source._fd).st_ino == status.st_ino
    assert source.header_digest == f"blake3:{blake3(source.path.read_bytes()[:-16]).hexdigest()}"


@pytest.mark.timeout(10)
def test_a_sparse_terabyte_opens_at_once(tmp_path: Path) -> None:
    size = 1 << 40
    header = f'{{"a":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'
    path = tmp_path / "f"
    path.write_bytes(frame(header, b""))
    os.truncate(path, 8 + len(header) + size)
    source = open_source(path, "f", False)
    assert source.tensors[0].nbytes == size
    source.close()


def test_refusals_close_the_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(InputInvalid):
        opened(tmp_path / "f", b"")
    assert len(os.listdir("/dev/fd")) == before


def test_the_header_is_the_sources_byte_for_byte(source: SafetensorsSource, tmp_path: Path) -> None:
    sink = source.create_sink(tmp_path / "out")
    (tensor,) = source.tensors
    sink.write(tensor, 8, memoryview(bytes(range(8, 16))))
    sink.write(tensor, 0, bytes(range(8)))
    sink.finish()
    assert (tmp_path / "out").read_bytes() == source.path.read_bytes()


@pytest.mark.parametrize("mask", [0o077, 0o022, 0])
def test_the_mode_follows_the_umask(source: SafetensorsSource, tmp_path: Path, mask: int) -> None:
    source.mode = 0o666
    before = os.umask(mask)
    try:
        source.create_sink(tmp_path / "out").finish()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~mask


def test_the_whole_size_is_there_from_the_start(source: SafetensorsSource, tmp_path: Path) -> None:
    sink = source.create_sink(tmp_path / "out")
    assert (tmp_path / "out").stat().st_size == source.size
    sink.abort()
    sink.abort()


def test_an_existing_file_is_never_opened(source: SafetensorsSource, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "out").symlink_to("target")
    with pytest.raises(ResourceExhausted, match="File exists"):
        source.create_sink(tmp_path / "out")
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_short_writes_are_continued(
    source: SafetensorsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(file_module.os, "pwrite", lambda fd, view, offset: real(fd, view[:3], offset))
    sink = source.create_sink(tmp_path / "out")
    sink.write(source.tensors[0], 0, bytes(range(16)))
    sink.finish()
    assert (tmp_path / "out").read_bytes() == source.path.read_bytes()


@pytest.mark.parametrize("returned", [0, OSError(errno.ENOSPC, "No space left on device")])
def test_failed_writes_are_reported(
    source: SafetensorsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: int | OSError
) -> None:
    def broken(*_: object) -> int:
        if isinstance(returned, OSError):
            raise returned
        return returned

    sink = source.create_sink(tmp_path / "out")
    monkeypatch.setattr(file_module.os, "pwrite", broken)
    with pytest.raises(ResourceExhausted, match="nothing was published"):
        sink.write(source.tensors[0], 0, bytes(16))
    sink.abort()


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_a_failed_flush_is_reported_and_not_retried(
    source: SafetensorsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    calls: list[int] = []
    real_close = os.close

    def broken(fd: int) -> None:
        calls.append(fd)
        if call == "close":
            real_close(fd)
        raise OSError(errno.EIO, "Input/output error")

    sink = source.create_sink(tmp_path / "out")
    monkeypatch.setattr(file_module.os, call, broken)
    with pytest.raises(ResourceExhausted, match="Input/output error"):
        sink.finish()
    monkeypatch.undo()
    sink.abort()
    assert len(calls) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(calls[0])


def test_a_full_disk_is_found_before_anything_is_written(
    source: SafetensorsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(system, "reserve", full)
    with pytest.raises(ResourceExhausted, match=rf"needs {source.size:,} bytes and [\d,]+ are free"):
        source.create_sink(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_still_gets_the_file(
    source: SafetensorsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unable(fd: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(system, "reserve", unable)
    sink = source.create_sink(tmp_path / "out")
    sink.write(source.tensors[0], 0, bytes(range(16)))
    sink.finish()
    assert (tmp_path / "out").read_bytes() == source.path.read_bytes()


def test_a_file_size_limit_is_a_lack_of_a_resource(source: SafetensorsSource, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (source.size - 1, hard))
    try:
        with pytest.raises(ResourceExhausted, match="File too large"):
            source.create_sink(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Flushes:
    """What stands in for fsync: who called it, in which order it ends, and whether it fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by: list[str] = []
        self.open: list[bool] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.fails = False
        monkeypatch.setattr(file_module, "_FLUSH_BYTES", 16)
        monkeypatch.setattr(file_module.os, "fsync", self._flush)

    def _flush(self, fd: int) -> None:
        self.by.append("main" if threading.current_thread() is threading.main_thread() else "other")
        assert self.goes_on.wait(60)
        self.open.append(os.path.exists(f"/proc/self/fd/{fd}"))
        if self.fails:
            self.fails = False  # as a second fsync succeeds, whose pages were lost before
            raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def sink(source: SafetensorsSource, tmp_path: Path) -> Sink:
    """A file whose header is written, and nothing else."""
    return source.create_sink(tmp_path / "out")


@pytest.fixture
def flushes(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> Flushes:
    return Flushes(monkeypatch)


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_a_file_is_flushed_while_it_is_written(
    source: SafetensorsSource, sink: Sink, tmp_path: Path, flushes: Flushes
) -> None:
    (tensor,) = source.tensors
    flushes.goes_on.clear()
    sink.write(tensor, 0, bytes(16))
    until(lambda: flushes.by == ["other"])
    sink.write(tensor, 0, bytes(range(16)))  # one at a time
    assert flushes.by == ["other"]
    flushes.goes_on.set()
    sink.finish()
    assert flushes.by == ["other", "main"]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def test_a_flush_that_failed_meanwhile_fails_the_file(
    source: SafetensorsSource, sink: Sink, flushes: Flushes
) -> None:
    (tensor,) = source.tensors
    flushes.fails = True
    sink.write(tensor, 0, bytes(16))
    until(lambda: flushes.open == [True])
    with pytest.raises(NoisytuneError, match="Input/output error"):
        sink.finish()
    sink.abort()
    assert flushes.by == ["other"]


def test_what_is_written_after_a_flush_that_failed_fails_too(
    source: SafetensorsSource, sink: Sink, flushes: Flushes
) -> None:
    (tensor,) = source.tensors
    flushes.fails = True
    sink.write(tensor, 0, bytes(16))
    with pytest.raises(NoisytuneError, match="Input/output error"):
        until(lambda: sink.write(tensor, 0, bytes(16)) is not None)
    with pytest.raises(NoisytuneError, match="Input/output error"):
        sink.finish()
    sink.abort()
    assert set(flushes.by) == {"other"}


def test_a_file_that_is_given_up_is_closed_once_its_flush_has_ended(
    source: SafetensorsSource, sink: Sink, flushes: Flushes, open_files: Callable[[], int]
) -> None:
    (tensor,) = source.tensors
    before = open_files()
    flushes.goes_on.clear()
    sink.write(tensor, 0, bytes(16))
    until(lambda: flushes.by == ["other"])
    sink.abort()
    flushes.goes_on.set()
    until(lambda: open_files() == before - 1)
    assert flushes.open == [True]


def test_a_file_is_whole_where_there_is_no_thread_to_flush_it(
    source: SafetensorsSource, sink: Sink, tmp_path: Path, flushes: Flushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    sink.write(source.tensors[0], 0, bytes(range(16)))
    sink.finish()
    assert flushes.by == ["main"]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in.safetensors").read_bytes()
