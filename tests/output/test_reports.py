"""Reports as files: absent or whole, durable, and refused before the work where they cannot be."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from noisytune_cli.errors import OutputUnsafe, ResourceExhausted
from noisytune_cli.output.reports import check_new, write_new


def test_a_report_gets_its_name_when_it_is_flushed_and_its_folder_after(
    file_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.csv"
    done: list[tuple[int, bool]] = []
    fsync = os.fsync

    def flush(fd: int) -> None:
        done.append((os.fstat(fd).st_ino, out.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", flush)
    assert write_new(str(out), ["ä", "b"]) == ((), ())
    assert out.read_text(encoding="utf-8") == "äb"
    assert done[0] == (out.stat().st_ino, False)
    assert done[-1] == (tmp_path.stat().st_ino, True)
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_a_call_that_fails_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.csv"
    real = getattr(os, call)
    number = 1

    def fail_at(fd: int) -> None:
        nonlocal left
        left -= 1
        if call == "close":
            real(fd)
        if not left:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if call == "fsync":
            real(fd)

    while True:
        left = number
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail_at)
            try:
                write_new(str(out), b"report")
            except ResourceExhausted:
                assert os.listdir(tmp_path) == []
            else:
                assert os.listdir(tmp_path) == [out.name]
                os.unlink(out)
        if left > 0:
            break
        number += 1
    assert number > 2


def test_a_close_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.FileIO):
        def close(self) -> None:
            was_open = not self.closed
            super().close()
            if was_open:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdopen", lambda fd, *_, **__: Failing(fd, "wb"))
    with pytest.raises(ResourceExhausted):
        write_new(str(tmp_path / "report.csv"), b"report")
    assert os.listdir(tmp_path) == []


def test_a_killed_report_leaves_no_file_and_the_next_run_says_what_it_left(tmp_path: Path) -> None:
    out = tmp_path / "report.csv"
    script = (
        "import os, sys\n"
        "from noisytune_cli.output.reports import write_new\n"
        "def pieces():\n"
        "    yield 'begun'\n"
        "    os._exit(9)\n"
        "write_new(sys.argv[1], pieces())\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(out)], check=False).returncode == 9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".noisytune-")
    check_new(str(out))
    assert write_new(str(out), b"whole") == ((), (left,))
    assert os.listdir(tmp_path) == [out.name]


def test_what_appears_meanwhile_is_not_replaced(file_system: str, tmp_path: Path) -> None:
    out = tmp_path / "report.csv"

    def pieces() -> object:
        yield "ours"
        out.write_text("theirs")

    with pytest.raises(OutputUnsafe, match="a report replaces nothing"):
        write_new(str(out), pieces())  # type: ignore[arg-type]
    assert out.read_text() == "theirs"
    assert os.listdir(tmp_path) == [out.name]


def test_a_report_in_no_folder_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for fine in ("report.csv", "./-", str(tmp_path / "report.csv")):
        check_new(fine)
    for path in ("missing/report.csv", "file/report.csv", f"{'x' * 256}/report.csv"):
        with pytest.raises(OutputUnsafe, match=r"is not there[.] Make that folder first"):
            check_new(path)
    with pytest.raises(OutputUnsafe, match="a report replaces nothing"):
        check_new("file")
