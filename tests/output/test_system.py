"""System calls: each does what its name says, and says when it cannot."""

from __future__ import annotations

import errno
import io
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


MEMINFO = "MemTotal: 64000000 kB\nMemAvailable: 1000000 kB\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"/proc/self/cgroup": "0::/\n"}, 1024000000),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n"}, 1024000000),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/memory.max": "3000000\n"}, 3000000),
        # A container of version 1, whose own group is all it sees of them.
        (
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "314572800\n",
            },
            314572800,
        ),
        ({"/proc/self/cgroup": "0::/\n", "/proc/meminfo": "MemTotal: 1 kB\n"}, None),
        ({}, None),
    ],
)
def test_free_memory_is_what_is_available_and_allowed(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int | None
) -> None:
    def opened(path: object, **_: object) -> io.StringIO:
        found = {"/proc/meminfo": MEMINFO, **files}.get(str(path))
        if found is None:
            raise FileNotFoundError(path)
        return io.StringIO(found)

    monkeypatch.setattr(system, "open", opened, raising=False)
    assert system.free_memory() == free
