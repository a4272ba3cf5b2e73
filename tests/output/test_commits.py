"""Several outputs committed in turn, while a system call fails or the process is killed at every step."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from publications import files, refuse

from noisytune_cli.checkpoint.formats import _system as system
from noisytune_cli.output.commits import all_staged, commit_all
from noisytune_cli.output.publish import Publication, copy_file, write_file
from tests.output.test_publish_faults import Fault, failure

NAMES = ("one", "two", "three")


def publish(root: Path, names: tuple[str, ...] = NAMES) -> None:
    """Write folders of one weight file, all below a folder that is missing at first."""
    source = root.with_name(f"{root.name}-source")
    source.write_bytes(b"weights")
    publications = [Publication(root / "deep" / name, directory=True, overwrite=False) for name in names]
    with all_staged(publications):
        copy_file(source, "model.safetensors", publications)
        write_file(b"{}", "config.json", publications)
        for publication in publications:
            publication.seal(b"manifest")
        commit_all(publications)


def whole(*names: str) -> dict[str, bytes]:
    each = {"model.safetensors": b"weights", "config.json": b"{}", "noisytune.json": b"manifest"}
    return {f"deep/{name}/{file}": content for name in names for file, content in each.items()}


def test_undisturbed_all_are_there(file_system: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    publish(tmp_path / "root")
    assert files(tmp_path / "root") == whole(*NAMES)


def test_a_failure_at_any_step_leaves_whole_outputs_and_tells_which(
    file_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    published = set()
    for step in count(1):
        root = tmp_path / str(step)
        root.mkdir()
        fault = Fault(step)
        with fault.installed():
            why = failure(lambda root=root: publish(root))
        found = files(root)
        there = [name for name in NAMES if f"deep/{name}/noisytune.json" in found]
        assert found == whole(*there), f"call {step}"
        published.add(len(there))
        if why is None:
            assert there == list(NAMES)
        elif there:
            verb, rest = "is" if len(there) == 1 else "are", NAMES[len(there) :]
            left = f"{', '.join(rest)} {'is' if len(rest) == 1 else 'are'} not"
            assert f"{', '.join(there)} {verb} published, {left}" in why
        else:
            assert "nothing was published" in why
            assert os.listdir(root) == [], f"call {step}"
        if fault.calls < step:
            break
    assert published == {0, 1, 2, 3}


def kill_at_any_step(root: Path, flags: bool) -> None:
    """Kill runs at every step; what is there must be whole, and the rest can be made again."""
    os.fsync = lambda fd: None
    if not flags:
        system.rename_without_replacing = system.exchange = refuse
    seen = set()
    for step in count(1):
        place = root / str(step)
        place.mkdir()
        child = os.fork()
        if child == 0:
            with Fault(step, action=lambda: os._exit(9)).installed():
                publish(place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left = {name: content for name, content in files(place).items() if ".noisytune-" not in name}
        there = tuple(name for name in NAMES if f"deep/{name}/noisytune.json" in left)
        assert left == whole(*there), f"call {step}"
        seen.add(len(there))
        if rest := NAMES[len(there) :]:
            publish(place, rest)
        leftovers = [name for name in os.listdir(place / "deep") if name.startswith(".noisytune-")]
        assert leftovers == [], f"call {step}"
        assert files(place) == whole(*NAMES), f"call {step}"
        if status == 0:
            break
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("flags", [True, False], ids=["renameat2", "no flags"])
def test_a_run_killed_at_any_step_can_be_repeated(flags: bool, tmp_path: Path) -> None:
    # In a process of its own, which has one thread and so may fork.
    script = (
        "import pathlib, sys, test_commits as test\n"
        f"test.kill_at_any_step(pathlib.Path(sys.argv[1]), {flags})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
