"""Publishing: output is absent or whole, whoever else writes, whenever a signal comes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from publications import BESIDE, KINDS, Kind, files, snapshot, write

from noisytune_cli.errors import InputInvalid, OutputUnsafe, Stopped
from noisytune_cli.output import publish as publish_module
from noisytune_cli.output import signals, staging
from noisytune_cli.output.publish import Publication


def test_publishes(kind: Kind, file_system: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    manifest = kind.publish(root)
    assert manifest.read_bytes() == b"manifest"
    assert files(root) == kind.after


@pytest.mark.parametrize("name", ["file", "folder", "empty folder"])
def test_what_appears_meanwhile_is_not_replaced(name: str, file_system: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    root = tmp_path / "root"
    kind.prepare(root)
    theirs = {next(n for n in kind.after if n not in kind.before): b"theirs"}
    sealed = Publication.publish

    def publish(self: Publication, manifest: bytes) -> Path:
        write(root, theirs)
        return sealed(self, manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Publication, "publish", publish)
        with pytest.raises(OutputUnsafe, match="exists"):
            kind.publish(root)
    assert files(root) == kind.before | theirs


def test_a_manifest_that_appears_meanwhile_is_not_replaced(file_system: str, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    manifest = tmp_path / "out.safetensors.noisytune.json"
    with Publication(output, directory=False, overwrite=False) as p:
        p.path(output.name).write_bytes(b"weights")
        manifest.write_bytes(b"theirs")
        with pytest.raises(OutputUnsafe):
            p.publish(b"manifest")
    assert files(tmp_path) == {manifest.name: b"theirs"}


def test_an_empty_folder_that_was_filled_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"out/theirs": b"x"})
    with pytest.raises(OutputUnsafe), Publication(tmp_path / "out", directory=True, overwrite=False):
        pytest.fail("entered")
    assert files(tmp_path) == {"out/theirs": b"x"}


@pytest.mark.parametrize("error", [RuntimeError(), Stopped(signal.SIGTERM)], ids=type)
def test_leaving_early_removes_everything(kind: Kind, error: BaseException, tmp_path: Path) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    before = snapshot(root)

    def leave() -> None:
        with kind.publication(root) as p:
            p.path("a/b").write_bytes(b"x")
            raise error

    with pytest.raises(type(error)):
        leave()
    assert snapshot(root) == before


def test_a_signal_while_the_staging_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = staging.create

    def create_and_stop(place: Path, output: Path) -> tuple[Path, int]:
        made = create(place, output)
        signals._stop(signal.SIGTERM, None)
        return made

    monkeypatch.setattr(staging, "create", create_and_stop)
    with pytest.raises(Stopped), Publication(tmp_path / "a/out", directory=True, overwrite=False):
        pytest.fail("entered")
    assert snapshot(tmp_path) == {}


def test_a_signal_while_publishing_waits(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    sync = publish_module.sync_directory

    def sync_and_stop(path: Path) -> None:
        signals._stop(signal.SIGINT, None)
        sync(path)

    monkeypatch.setattr(publish_module, "sync_directory", sync_and_stop)
    with pytest.raises(Stopped):
        kind.publish(root)
    assert files(root) == kind.after


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o000])
def test_modes_follow_the_umask(kind: Kind, file_system: str, umask: int, tmp_path: Path) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    for path in (tmp_path / "root-source").iterdir():
        path.chmod(0o666)
    there = set(root.rglob("*"))
    for path in there:  # what is replaced keeps nothing back
        path.chmod(0o777)
    (tmp_path / "source").write_bytes(b"copied")
    (tmp_path / "source").chmod(0o400)
    old = os.umask(umask)
    try:
        kind.publish(root)
        with Publication(root / "copy", directory=True, overwrite=False) as p:
            p.copy(tmp_path / "source", "sub/copied")
            p.publish(b"")
    finally:
        os.umask(old)
    replaced = {root / name for name in kind.after if name not in BESIDE}
    for path in {*root.rglob("*")} - there | replaced:
        full = 0o777 if path.is_dir() else 0o600 if path.name == "copied" else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path
    assert stat.S_IMODE((root / "copy/sub/copied").stat().st_mode) == 0o600 & ~umask


@pytest.mark.parametrize("name", ["file replaced", "folder replaced"])
def test_what_replaces_a_private_output_is_private(name: str, file_system: str, tmp_path: Path) -> None:
    kind, root = KINDS[name], tmp_path / "root"
    kind.prepare(root)
    (out,) = (path for path in root.iterdir() if path.name in ("out", "out.safetensors"))
    out.chmod(0o710 if out.is_dir() else 0o640)
    old = os.umask(0o002)
    try:
        kind.publish(root)
    finally:
        os.umask(old)
    assert files(root) == kind.after
    assert stat.S_IMODE(out.stat().st_mode) == (0o710 if out.is_dir() else 0o640)


def test_copying(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "source").write_bytes(content)
    with Publication(tmp_path / "out", directory=True, overwrite=False) as p:
        assert p.copy(tmp_path / "source", "a/b/c") == f"blake3:{blake3(content).hexdigest()}"
        p.publish(b"")
    assert (tmp_path / "out/a/b/c").read_bytes() == content


def test_copying_refuses_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "source")
    with (
        Publication(tmp_path / "out", directory=True, overwrite=False) as p,
        pytest.raises(InputInvalid, match="FIFO"),
    ):
        p.copy(tmp_path / "source", "x")
    assert not (tmp_path / "out").exists()


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fdopen

    def fdopen(fd: int, *arguments: object, **keywords: object) -> object:
        file = real(fd, *arguments, **keywords)  # type: ignore[call-overload]

        class Short:
            def __enter__(self) -> Short:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, view: memoryview) -> int:
                return int(file.write(view[:5]))

            def fileno(self) -> int:
                return int(file.fileno())

        return Short()

    monkeypatch.setattr(publish_module.os, "fdopen", fdopen)
    with Publication(tmp_path / "out", directory=True, overwrite=False) as p:
        manifest = p.publish(b"a manifest of many bytes")
    assert manifest.read_bytes() == b"a manifest of many bytes"


def test_left_overs_of_killed_runs_are_cleared_and_named(kind: Kind, tmp_path: Path) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    output = root / kind.output
    place = output if kind.empty and not kind.overwrite else output.parent
    place.mkdir(parents=True, exist_ok=True)
    dead, lock = staging.create(place, output)
    write(dead, {"model.safetensors": b"half", "a/b": b"x"})
    os.close(lock)
    others = place / f"{staging.prefix_for(Path('another'))}0000"
    if place != output:
        others.mkdir()
    with Publication(output, directory=kind.directory, overwrite=kind.overwrite) as p:
        assert p.cleared == (dead.name,)
        assert not dead.exists()
    assert others.exists() is (place != output)


def test_a_live_run_is_refused(kind: Kind, tmp_path: Path) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    with (
        kind.publication(root),
        pytest.raises(OutputUnsafe, match="in use"),
        kind.publication(root),
    ):
        pytest.fail("entered twice")
    assert files(root) == kind.before


_RUN = """
import sys, time
from pathlib import Path
from noisytune_cli.errors import NoisytuneError
from noisytune_cli.output.publish import Publication

me, output, directory = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "directory"
print("ready", flush=True)
sys.stdin.readline()
try:
    with Publication(output, directory=directory, overwrite=False) as p:
        p.path("model.safetensors" if directory else output.name).write_text(me)
        p.publish(me.encode())
except NoisytuneError as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("name", ["file", "folder", "empty folder"])
def test_of_eight_runs_onto_one_output_one_wins(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    root = tmp_path / "root"
    kind.prepare(root)
    output = root / kind.output
    shape = "directory" if kind.directory else "file"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _RUN, str(i), str(output), shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for i in range(8)
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
    for run in runs:
        assert run.stdin is not None
        run.stdin.write(b"go\n")
        run.stdin.flush()
    for run in runs:
        run.communicate(timeout=60)
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 5, 5, 5, 5, 5, 5, 5]
    winner = str(codes.index(0)).encode()
    weights = output / "model.safetensors" if kind.directory else output
    manifest = output / "noisytune.json" if kind.directory else Path(f"{output}.noisytune.json")
    assert files(root) == kind.before | {
        os.fspath(weights.relative_to(root)): winner,
        os.fspath(manifest.relative_to(root)): winner,
    }
