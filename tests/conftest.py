"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import save, save_sharded, weights
from object_store import moto, store
from publications import KINDS, Kind, refuse

from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.checkpoint.formats import _system as system

#: Fixtures that lie with what they are about.
__all__ = ["moto", "store"]

# Triton reads this once, as it is imported. Where there is no GPU, its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell has what it runs in the background ignore these, and so would the programs that tests interrupt.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real checkpoints and published vectors; skips where there is none."""
    folder = Path(os.environ.get("NOISYTUNE_DATA") or _ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real checkpoints here (NOISYTUNE_DATA names their folder)")
    return folder


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


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Checkpoint]:
    """An open checkpoint of one file."""
    with open_checkpoint(str(save(tmp_path / "in/model.safetensors", {"w": weights("F32", 8)}))) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Checkpoint]:
    """An open checkpoint that is a folder."""
    save(tmp_path / "in/model.safetensors", {"w": weights("F32", 8)})
    with open_checkpoint(str(tmp_path / "in")) as opened:
        yield opened


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sharded model's folder, with a first shard of some size, a config, a file and one in a folder."""
    root = tmp_path / "model"
    save_sharded(root, {"a.weight": weights("F32", 400, 500)}, {"b.weight": weights("BF16", 64, 48)})
    (root / "config.json").write_text('{"model_type": "x"}')
    (root / "tokenizer.json").write_text("{}")
    (root / "sub").mkdir()
    (root / "sub/notes é #1.txt").write_text("notes")
    return root


@pytest.fixture
def open_files(tmp_path: Path) -> Callable[[], int]:
    """What counts the files open below the test's folder, whatever other tests have left to be collected."""

    def count() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # of the listing itself
                found += os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
        return found

    return count


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made, of which none may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
