"""Where output may go: how OUT is read, and what is refused before a weight is read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from checkpoints import save, weights
from places import accepted, old_output, refused

from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.errors import OutputUnsafe, ResourceExhausted
from noisytune_cli.output import destination as output_module
from noisytune_cli.output.destination import check_recipe, resolve_output, resolve_recipe
from noisytune_cli.output.space import check_space


def test_a_file_goes_where_it_is_told(file: Checkpoint, tmp_path: Path) -> None:
    assert accepted(tmp_path / "out.safetensors", file) == tmp_path / "out.safetensors"
    assert accepted(f"{tmp_path}/new/", file) == tmp_path / "new/model.safetensors"
    assert accepted(f"{tmp_path}/a/b/../c.safetensors", file) == tmp_path / "a/c.safetensors"


def test_a_folder_goes_where_it_is_told(folder: Checkpoint, tmp_path: Path) -> None:
    assert accepted(tmp_path / "out", folder) == tmp_path / "out"
    assert accepted(f"{tmp_path}/out/", folder) == tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert accepted(tmp_path / "empty", folder) == tmp_path / "empty"


def test_relative_names_and_home(folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert accepted("out", folder) == tmp_path / "out"
    assert accepted("in/../out", folder) == tmp_path / "out"
    assert accepted("~/out", folder) == tmp_path / "home/out"


def test_an_empty_current_folder_may_be_filled(
    folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert accepted(".", folder) == tmp_path / "here"


def test_links_in_the_way_are_resolved(folder: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    assert accepted(tmp_path / "link/out", folder) == tmp_path / "real/deep/out"
    assert accepted(f"{tmp_path}/link/../out", folder) == tmp_path / "real/out"


def test_a_removed_current_folder(
    folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ResourceExhausted):
        resolve_output("out", folder)
    assert accepted(tmp_path / "old", folder, overwrite=True) == tmp_path / "old"


def test_without_a_home(folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module.os.path, "expanduser", lambda path: path)
    (tmp_path / "old").mkdir()
    assert accepted(tmp_path / "old", folder, overwrite=True) == tmp_path / "old"


def test_what_exists_is_refused(file: Checkpoint, folder: Checkpoint, tmp_path: Path) -> None:
    old_output(tmp_path / "full")
    (tmp_path / "there").touch()
    (tmp_path / "new.noisytune.json").touch()
    assert "--overwrite" in refused(tmp_path / "full", folder)
    assert "--overwrite" in refused(tmp_path / "there", file)
    assert "new.noisytune.json" in refused(tmp_path / "new", file)
    assert "directory" in refused(tmp_path / "full", file)
    assert accepted(tmp_path / "full", folder, overwrite=True)
    assert accepted(tmp_path / "there", file, overwrite=True)
    assert accepted(tmp_path / "new", file, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_file_or_folder_is_refused(
    file: Checkpoint, folder: Checkpoint, tmp_path: Path, overwrite: bool
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.noisytune.json").mkdir()
    for source in (file, folder):
        assert "neither a regular file nor a directory" in refused(
            tmp_path / "fifo", source, overwrite=overwrite
        )
        assert "symbolic link" in refused(tmp_path / "link", source, overwrite=overwrite)
        assert refused("/dev/null", source, overwrite=overwrite)
    assert "directory" in refused(tmp_path / "folder", file, overwrite=overwrite)
    assert "manifest" in refused(tmp_path / "x", file, overwrite=overwrite)
    assert refused("/", folder, overwrite=overwrite)
    assert stat.S_ISFIFO((tmp_path / "fifo").lstat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_does_not_replace_a_file(folder: Checkpoint, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "there").touch()
    line = refused(tmp_path / "there", folder, overwrite=overwrite)
    assert "it is a file" in line
    assert "--overwrite" not in line


def test_overwriting_is_not_advised_where_it_is_refused(
    file: Checkpoint, folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_output(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [refused("in/model.safetensors", file)]
    lines += [refused(out, folder) for out in ("in", ".", "..", "in/model.safetensors")]
    with pytest.raises(OutputUnsafe) as caught:
        check_recipe(resolve_recipe("in/model.safetensors"), file, overwrite=False)
    lines.append(str(caught.value))
    assert [line for line in lines if "--overwrite" in line] == []
    assert "the input lies in it" in lines[2] or "the current directory lies in it" in lines[2]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_input_is_refused_however_it_is_spelt(
    file: Checkpoint, folder: Checkpoint, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "alias").symlink_to("in")
    os.link(tmp_path / "in/model.safetensors", tmp_path / "hard.safetensors")
    for out in ("in/model.safetensors", "alias/model.safetensors", "in/../in/model.safetensors"):
        refused(tmp_path / out, file, overwrite=overwrite)
    refused(tmp_path / "hard.safetensors", file, overwrite=overwrite)
    for out in ("in", "in/", "in/sub", "in/a/b/c", "alias/sub", "in/../in/x"):
        refused(f"{tmp_path}/{out}", folder, overwrite=overwrite)


def test_an_output_that_holds_the_input_is_refused(folder: Checkpoint, tmp_path: Path) -> None:
    assert "lies in it" in refused(tmp_path, folder, overwrite=True)


def test_the_current_and_the_home_folder_are_not_replaced(
    folder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("work/here", "people/home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work/here")
    monkeypatch.setenv("HOME", str(tmp_path / "people/home"))
    for out in ("work", "work/here", "people", "people/home"):
        assert "lies in it" in refused(tmp_path / out, folder, overwrite=True)


def test_a_mount_point_is_not_replaced(folder: Checkpoint) -> None:
    assert "mount point" in refused("/proc", folder, overwrite=True)


def test_the_hubs_cache_is_refused(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    blob = save(repository / "blobs/abc", {"w": weights("F32", 8)})
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    with open_checkpoint(str(snapshot / "model.safetensors")) as source:
        refused(snapshot / "noisy.safetensors", source)
        refused(repository / "blobs/noisy", source)
        refused(blob, source, overwrite=True)
    with open_checkpoint(str(snapshot)) as source:
        refused(repository / "snapshots/noisy", source)
        refused(repository / "noisy", source)
        assert accepted(tmp_path / "noisy", source)


def test_space_is_asked_of_the_file_system(tmp_path: Path) -> None:
    check_space([tmp_path / "a/b/c"], 1, 1)
    with pytest.raises(ResourceExhausted, match=r"bytes and .* are free; nothing was written"):
        check_space([tmp_path / "a/b/c"], 1 << 62, 1)


def test_inodes_are_asked_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize, f_files, f_favail = 1 << 30, 4096, 100, 2

    monkeypatch.setattr(output_module.os, "statvfs", lambda path: Full)
    check_space([tmp_path], 1, 2)
    with pytest.raises(ResourceExhausted, match="3 files and 2 more"):
        check_space([tmp_path], 1, 3)
    monkeypatch.setattr(Full, "f_files", 0)  # a file system without a count of its inodes
    check_space([tmp_path], 1, 3)
