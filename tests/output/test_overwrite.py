"""What --overwrite replaces, and what it does not."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import save, save_sharded, weights
from chunked import save_chunked
from places import accepted, old_manifest, old_output, refused
from typer.testing import CliRunner

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.cli.app import app
from noisytune_cli.commands.average import average
from noisytune_cli.commands.perturb import Request, perturb, plan_perturb
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import OutputUnsafe
from noisytune_cli.output import staging
from noisytune_cli.output.destination import check_recipe
from noisytune_cli.records import Combination, Conversion, NoiseSpec


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
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "noisytune.json").write_bytes(old_manifest("model.safetensors"))
    assert accepted(mine, folder, overwrite=True)
    assert "--overwrite" in refused(mine, folder)
    (mine / "tests").mkdir()
    (mine / "tests/f.pt").touch()  # weights, but none that it records
    assert "recipe, without weights, and with it would go tests" in refused(mine, folder, overwrite=overwrite)


@pytest.mark.parametrize("content", [b"hello", b"{}", b'{"schema": 1, "tool": {"name": "noisytune"'])
def test_what_merely_has_a_manifests_name_does_not_make_a_folder_an_output(
    content: bytes, folder: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/noisytune.json").write_bytes(content)
    assert "--overwrite" not in refused(tmp_path / "mine", folder)
    assert "remove it yourself" in refused(tmp_path / "mine", folder, overwrite=True)
    (tmp_path / "mine/firmware.bin").touch()
    line = refused(tmp_path / "mine", folder, overwrite=True)
    assert "its manifest cannot be used" in line
    assert "with it would go firmware.bin" in line


@pytest.mark.parametrize("weights", ["model.safetensors", "2_Dense/pytorch_model.bin", "__0_0.distcp"])
def test_a_folder_that_noisytune_wrote_is_replaced(weights: str, folder: Checkpoint, tmp_path: Path) -> None:
    old = old_output(tmp_path / "old", "config.json", "sub/deep/vocab", weights=weights)
    assert accepted(old, folder, overwrite=True) == old


def test_an_output_that_lost_files_is_replaced_as_long_as_it_has_weights(
    folder: Checkpoint, tmp_path: Path
) -> None:
    old = old_output(tmp_path / "old", "README.md", weights="a.safetensors")
    (old / "noisytune.json").write_bytes(old_manifest("a.safetensors", "b.safetensors", copied=["README.md"]))
    (old / "README.md").unlink()
    assert accepted(old, folder, overwrite=True) == old
    (old / "a.safetensors").rename(old / "b.safetensors")
    assert accepted(old, folder, overwrite=True) == old
    (old / "b.safetensors").unlink()
    (old / "README.md").touch()
    assert "with it would go README.md" in refused(old, folder, overwrite=True)


@pytest.mark.parametrize("kind", ["folder", "shards", "converted", "chunks", "average"])
def test_every_output_may_be_written_again(kind: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", str(tmp_path / "out")
    tensors = {"w": weights("F32", 9), "v": weights("F32", 5, seed=1)}
    if kind == "chunks":
        save_chunked(source, {(name,): torch.from_numpy(t.values) for name, t in tensors.items()})
    elif kind == "folder":
        save(source / "model.safetensors", tensors)
    else:
        save_sharded(source, {"w": tensors["w"]}, {"v": tensors["v"]})
    (source / "sub").mkdir()
    for name in ("README.md", "sub/tokenizer.json"):
        (source / name).write_text("{}")
    conversion = Conversion(dtype="F16") if kind == "converted" else None
    for _ in range(2):
        if kind == "average":
            average([str(source), str(source)], out, overwrite=True)
        else:
            perturb(Request(str(source), NoiseSpec(), conversion), out, overwrite=True)
    assert verify(out).ok
    added = "__7_0.distcp" if kind == "chunks" else "model-00009-of-00009.safetensors"
    (tmp_path / "out" / added).touch()
    with pytest.raises(OutputUnsafe, match=f"with it would go {added}"):
        perturb(Request(str(source), NoiseSpec(), conversion), out, overwrite=True)


def test_chunks_that_cannot_be_told_are_kept(folder: Checkpoint, tmp_path: Path) -> None:
    old = old_output(tmp_path / "old", weights=".metadata")
    (old / "__0_0.distcp").touch()
    assert "with it would go __0_0.distcp" in refused(old, folder, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_added_to_an_output_is_kept(folder: Checkpoint, tmp_path: Path, overwrite: bool) -> None:
    old = old_output(tmp_path / "old", "README.md", "sub/vocab")
    (old / "runs").mkdir()
    (old / "runs/log").touch()
    (old / "sub/mine").touch()
    (old / "sub/vocab").unlink()
    (old / "sub/vocab").mkdir()
    (old / "trainer_state.json").symlink_to("README.md")
    line = refused(old, folder, overwrite=overwrite)
    assert "with it would go runs, sub/mine, sub/vocab and 1 more. Move that elsewhere" in line
    assert "--overwrite" not in line


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path) -> None:
    source, out = save(tmp_path / "in/model.safetensors", {"w": weights("F32", 9)}).parent, tmp_path / "out"
    request, wanted = Request(str(source), NoiseSpec()), [Combination(0.15, 0, str(out))]
    for recipe_only in (False, True):
        plan_perturb(request, wanted, recipe_only=recipe_only)
    perturb(request, str(out))
    (out / "notes").touch()
    for recipe_only in (False, True):
        for overwrite in (False, True):
            with pytest.raises(OutputUnsafe, match="cannot replace"):
                plan_perturb(request, wanted, recipe_only=recipe_only, overwrite=overwrite)
    arguments = ["perturb", str(source), "-o", str(out), "--dry-run"]
    (out / "notes").unlink()
    assert CliRunner().invoke(app, arguments).exit_code == 5
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--overwrite", "--recipe-only"]).exit_code == 5


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
    assert "it holds no weights, and no manifest of noisytune beside it records it" in line
    assert "--overwrite" not in line
    beside = tmp_path / "thesis.txt.noisytune.json"
    beside.write_bytes(old_manifest("model.safetensors"))  # of another file: this one is larger
    assert "it holds no weights" in refused(thesis, file, overwrite=overwrite)
    thesis.write_bytes(b"0123456789")  # an output whose bytes were damaged since
    assert accepted(thesis, file, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [True, False])
def test_notes_with_a_manifests_name_are_not_replaced(
    file: Checkpoint, tmp_path: Path, there: bool, overwrite: bool
) -> None:
    notes = tmp_path / "out.noisytune.json"
    notes.write_text('{"title": "notes"}')
    if there:
        save(tmp_path / "out", {"w": weights("F32", 8)})
    line = refused(tmp_path / "out", file, overwrite=overwrite)
    assert f"{notes}: it has the name of the output's manifest, and is none" in line
    assert "--overwrite" not in line


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


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "model.safetensors", "config.json", "noisytune.json"])
def test_a_recipe_replaces_nothing_but_recipes(
    name: str, folder: Checkpoint, tmp_path: Path, overwrite: bool
) -> None:
    there = tmp_path / name
    there.write_text('{"schema": 1}')
    with pytest.raises(OutputUnsafe, match="it is no manifest") as caught:
        check_recipe(there, folder, overwrite=overwrite)
    assert "--overwrite" not in str(caught.value)
    for content in (b"", old_manifest("weights.safetensors")):
        there.write_bytes(content)
        check_recipe(there, folder, overwrite=True)
        with pytest.raises(OutputUnsafe, match="pass --overwrite"):
            check_recipe(there, folder, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_recipe_does_not_replace_the_manifest_of_an_output(
    folder: Checkpoint, tmp_path: Path, overwrite: bool
) -> None:
    old = old_output(tmp_path / "old")
    (tmp_path / "x.noisytune.json").write_bytes(old_manifest("x"))
    (tmp_path / "x").touch()
    for place, what in ((old / "noisytune.json", "model.safetensors"), (tmp_path / "x.noisytune.json", "x")):
        with pytest.raises(OutputUnsafe, match=f"lies with it: {what}") as caught:
            check_recipe(place, folder, overwrite=overwrite)
        assert "--overwrite" not in str(caught.value)
    (tmp_path / "x").unlink()
    (old / "model.safetensors").unlink()
    check_recipe(old / "noisytune.json", folder, overwrite=True)
    check_recipe(tmp_path / "x.noisytune.json", folder, overwrite=True)
    content = (old / "noisytune.json").read_bytes()
    (old / "noisytune.json").write_bytes(content[:-9])  # what it records might lie there
    with pytest.raises(OutputUnsafe, match="what it records cannot be told"):
        check_recipe(old / "noisytune.json", folder, overwrite=True)
