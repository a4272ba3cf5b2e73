"""What --overwrite replaces, and what it does not."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
from checkpoints import save, weights
from places import accepted, old_output, refused

from noisytune_cli import staging
from noisytune_cli.checkpoint import Checkpoint
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.verify import verify
from noisytune_cli.records import NoiseSpec


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_noisytune_did_not_write_is_not_replaced(
    folder: Checkpoint, tmp_path: Path, overwrite: bool
) -> None:
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    for name in ("thesis.txt", "model.safetensors", "a", "z"):
        (mine / name).touch()
    line = refused(mine, folder, overwrite=overwrite)
    assert "no manifest of noisytune, and with it would go a, model.safetensors, sub and 2 more" in line
    assert "--overwrite" not in line
    (mine / "noisytune.json").symlink_to("a")
    assert "no manifest" in refused(mine, folder, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_recipe_in_a_folder_of_other_things_does_not_make_it_an_output(
    folder: Checkpoint, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/noisytune.json").write_text("{}")
    assert accepted(tmp_path / "mine", folder, overwrite=True)
    assert "--overwrite" in refused(tmp_path / "mine", folder)
    (tmp_path / "mine/thesis.txt").touch()
    assert "recipe, without weights, and with it would go thesis.txt" in refused(
        tmp_path / "mine", folder, overwrite=overwrite
    )


@pytest.mark.parametrize("weights", ["model.safetensors", "2_Dense/pytorch_model.bin", "__0_0.distcp"])
def test_a_folder_that_noisytune_wrote_is_replaced(weights: str, folder: Checkpoint, tmp_path: Path) -> None:
    old = old_output(tmp_path / "old", "config.json", "sub/stray", weights=weights)
    assert accepted(old, folder, overwrite=True) == old


def test_what_a_killed_run_left_may_be_replaced(folder: Checkpoint, file: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    stage, lock = staging.create(output, output)
    for name in ("config.json", "noisytune.json"):
        (stage / name).touch()
    staging.announce_moves(stage, ["config.json"], manifest="noisytune.json")
    os.rename(stage / "config.json", output / "config.json")
    os.close(lock)
    for overwrite in (False, True):
        assert accepted(output, folder, overwrite=overwrite) == output
    (output / "thesis.txt").touch()
    assert "with it would go thesis.txt" in refused(output, folder, overwrite=True)
    stage, lock = staging.create(tmp_path, tmp_path / "single")
    (stage / "single").write_text("whole, but not yet with its manifest")
    (stage / "single.noisytune.json").touch()
    staging.announce_moves(stage, ["single"], manifest="single.noisytune.json")
    os.rename(stage / "single", tmp_path / "single")
    os.close(lock)
    for overwrite in (False, True):
        assert accepted(tmp_path / "single", file, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_holds_no_weights_is_not_replaced(
    file: Checkpoint, tmp_path: Path, overwrite: bool
) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("It was a dark and stormy night.")
    line = refused(thesis, file, overwrite=overwrite)
    assert "it holds no weights, and there is no manifest" in line
    assert "--overwrite" not in line
    (tmp_path / "thesis.txt.noisytune.json").write_text("{}")  # an output that was damaged since
    assert accepted(thesis, file, overwrite=True)


def test_weights_are_replaced_without_a_manifest(file: Checkpoint, tmp_path: Path) -> None:
    save(tmp_path / "old.safetensors", {"w": weights("F32", 8)})
    (tmp_path / "legacy.pt").write_bytes(pickle.dumps({}, 2))
    with zipfile.ZipFile(tmp_path / "new.pt", "w") as archive:
        archive.writestr("data.pkl", b"")
    (tmp_path / "empty").touch()
    for name in ("old.safetensors", "legacy.pt", "new.pt", "empty"):
        assert "--overwrite" in refused(tmp_path / name, file)
        assert accepted(tmp_path / name, file, overwrite=True)


@pytest.mark.parametrize("name", ["replaced", "fsync", "out"])
def test_a_file_of_any_name_is_replaced(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 9)})
    out = tmp_path / "out" / name
    for seed in (0, 1):
        perturb(Request(str(source), NoiseSpec(seed=seed)), str(out), overwrite=True)
    assert verify(str(out)).ok
    assert sorted(os.listdir(out.parent)) == [name, f"{name}.noisytune.json"]
