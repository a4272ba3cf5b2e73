"""Input files: what is opened, what is refused without waiting, and what JSON is taken."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import pytest

from noisytune_cli import reading
from noisytune_cli.errors import InputInvalid, InputUnreadable, NoisytuneError, ResourceExhausted
from noisytune_cli.reading import is_there, open_regular, read_json, read_small


def test_opens_a_regular_file_and_does_not_leak_it_to_children(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    fd = open_regular(tmp_path / "f")
    try:
        assert os.read(fd, 9) == b"abc"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_follows_symlinks(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("f")
    assert read_small(tmp_path / "link", 3) == b"abc"


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a socket", "a character device"])
def test_refuses_what_is_not_a_regular_file_without_waiting(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a socket":
        monkeypatch.chdir(tmp_path)  # a socket's path has to be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("input")
    else:
        path = Path("/dev/zero")
    with pytest.raises(InputInvalid, match=kind):
        open_regular(path)


@pytest.mark.timeout(10)
def test_a_file_that_turns_into_a_fifo_is_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"abc")
    regular = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    opened: list[int] = []
    real_open = os.open

    def record(*arguments: object) -> int:
        opened.append(real_open(*arguments))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(reading.os, "stat", lambda _: regular)
    monkeypatch.setattr(reading.os, "open", record)
    with pytest.raises(InputInvalid, match="a FIFO"):
        open_regular(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("absent", InputUnreadable, "No such file"),
        ("file/below", InputUnreadable, "Not a directory"),
        ("loop", InputUnreadable, "symbolic links"),
        ("x" * 5000, InputUnreadable, "too long"),
        ("a\0b", InputInvalid, "no file can have such a name"),
        ("\ud800", InputInvalid, "no file can have such a name"),
    ],
)
def test_names_that_lead_nowhere(tmp_path: Path, name: str, kind: type[NoisytuneError], words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(kind, match=words):
        open_regular(tmp_path / name)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.EACCES, InputUnreadable), (errno.EIO, InputUnreadable), (errno.EMFILE, ResourceExhausted)],
)
def test_a_file_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[NoisytuneError]
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    (tmp_path / "f").touch()
    monkeypatch.setattr(reading.os, "open", refuse)
    with pytest.raises(kind, match=os.strerror(code)):
        open_regular(tmp_path / "f")


def test_a_failed_read_is_unreadable_and_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, _: int) -> bytes:
        raise OSError(5, "Input/output error")

    (tmp_path / "f").touch()
    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(reading.os, "read", broken)
    with pytest.raises(InputUnreadable, match="Input/output error"):
        read_small(tmp_path / "f", 9)
    assert len(os.listdir("/dev/fd")) == before


def test_small_files_are_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abcd")
    assert read_small(path, 4) == b"abcd"
    with pytest.raises(InputInvalid, match="larger than 3 bytes"):
        read_small(path, 3)


def test_a_sparse_terabyte_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(InputInvalid, match="larger than 1,000 bytes"):
        read_json(path, 1000)


@pytest.mark.parametrize(
    "text", ['{"a": [1, NaN, -Infinity], "b": "\\u00e9"}', "[]", "null", '{"a":1,"a":2}', "7"]
)
def test_json_documents_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert repr(read_json(path, 1000, lenient=True)) == repr(json.loads(text))


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b'{"a": 1}\n]', "Extra data at line 2"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        ('{"a": 1}'.encode("utf-8-sig"), "column 1"),
        (b'{"a":' * 20_000, "nested too deep"),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deep"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
    ],
)
def test_what_is_not_json_is_refused_in_one_line(
    tmp_path: Path, content: bytes, words: str, lenient: bool
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputInvalid, match=words) as caught:
        read_json(path, 1 << 20, lenient=lenient)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("not valid JSON")


def test_what_cannot_be_looked_at_is_not_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "dead").symlink_to("nothing")
    assert is_there(tmp_path / "there")
    assert is_there(tmp_path / "dead")
    for name in ("absent", "there/below", "n" * 300, "a\0b"):
        assert not is_there(f"{tmp_path}/{name}")

    def stale(path: object) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "lstat", stale)
    with pytest.raises(InputUnreadable, match="Stale"):
        is_there(tmp_path / "there")
