"""The staging directory is a thing, not a path, and what is replaced is what was looked at."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from publications import KINDS, Kind, files, refuse, write

from noisytune_cli.checkpoint.formats import _system as system
from noisytune_cli.errors import OutputUnsafe, ResourceExhausted, Stopped
from noisytune_cli.output import publish as publish_module
from noisytune_cli.output import signals, staging
from noisytune_cli.output.publish import Publication


def stage_of(publication: Publication) -> Path:
    (stage,) = publication.output.parent.glob(f"{staging.prefix_for(publication.output)}*")
    return stage


def moved_away(stage: Path) -> None:
    stage.rename(stage.with_name("elsewhere"))


def replaced(stage: Path) -> None:
    moved_away(stage)
    stage.mkdir()
    (stage / "precious").touch()


def emptied(stage: Path) -> None:
    (stage / "a/weights").unlink()


LOSSES = [shutil.rmtree, moved_away, replaced, emptied]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("late", [False, True])
def test_a_stage_that_is_lost_is_not_made_again(
    lose: Callable[[Path], None], overwrite: bool, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    if overwrite:
        write(output, {"model": b"old"})
    sync = publish_module.sync_directory

    def sync_and_lose(path: Path) -> None:
        sync(path)
        if path.name.startswith(".noisytune-") and path.exists():
            lose(path)

    def run() -> None:
        with Publication(output, directory=True, overwrite=overwrite) as p:
            p.write("a/weights", b"new")
            if late:
                monkeypatch.setattr(publish_module, "sync_directory", sync_and_lose)
            else:
                lose(stage_of(p))
            p.publish(b"manifest")

    with pytest.raises(ResourceExhausted, match="nothing was published"):
        run()
    assert files(tmp_path).get("out/model") == (b"old" if overwrite else None)
    assert output.exists() is overwrite
    kept = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent != output]
    assert kept == (["precious"] if lose is replaced else [])


def dead_stage(place: Path, output: Path) -> Path:
    stage, lock = staging.create(place, output)
    os.close(lock)
    return stage


@pytest.mark.parametrize(
    ("tag", "whose"), [("host", "another host"), ("mount", "another mount"), ("name", "none that this")]
)
def test_what_may_be_anothers_is_refused_and_named(
    tag: str, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    host, boot, mount = staging._tags(tmp_path)
    tags = {"host": ("0" * 8, "0" * 8, mount), "mount": (host, boot, "0" * 8), "name": ("", "", "")}[tag]
    with monkeypatch.context() as patched:
        patched.setattr(staging, "_tags", lambda place: tags)
        stage = dead_stage(tmp_path, output)
    with pytest.raises(OutputUnsafe, match=f"{stage.name}.*{whose}"):
        staging.clear_dead(tmp_path, output)
    assert stage.exists()


def test_what_an_earlier_boot_left_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, _ = staging._tags(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(staging, "_tags", lambda place: (host, "0" * 8, "1" * 8))
        stage = dead_stage(tmp_path, tmp_path / "out")
    assert staging.clear_dead(tmp_path, tmp_path / "out") == (stage.name,)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
@pytest.mark.parametrize("suffix", ["", staging.ASIDE])
def test_what_another_user_planted_is_refused_and_named(suffix: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stage = dead_stage(tmp_path, output)
    stage = stage.rename(stage.with_name(stage.name + suffix))
    (tmp_path / "precious.txt").write_text("precious")
    (stage / "noisytune.json").touch()
    (stage / "noisytune.json").rename(tmp_path / "noisytune.json")
    os.chown(stage, 1001, 1001)
    with pytest.raises(OutputUnsafe, match="belongs to another user"):
        staging.clear_dead(tmp_path, output)
    assert (tmp_path / "precious.txt").exists()
    assert stage.exists()


def test_in_a_folder_that_anybody_may_write_nothing_is_cleared(tmp_path: Path) -> None:
    stage = dead_stage(tmp_path, tmp_path / "out")
    tmp_path.chmod(0o777)
    with pytest.raises(OutputUnsafe, match="anybody"):
        staging.clear_dead(tmp_path, tmp_path / "out")
    tmp_path.chmod(0o1777)
    assert staging.clear_dead(tmp_path, tmp_path / "out") == (stage.name,)


def announced(place: Path, output: Path, moved: str = "weights") -> Path:
    """What a run leaves that was killed after it had moved a file out of its stage."""
    stage = dead_stage(place, output)
    write(stage, {"weights": b"weights", "sub/config": b"config", "manifest": b""})
    staging.announce_moves(stage, ["weights", "sub"], manifest="manifest")
    os.rename(stage / moved, place / moved)
    return stage


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 3_000_000,
        b'{"manifest": 1, "names": [], "moved": []}',
        b'{"manifest": "manifest", "names": [7], "moved": []}',
        b'{"manifest": "manifest", "names": ["a\\u0000"], "moved": []}',
        b'{"manifest": "manifest", "names": ["\\ud800"], "moved": []}',
        b'{"manifest": "manifest", "names": ["../precious"], "moved": []}',
        b'{"manifest": "manifest", "names": [], "moved": [{"name": "a", "inode": 1e999}]}',
        b" " * (5 << 20),
        None,
    ],
)
def test_an_announcement_is_a_strangers_file(content: bytes | None, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "precious").touch()
    stage = announced(tmp_path, output)
    (stage / ".noisytune-moves").unlink()
    if content is None:
        os.mkfifo(stage / ".noisytune-moves")
    else:
        (stage / ".noisytune-moves").write_bytes(content)
    assert staging.remains(tmp_path, output) == {stage.name}
    assert staging.clear_dead(tmp_path, output) == (stage.name,)
    assert sorted(os.listdir(tmp_path)) == ["precious", "weights"]


def test_a_link_is_no_announcement(tmp_path: Path) -> None:
    stage = announced(tmp_path, tmp_path / "out")
    (stage / ".noisytune-moves").rename(tmp_path / "moves")
    (stage / ".noisytune-moves").symlink_to(tmp_path / "moves")
    assert staging.remains(tmp_path, tmp_path / "out") == {stage.name}


@pytest.mark.parametrize("moved", ["weights", "sub"])
def test_what_was_moved_is_known_and_what_was_changed_since_is_kept(moved: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stage = announced(tmp_path, output, moved)
    assert staging.remains(tmp_path, output) == {stage.name, moved}
    file = tmp_path / ("weights" if moved == "weights" else "sub/config")
    times = file.stat()
    with open(file, "r+b") as opened:  # in place: the inode and the size stay
        opened.write(b"W")
    assert staging.remains(tmp_path, output) == {stage.name}
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.utime(stage, ns=(times.st_atime_ns, times.st_mtime_ns - 10**9))  # the ctime is later than any move
    assert staging.remains(tmp_path, output) == {stage.name}
    staging.clear_dead(tmp_path, output)
    assert file.read_bytes()[:1] == b"W"


def test_what_lies_in_a_moved_folder_besides_is_kept(tmp_path: Path) -> None:
    stage = announced(tmp_path, tmp_path / "out", "sub")
    (tmp_path / "sub/mine").touch()
    assert staging.remains(tmp_path, tmp_path / "out") == {stage.name}


def test_an_old_output_that_cannot_be_deleted_is_said_and_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    write(output, {"model": b"old"})

    def fail(path: Path | int, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", fail)
    monkeypatch.setattr(publish_module, "_empty", fail)
    for count in (1, 2):
        with Publication(output, directory=True, overwrite=True) as p:
            p.publish(b"manifest")
        assert files(output) == {"noisytune.json": b"manifest"}
        assert len(p.warnings) == count
        assert all(".noisytune-" in warning for warning in p.warnings)


def test_what_takes_the_stages_name_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = publish_module._empty

    def lose_first(folder: int) -> None:
        replaced(stage_of(publication))
        empty(folder)

    monkeypatch.setattr(publish_module, "_empty", lose_first)
    with Publication(tmp_path / "out", directory=True, overwrite=False) as publication:
        publication.write("weights", b"new")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["precious"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", ["folder replaced", "file replaced", "recipe replaced"])
def test_a_second_run_takes_no_old_output_for_a_killed_runs(
    name: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS[name]
    root = tmp_path / "root"
    kind.prepare(root)
    refused: list[str] = []

    def and_then_another(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **keywords: object) -> None:
            real(*arguments, **keywords)
            with pytest.raises(OutputUnsafe) as caught, kind.publication(root):
                pytest.fail("entered twice")
            refused.append(str(caught.value))

        return call

    monkeypatch.setattr(system, "exchange", and_then_another(system.exchange) if exchange else refuse)
    monkeypatch.setattr(os, "rename", and_then_another(os.rename))
    monkeypatch.setattr(os, "unlink", and_then_another(os.unlink))
    kind.publish(root)
    assert files(root) == kind.after
    assert refused
    assert all("in use" in line for line in refused)


def test_an_old_output_that_another_program_has_locked_is_in_use(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(output, {"model": b"old"})
    with Publication(output, directory=True, overwrite=True) as p:
        other = os.open(output, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(OutputUnsafe, match="in use"):
            p.publish(b"manifest")
    os.close(other)
    assert files(tmp_path) == {"out/model": b"old"}


def test_where_nothing_can_be_locked_a_folder_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    kind = KINDS["folder replaced"]
    kind.prepare(tmp_path / "root")
    kind.publish(tmp_path / "root")
    assert files(tmp_path / "root") == kind.after


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_output_that_is_lost_meanwhile_is_said(
    exchange: bool, replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    write(output, {"model": b"old"})
    if not exchange:
        monkeypatch.setattr(system, "exchange", refuse)
    swap = publish_module.swap

    def swap_and_lose(stage: Path, output: Path) -> None:
        monkeypatch.setattr(publish_module, "swap", swap)
        swap(stage, output)
        shutil.rmtree(stage)
        if replaced:
            output.rename(tmp_path / "elsewhere")
            write(output, {"model": b"another's"})

    monkeypatch.setattr(publish_module, "swap", swap_and_lose)
    with Publication(output, directory=True, overwrite=True) as p:
        p.write("model", b"new")
        with pytest.raises(ResourceExhausted, match="cannot put the old output back") as caught:
            p.publish(b"manifest")
    assert "nothing was published" not in str(caught.value)
    assert ("the new one is in its place" in str(caught.value)) is not replaced
    assert (output / "model").read_bytes() == (b"another's" if replaced else b"new")


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file added": ("folder replaced", lambda root: (root / "out/README.md").write_bytes(b"mine")),
    "a file changed": ("folder replaced", lambda root: (root / "out/deep/er").write_bytes(b"mine")),
    "a folder added": ("folder replaced", lambda root: (root / "out/runs").mkdir()),
    "a folder at a free place": ("folder not there to replace", lambda root: (root / "out").mkdir()),
    "a file at a free place": (
        "file not there to replace",
        lambda root: (root / "out.safetensors").write_bytes(b"mine"),
    ),
    "a file that was changed": (
        "file replaced",
        lambda root: (root / "out.safetensors").write_bytes(b"mine"),
    ),
    "a manifest that appears": (
        "file replaced that had no manifest",
        lambda root: (root / "out.safetensors.noisytune.json").write_bytes(b"mine"),
    ),
    "a manifest that was changed": (
        "file replaced",
        lambda root: (root / "out.safetensors.noisytune.json").write_bytes(b"mine"),
    ),
    "a recipe's target": (
        "recipe replaced",
        lambda root: (root / "out.noisytune.json").write_bytes(b"mine"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("exchange", [True, False])
def test_what_changed_since_it_was_looked_at_is_not_replaced(
    change: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, apply = CHANGES[change]
    kind: Kind = KINDS[name]
    root = tmp_path / "root"
    kind.prepare(root)
    if not exchange:
        monkeypatch.setattr(system, "exchange", refuse)
    with kind.publication(root) as p:
        if not kind.recipe:
            p.write("model" if kind.directory else p.output.name, b"new")
        apply(root)
        before = {name: c for name, c in files(root).items() if ".noisytune-" not in name}
        there = {path.name for path in root.rglob("*") if ".noisytune-" not in str(path)}
        with pytest.raises(OutputUnsafe):
            p.publish(b"manifest")
    assert files(root) == before
    assert {path.name for path in root.rglob("*")} == there


def test_a_signal_after_the_publication_says_that_the_output_is_complete(tmp_path: Path) -> None:
    with Publication(tmp_path / "out", directory=True, overwrite=False) as p:
        p.publish(b"manifest")
    with pytest.raises(Stopped) as caught:
        signals._stop(signal.SIGINT, None)
    assert caught.value.left is not None
    assert caught.value.left.endswith("out is complete")
    with (
        pytest.raises(Stopped) as caught,
        Publication(tmp_path / "other", directory=True, overwrite=False) as p,
    ):
        signals._stop(signal.SIGINT, None)
    assert caught.value.left is None
