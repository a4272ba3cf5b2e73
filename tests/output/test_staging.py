"""Staging directories: recognisable, locked while alive, cleared when dead."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from noisytune_cli.errors import OutputUnsafe, ResourceExhausted
from noisytune_cli.output import staging

OUTPUT = Path("somewhere/model.safetensors")


def kill(lock: int) -> None:
    """What the end of a process does to its lock."""
    os.close(lock)


def test_the_name_tells_the_output(tmp_path: Path) -> None:
    path, lock = staging.create(tmp_path, OUTPUT)
    assert path.parent == tmp_path
    assert path.name.startswith(staging.prefix_for(Path("elsewhere/model.safetensors")))
    assert path.name.startswith(".noisytune-")
    assert not path.name.startswith(staging.prefix_for(Path("model-2.safetensors")))
    kill(lock)


def test_a_live_one_is_left_alone(tmp_path: Path) -> None:
    path, lock = staging.create(tmp_path, OUTPUT)
    (path / "weights").write_bytes(b"x")
    with pytest.raises(OutputUnsafe, match=path.name):
        staging.clear_dead(tmp_path, OUTPUT)
    assert (path / "weights").exists()
    kill(lock)
    assert staging.clear_dead(tmp_path, OUTPUT) == (path.name,)
    assert not path.exists()


def test_only_those_of_the_same_output_are_cleared(tmp_path: Path) -> None:
    mine, my_lock = staging.create(tmp_path, OUTPUT)
    other, other_lock = staging.create(tmp_path, Path("other.safetensors"))
    (tmp_path / ".noisytune-notes").mkdir()
    kill(my_lock)
    kill(other_lock)
    assert staging.clear_dead(tmp_path, OUTPUT) == (mine.name,)
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, ".noisytune-notes"])


def test_a_link_with_such_a_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_bytes(b"x")
    (tmp_path / f"{staging.prefix_for(OUTPUT)}0").symlink_to("precious")
    with pytest.raises(OutputUnsafe):
        staging.clear_dead(tmp_path, OUTPUT)
    assert (tmp_path / "precious/file").exists()


def test_one_taken_for_dead_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open
    made: list[Path] = []

    def lose_the_first(path: Path, *arguments: int) -> int:
        if not made:
            made.append(Path(path))
            os.rmdir(path)
        return real(path, *arguments)

    monkeypatch.setattr(staging.os, "open", lose_the_first)
    path, lock = staging.create(tmp_path, OUTPUT)
    assert os.listdir(tmp_path) == [path.name]
    assert path != made[0]
    kill(lock)


def test_one_whose_lock_another_took_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([errno.EWOULDBLOCK])
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if (code := next(answers, None)) is not None:
            raise OSError(code, os.strerror(code))
        real(fd, how)

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    path, lock = staging.create(tmp_path, OUTPUT)
    assert path.is_dir()
    with pytest.raises(BlockingIOError):
        real(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    kill(lock)


def test_without_locks_what_is_not_empty_is_taken_for_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    path, lock = staging.create(tmp_path, OUTPUT)
    (path / "weights").write_bytes(b"x")
    kill(lock)
    with pytest.raises(OutputUnsafe):
        staging.clear_dead(tmp_path, OUTPUT)
    assert (path / "weights").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(staging.os, "mkdir", mkdir)
    with pytest.raises(ResourceExhausted, match="Read-only"):
        staging.create(tmp_path, OUTPUT)


def test_what_is_kept_has_the_very_bytes_and_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
    staged, there = tmp_path / "staged", tmp_path / "there"
    staged.write_bytes(b"same")
    assert not staging.keeps(staged, there)
    for content in (b"some", b"sam"):
        there.write_bytes(content)
        assert not staging.keeps(staged, there)
    (tmp_path / "link").symlink_to(staged)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        assert not staging.keeps(staged, tmp_path / name)
    assert flushed == []
    there.write_bytes(b"same")
    assert staging.keeps(staged, there)
    assert flushed == [there.stat().st_ino]


def test_a_failing_close_changes_no_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The left-over of a run whose every close failed is still known for ours.
    close = os.close

    def failing(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "no")

    expected = staging._tags(tmp_path)
    monkeypatch.setattr(os, "close", failing)
    assert staging._tags(tmp_path) == expected
    monkeypatch.undo()
    assert expected[0] != expected[1]
