"""safetensors: headers against the package's own reader, then reading, then writing."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import CASES, DATA, HEADER, Case, crowd, frame

from noisytune_cli import system
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, ResourceExhausted
from noisytune_cli.escape import escape
from noisytune_cli.formats import _header
from noisytune_cli.formats import safetensors as format_module
from noisytune_cli.formats.safetensors import SafetensorsSource, create_sink, open_source

ROOT = Path(__file__).parent.parent
CHECKPOINTS = Path(os.environ.get("NOISYTUNE_DATA", ROOT / ".." / "shared" / "data")) / "checkpoints"

Specs = list[tuple[str, str, tuple[int, ...], bytes]]


def by_case(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def opened(path: Path, content: bytes, mmap: bool = False) -> SafetensorsSource:
    path.write_bytes(content)
    return open_source(path, "model.safetensors", mmap)


def contents(source: SafetensorsSource) -> Specs:
    """Name, dtype, shape and bytes of every tensor, by name."""
    return sorted(
        (t.name, t.dtype, t.shape, bytes(source.read(t.offset, memoryview(bytearray(t.nbytes)))))
        for t in source.tensors
    )


def official(content: bytes) -> Specs:
    """The same, as the safetensors package reads it."""
    return sorted(
        (name, info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        for name, info in safetensors.deserialize(content)
    )


@pytest.fixture
def source(tmp_path: Path) -> SafetensorsSource:
    return opened(tmp_path / "in.safetensors", frame(HEADER.ljust(64), bytes(range(16))))


# Headers


@pytest.mark.timeout(60)
@by_case(tuple(case for case in CASES if case.refused))
def test_malformed_files_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputInvalid) as caught:
        opened(tmp_path / f"bad{case.suffix}", case.build())
    line = str(caught.value)
    assert [word for word in case.words if word not in line] == []
    assert caught.value.tensor == case.tensor
    assert "bad.safetensors" in line
    assert line.isprintable()
    assert len(line) < 1500


@by_case(tuple(case for case in CASES if not case.refused))
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_odd_files_are_read_as_the_package_reads_them(case: Case, mmap: bool, tmp_path: Path) -> None:
    content = case.build()
    source = opened(tmp_path / "odd.safetensors", content, mmap)
    assert contents(source) == official(content)
    source.close()


@by_case(tuple(case for case in CASES if case.refused and case.lax is not None))
def test_the_package_refuses_them_too_unless_marked(case: Case) -> None:
    try:
        safetensors.deserialize(case.build())
    except safetensors.SafetensorError:
        accepted = False
    else:
        accepted = True
    assert accepted == case.lax


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*/*.safetensors")), ids=lambda p: p.parent.name)
def test_real_checkpoints_are_read_as_the_package_reads_them(path: Path) -> None:
    source = open_source(path, path.name, False)
    assert contents(source) == official(path.read_bytes())
    assert source.tensors
    source.close()


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="needs the real checkpoints (NOISYTUNE_DATA)")
def test_metadata_null_of_a_real_file_means_none() -> None:
    source = open_source(CHECKPOINTS / "mlx-kan" / "model.safetensors", "model.safetensors", False)
    assert source.metadata == {}
    assert b'"__metadata__":null' in source.header
    source.close()


@by_case(tuple(case for case in CASES if case.name.startswith("a name") and not case.refused))
def test_hostile_names_are_escaped_in_error_lines(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputInvalid) as caught:
        opened(tmp_path / "f", case.build().replace(b"F32", b"F23"))
    (name,) = (tensor[0] for tensor in official(case.build()))
    assert caught.value.tensor == name
    assert f'tensor "{escape(name)}": its dtype is "F23"' in str(caught.value)
    assert str(caught.value).isprintable()


def test_metadata_are_kept_in_order(tmp_path: Path) -> None:
    source = opened(tmp_path / "f", frame('{"__metadata__":{"b":"{é}","a":""},' + HEADER[1:]))
    assert list(source.metadata.items()) == [("b", "{é}"), ("a", "")]


def test_tensors_are_in_the_order_of_their_data_with_absolute_offsets(tmp_path: Path) -> None:
    header = (
        '{"late":{"dtype":"U8","shape":[8],"data_offsets":[8,16]},'
        '"z":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},'
        '"y":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},'
        '"early":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}'
    )
    source = opened(tmp_path / "f", frame(header))
    start = 8 + len(header)
    assert [t.name for t in source.tensors] == ["early", "z", "y", "late"]
    assert [t.offset - start for t in source.tensors] == [0, 8, 8, 8]
    assert {t.file for t in source.tensors} == {"model.safetensors"}


def test_no_tensors_is_warned_of(tmp_path: Path, source: SafetensorsSource) -> None:
    assert source.warnings == ()
    assert opened(tmp_path / "empty", frame("{}", b"")).warnings == ("model.safetensors holds no tensors",)


def test_every_dtype_of_the_package_is_known_with_its_size(tmp_path: Path) -> None:
    for dtype, bits in _header._BITS.items():
        header = f'{{"a":{{"dtype":"{dtype}","shape":[8],"data_offsets":[0,{bits}]}}}}'
        content = frame(header, bytes(bits))
        assert contents(opened(tmp_path / "f", content)) == official(content)
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(frame(HEADER.replace("F32", "F128")))
    listed = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    assert {name.strip("` ") for name in listed.split(",")} == set(_header._BITS)


def test_the_cap_counts_entries_not_braces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_header, "MAX_ENTRIES", 3)
    metadata = '"__metadata__":{"{{{{":"{{\\"{{{\\\\"}'
    entries = [f'"{{{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(3)]
    at_the_cap = frame("{" + ",".join([metadata, *entries[:2]]) + "}", b"")
    assert len(opened(tmp_path / "at", at_the_cap).tensors) == 2
    over_the_cap = frame("{" + ",".join([metadata, *entries]) + "}", b"")
    with pytest.raises(InputInvalid, match="more than 3 entries"):
        opened(tmp_path / "over", over_the_cap)


def test_metadata_count_towards_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_header, "MAX_ENTRIES", 3)
    with pytest.raises(InputInvalid, match="more than 3 entries"):
        opened(tmp_path / "f", frame('{"__metadata__":{"a":"","b":"","c":"","d":""}}', b""))


_REFUSE_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from noisytune_cli.errors import InputInvalid
from noisytune_cli.formats.safetensors import open_source

resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), -1))
try:
    open_source(Path(sys.argv[1]), "f", False)
except InputInvalid:
    sys.exit(3)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", ["crowd", "one long string", "escapes without end", "brackets"])
def test_hostile_headers_are_refused_in_little_memory(content: str, tmp_path: Path) -> None:
    million = 1_000_000
    path = tmp_path / "f"
    path.write_bytes(
        {
            "crowd": lambda: crowd(1_500_000),
            "one long string": lambda: frame('{"' + "a" * 30 * million + "{" * 300_000),
            "escapes without end": lambda: frame('{"' + '\\"' * 15 * million + "{" * 300_000),
            "brackets": lambda: frame('{"a":{"x":[' + "[]," * 10 * million + "[]]}}"),
        }[content]()
    )
    child = subprocess.run(
        [sys.executable, "-c", _REFUSE_IN_LITTLE_MEMORY, str(path), str(256 << 20)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, child.stderr) == (3, "")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda name: name != "__metadata__"
)
ARRAYS = st.tuples(
    st.sampled_from(["f8", "f4", "f2", "i8", "i4", "u2", "i1", "u1", "?", "c8"]),
    st.lists(st.integers(0, 3), max_size=4),
).map(lambda drawn: np.zeros(drawn[1], drawn[0]))


@settings(deadline=None)
@given(st.dictionaries(NAMES, ARRAYS, max_size=6), st.dictionaries(st.text(max_size=5), st.text(max_size=9)))
def test_what_the_package_writes_is_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    content = safetensors.numpy.save(arrays, metadata or None)  # see the case "saved with empty metadata"
    source = opened(tmp_path_factory.getbasetemp() / "written.safetensors", content)
    assert contents(source) == official(content)
    assert source.metadata == metadata
    source.close()


@settings(deadline=None)
@given(st.sampled_from([case for case in CASES if not case.refused]), st.data())
def test_damaged_headers_are_refused_or_read_as_the_package_reads_them(
    tmp_path_factory: pytest.TempPathFactory, case: Case, data: st.DataObject
) -> None:
    content = bytearray(case.build())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(8 + length, len(content)) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    try:
        source = opened(tmp_path_factory.getbasetemp() / "damaged.safetensors", content)
    except InputInvalid:
        return
    assert contents(source) == official(bytes(content))
    source.close()


# Reading


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_reads_any_range(tmp_path: Path, mmap: bool) -> None:
    content = frame(HEADER, bytes(range(16)))
    source = opened(tmp_path / "f", content, mmap)
    buffer = memoryview(bytearray(5))
    got = source.read(len(content) - 7, buffer)
    assert bytes(got) == content[-7:-2]
    assert (got is buffer) is not mmap
    assert got.readonly is mmap
    source.close()
    source.close()
    assert bytes(got) == content[-7:-2]


def test_short_reads_are_continued(source: SafetensorsSource, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(
        format_module.os, "preadv", lambda fd, views, offset: real(fd, [v[:3] for v in views], offset)
    )
    (tensor,) = source.tensors
    assert bytes(source.read(tensor.offset, memoryview(bytearray(16)))) == bytes(range(16))


def test_a_failed_read_is_unreadable(source: SafetensorsSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(format_module.os, "preadv", broken)
    with pytest.raises(InputUnreadable, match="Input/output error"):
        source.read(0, memoryview(bytearray(1)))


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_truncation_while_reading_is_a_mismatch(tmp_path: Path, mmap: bool) -> None:
    source = opened(tmp_path / "f", frame(HEADER, DATA), mmap)
    os.truncate(source.path, source.size - 1)
    with pytest.raises(Mismatch, match="shorter than it was"):
        source.read(source.tensors[0].offset, memoryview(bytearray(16)))
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


def test_a_new_hard_link_is_no_change(source: SafetensorsSource) -> None:
    os.link(source.path, source.path.with_name("link"))
    source.check_unchanged()


def test_identity_and_digest(source: SafetensorsSource) -> None:
    status = source.path.stat()
    assert source.identity == (status.st_dev, status.st_ino)
    assert os.fstat(source.fileno()).st_ino == status.st_ino
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


# Writing


def test_the_header_is_the_sources_byte_for_byte(source: SafetensorsSource, tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "out", source)
    (tensor,) = source.tensors
    sink.write(tensor.offset + 8, memoryview(bytes(range(8, 16))))
    sink.write(tensor.offset, bytes(range(8)))
    sink.finish()
    assert (tmp_path / "out").read_bytes() == source.path.read_bytes()


@pytest.mark.parametrize("mask", [0o077, 0o022, 0])
def test_the_mode_follows_the_umask(source: SafetensorsSource, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        create_sink(tmp_path / "out", source).finish()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~mask


def test_the_whole_size_is_there_from_the_start(source: SafetensorsSource, tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "out", source)
    assert (tmp_path / "out").stat().st_size == source.size
    sink.abort()
    sink.abort()


def test_an_existing_file_is_never_opened(source: SafetensorsSource, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "out").symlink_to("target")
    with pytest.raises(ResourceExhausted, match="File exists"):
        create_sink(tmp_path / "out", source)
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_short_writes_are_continued(
    source: SafetensorsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(format_module.os, "pwrite", lambda fd, view, offset: real(fd, view[:3], offset))
    sink = create_sink(tmp_path / "out", source)
    sink.write(source.tensors[0].offset, bytes(range(16)))
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

    sink = create_sink(tmp_path / "out", source)
    monkeypatch.setattr(format_module.os, "pwrite", broken)
    with pytest.raises(ResourceExhausted, match="nothing was published"):
        sink.write(source.tensors[0].offset, bytes(16))
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

    sink = create_sink(tmp_path / "out", source)
    monkeypatch.setattr(format_module.os, call, broken)
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
        create_sink(tmp_path / "out", source)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_still_gets_the_file(
    source: SafetensorsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unable(fd: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(system, "reserve", unable)
    sink = create_sink(tmp_path / "out", source)
    sink.write(source.tensors[0].offset, bytes(range(16)))
    sink.finish()
    assert (tmp_path / "out").read_bytes() == source.path.read_bytes()


def test_a_file_size_limit_is_a_lack_of_a_resource(source: SafetensorsSource, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (source.size - 1, hard))
    try:
        with pytest.raises(ResourceExhausted, match="File too large"):
            create_sink(tmp_path / "out", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_back_starts_early_whoever_writes(
    source: SafetensorsSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(
        system, "start_writeback", lambda fd, offset, length: started.append((offset, length))
    )
    monkeypatch.setattr(format_module, "_WRITEBACK_BYTES", 1000)
    sink = create_sink(tmp_path / "out", source)
    writers = [
        threading.Thread(target=lambda: [sink.write(100, bytes(100)) for _ in range(50)]) for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    sink.abort()
    assert started == [(0, 0)] * 20
