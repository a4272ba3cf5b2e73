"""System calls: each does what its name says, and says when it cannot."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from noisytune_cli.checkpoint.formats import _system as system


def test_reserve_allocates_and_sets_the_size(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        system.reserve(file.fileno(), 1 << 20)
    status = (tmp_path / "f").stat()
    assert status.st_size == 1 << 20
    assert status.st_blocks * 512 >= 1 << 20


def test_reserve_reports_the_kernels_error(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with (tmp_path / "f").open("rb") as file, pytest.raises(OSError, match="Bad file descriptor") as caught:
        system.reserve(file.fileno(), 1)
    assert caught.value.errno == errno.EBADF


def test_reserve_goes_on_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [errno.EINTR, errno.EINTR, 0]
    monkeypatch.setattr(system, "_fallocate", lambda *_: -1 if answers[0] else 0)
    monkeypatch.setattr(system.ctypes, "get_errno", lambda: answers.pop(0))
    system.reserve(0, 1)
    assert answers == [0]


def test_reserve_where_libc_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_fallocate", None)
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        system.reserve(0, 1)


def test_start_writeback_leaves_the_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.write(b"abc")
        file.flush()
        system.start_writeback(file.fileno(), 0, 0)
        monkeypatch.setattr(system, "_sync_file_range", None)
        system.start_writeback(file.fileno(), 0, 0)
    assert (tmp_path / "f").read_bytes() == b"abc"
