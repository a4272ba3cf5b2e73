"""Publishing: output is absent or whole, whatever fails, whoever else writes, whenever a signal comes."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from blake3 import blake3

from noisytune_cli import publish as publish_module
from noisytune_cli import signals, staging, system
from noisytune_cli.errors import InputInvalid, OutputUnsafe, ResourceExhausted, Stopped
from noisytune_cli.publish import Publication

OLD = {"out.safetensors": b"old weights", "out.safetensors.noisytune.json": b"old manifest"}


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the content of files, None for folders."""
    return {
        os.fspath(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@dataclass(frozen=True)
class Kind:
    """One way to publish: what is there before, where the output goes, and what must be there after."""

    output: str
    before: dict[str, bytes]
    after: dict[str, bytes]
    directory: bool = False
    overwrite: bool = False
    empty: bool = False

    def prepare(self, root: Path) -> None:
        root.mkdir()
        write(root, self.before)
        if self.empty:
            (root / self.output).mkdir()
        write(root.with_name(f"{root.name}-source"), {c: c.encode() for c in ("weights", "pooling", "zebra")})

    def publish(self, root: Path) -> Path:
        source = root.with_name(f"{root.name}-source")
        names = {"weights": "model.safetensors", "pooling": "1_Pooling/config.json", "zebra": "zebra.txt"}
        if not self.directory:
            names = {"weights": Path(self.output).name}
        with Publication(root / self.output, directory=self.directory, overwrite=self.overwrite) as p:
            for content, name in names.items():
                p.copy(source / content, name)
            return p.publish(b"manifest")


FILE = {"out.safetensors": b"weights", "out.safetensors.noisytune.json": b"manifest"}
FOLDER = {
    "out/1_Pooling/config.json": b"pooling",
    "out/model.safetensors": b"weights",
    "out/noisytune.json": b"manifest",
    "out/zebra.txt": b"zebra",
}
BESIDE = {"other": b"beside"}
KINDS = {
    "file": Kind("out.safetensors", BESIDE, BESIDE | FILE),
    "file below missing folders": Kind("a/b/out.safetensors", {}, {f"a/b/{n}": c for n, c in FILE.items()}),
    "file replaced": Kind("out.safetensors", BESIDE | OLD, BESIDE | FILE, overwrite=True),
    "file replaced that had no manifest": Kind(
        "out.safetensors", {"out.safetensors": b"old"}, FILE, overwrite=True
    ),
    "manifest replaced that had no file": Kind(
        "out.safetensors", {"out.safetensors.noisytune.json": b"old"}, FILE, overwrite=True
    ),
    "file not there to replace": Kind("out.safetensors", {}, FILE, overwrite=True),
    "folder": Kind("out", BESIDE, BESIDE | FOLDER, directory=True),
    "folder below missing folders": Kind(
        "a/b/out", {}, {f"a/b/{n}": c for n, c in FOLDER.items()}, directory=True
    ),
    "folder replaced": Kind(
        "out", {"out/noisytune.json": b"old", "out/deep/er": b"old"}, FOLDER, directory=True, overwrite=True
    ),
    "folder not there to replace": Kind("out", {}, FOLDER, directory=True, overwrite=True),
    "empty folder": Kind("out", BESIDE, BESIDE | FOLDER, directory=True, empty=True),
    "empty folder replaced": Kind("out", {}, FOLDER, directory=True, overwrite=True, empty=True),
}


def files(root: Path) -> dict[str, bytes]:
    return {name: content for name, content in snapshot(root).items() if content is not None}


def refuse(*_: object) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture(params=["renameat2", "no flags"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that has the flags of renameat2, and one that has not."""
    if request.param == "no flags":
        monkeypatch.setattr(system, "rename_without_replacing", refuse)
        monkeypatch.setattr(system, "exchange", refuse)
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def test_publishes(kind: Kind, file_system: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    manifest = kind.publish(root)
    assert manifest.read_bytes() == b"manifest"
    assert files(root) == kind.after


def eio() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@dataclass
class Fault:
    """At the `step`-th system call that can fail something happens: by default, it fails."""

    step: int
    action: Callable[[], None] = eio
    calls: int = 0

    def wrap(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            self.calls += 1
            if self.calls == self.step:
                self.action()
            return real(*arguments, **keywords)

        return call

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "rename", "link", "mkdir"):
                patch.setattr(os, name, self.wrap(getattr(os, name)))
            for name in ("rename_without_replacing", "exchange"):
                patch.setattr(system, name, self.wrap(getattr(system, name)))
            yield


def test_a_failure_at_any_step_changes_nothing(
    kind: Kind, file_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for step in count(1):
        root = tmp_path / str(step)
        kind.prepare(root)
        before = snapshot(root)
        fault = Fault(step)
        with fault.installed():
            why = failure(lambda root=root: kind.publish(root))
        if why is None:  # making a folder that is there already may fail
            assert files(root) == kind.after, f"call {step}"
        else:
            assert "nothing was published" in why
            assert snapshot(root) == before, f"call {step}"
        if fault.calls < step:
            break
    assert step > 5


def failure(publish: Callable[[], object]) -> str | None:
    """Publish, and return the error's line if a resource gave out."""
    try:
        publish()
    except ResourceExhausted as error:
        return str(error)
    return None


def kill_at_any_step(root: Path, flags: bool) -> None:
    """Kill runs of every kind at every step; what is left, and what a second run makes, must be whole."""
    os.fsync = lambda fd: None  # what a kill leaves does not depend on it, and it takes its time
    if not flags:
        system.rename_without_replacing = system.exchange = refuse
    for number, (name, kind) in enumerate(KINDS.items()):
        for step in count(1):
            place = root / f"{number}-{step}"
            kind.prepare(place)
            child = os.fork()
            if child == 0:
                with Fault(step, action=lambda: os._exit(9)).installed():
                    kind.publish(place)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            left = files(place)
            manifest = next(n for n in kind.after if n.endswith("noisytune.json"))
            if left.get(manifest) == b"manifest":
                assert left.items() >= kind.after.items(), f"{name}, call {step}: complete, it says"
            elif not kind.directory and not kind.overwrite and kind.output in left:
                assert left[kind.output] == b"weights", f"{name}, call {step}: unverified, but whole"
            else:
                kind.publish(place)
                assert files(place) == kind.after, f"{name}, call {step}: run again"
            if status == 0:
                break


@pytest.mark.parametrize("flags", [True, False], ids=["renameat2", "no flags"])
def test_a_run_killed_at_any_step_can_be_repeated(flags: bool, tmp_path: Path) -> None:
    # In a process of its own, which has one thread and so may fork.
    script = "import sys, test_publish, pathlib; test_publish.kill_at_any_step(pathlib.Path(sys.argv[1]), {})"
    done = subprocess.run(
        [sys.executable, "-c", script.format(flags), str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_everything_is_flushed_before_success(
    kind: Kind, file_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    kind.prepare(root)
    flushed: dict[int, int] = {}  # inode -> how many names had been made when it was last flushed
    renames = 0
    fsync = os.fsync

    def flush(fd: int) -> None:
        flushed[os.fstat(fd).st_ino] = renames
        fsync(fd)

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal renames
            real(*arguments)
            renames += 1

        return call

    monkeypatch.setattr(os, "fsync", flush)
    for module, name in (
        *((os, name) for name in ("rename", "link")),
        *((system, name) for name in ("rename_without_replacing", "exchange")),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    kind.publish(root)
    place = root / kind.output if kind.empty and not kind.overwrite else root
    for name in kind.after:
        if name not in kind.before or kind.before[name] != kind.after[name]:
            assert flushed[(root / name).stat().st_ino] == 0, f"{name} was renamed before it was flushed"
            for folder in (root / name).parents:
                if folder.is_relative_to(place):
                    assert folder.stat().st_ino in flushed, f"{folder} was not flushed"
    last = place if place != root else (root / kind.output).parent
    assert flushed[last.stat().st_ino] == renames > 0, "the last name is not durable"


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
        with Publication(root / kind.output, directory=kind.directory, overwrite=kind.overwrite) as p:
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
    there = set(root.rglob("*"))
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
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path
    assert stat.S_IMODE((root / "copy/sub/copied").stat().st_mode) == 0o666 & ~umask


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
        Publication(root / kind.output, directory=kind.directory, overwrite=kind.overwrite),
        pytest.raises(OutputUnsafe, match="in use"),
        Publication(root / kind.output, directory=kind.directory, overwrite=kind.overwrite),
    ):
        pytest.fail("entered twice")
    assert files(root) == kind.before


_RUN = """
import sys, time
from pathlib import Path
from noisytune_cli.errors import NoisytuneError
from noisytune_cli.publish import Publication

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
