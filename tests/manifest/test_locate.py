"""An output is found from its manifest's path, and a manifest from its output's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save

from noisytune_cli.commands import replay as command
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid, InputUnreadable, OutputUnsafe, ResourceExhausted
from noisytune_cli.output import publish
from noisytune_cli.records import NoiseSpec
from tests.commands.test_replay import tree
from tests.commands.test_verify import TENSORS, make


def test_a_folder_is_found_from_its_manifest_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = make(tmp_path)
    assert verify(str(out / "noisytune.json"), base=str(base)).output == out
    monkeypatch.chdir(out)
    assert verify("noisytune.json").ok
    replay(str(out), str(tmp_path / "again"), base=str(base))
    assert tree(tmp_path / "again") == tree(out)


def test_a_file_is_found_from_its_manifest_and_the_other_way_round(tmp_path: Path) -> None:
    base, out = make(tmp_path, kind="file")
    verified = verify(f"{out}.noisytune.json", base=str(base))
    assert verified.ok
    assert verified.output == out
    again = replay(str(out), str(tmp_path / "again.safetensors"), base=str(base)).output
    assert again.read_bytes() == out.read_bytes()


def test_a_file_that_has_a_manifest_is_an_output_whatever_its_name(tmp_path: Path) -> None:
    base = save(tmp_path / "base", TENSORS)
    out = tmp_path / "odd.noisytune.json"
    perturb(Request(str(base), NoiseSpec()), str(out))
    assert verify(str(out)).output == out
    assert replay(str(out), str(tmp_path / "again"), base=str(base)).output.read_bytes() == out.read_bytes()


def test_a_manifest_named_after_a_folder_is_what_the_folder_is_held_against(tmp_path: Path) -> None:
    _, out = make(tmp_path)
    (out / "noisytune.json").rename(tmp_path / "out.noisytune.json")
    assert verify(str(tmp_path / "out.noisytune.json")).output == out


def test_a_recipe_alone_says_that_replay_makes_the_output(tmp_path: Path) -> None:
    _, out = make(tmp_path, kind="file")
    out.unlink()
    with pytest.raises(InputUnreadable, match=r"out\.safetensors: its manifest is there.*replay"):
        verify(f"{out}.noisytune.json")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_recipe_alone_is_completed_where_it_lies(overwrite: bool, tmp_path: Path) -> None:
    base, out = make(tmp_path, kind="file")
    content, inode = out.read_bytes(), Path(f"{out}.noisytune.json").stat().st_ino
    out.unlink()
    done = replay(f"{out}.noisytune.json", str(out), base=str(base), overwrite=overwrite)
    assert (done.output.read_bytes(), done.manifest_path.stat().st_ino) == (content, inode)
    assert verify(str(out)).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [base.name, out.name, f"{out.name}.noisytune.json"]
    )
    with pytest.raises(OutputUnsafe, match="exists"):
        replay(f"{out}.noisytune.json", str(out), base=str(base))


def test_a_recipe_may_have_any_name(tmp_path: Path) -> None:
    base, out = make(tmp_path, kind="file")
    recipe = tmp_path / "rec-l0.15"
    perturb(Request(str(base), NoiseSpec()), str(recipe), recipe_only=True)
    replay(str(recipe), str(tmp_path / "again.safetensors"), base=str(base))
    assert (tmp_path / "again.safetensors").stat().st_size == out.stat().st_size
    with pytest.raises(InputUnreadable, match="no manifest"):
        replay(str(base), str(tmp_path / "other.safetensors"), base=str(base))


def test_a_recipe_outlives_a_replay_that_fails_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = make(tmp_path, kind="file")
    out.unlink()
    before = tree(tmp_path)

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(publish, "sync_directory", fail)
    for overwrite in (False, True):
        with pytest.raises(ResourceExhausted, match="nothing was published"):
            replay(f"{out}.noisytune.json", str(out), base=str(base), overwrite=overwrite)
        assert tree(tmp_path) == before


def test_a_recipe_alone_is_not_completed_from_another(tmp_path: Path) -> None:
    base, out = make(tmp_path, kind="file")
    recipe = shutil.copy(f"{out}.noisytune.json", tmp_path / "recipe.json")
    out.unlink()
    with pytest.raises(OutputUnsafe, match="exists"):
        replay(str(recipe), str(out), base=str(base))
    Path(f"{out}.noisytune.json").unlink()
    Path(f"{out}.noisytune.json").symlink_to(recipe)
    with pytest.raises(OutputUnsafe, match="exists"):
        replay(str(recipe), str(out), base=str(base))


def test_a_recipe_that_changes_meanwhile_is_not_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = make(tmp_path, kind="file")
    out.unlink()
    recipe = Path(f"{out}.noisytune.json")

    def fill(*arguments: Any, **options: Any) -> Any:
        recipe.write_text("{}")
        return real(*arguments, **options)

    real = command.fill
    monkeypatch.setattr(command, "fill", fill)
    with pytest.raises(OutputUnsafe, match="exists"):
        replay(str(recipe), str(out), base=str(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == [base.name, recipe.name]


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_file_of_a_folder_is_told_to_name_the_folder(name: str, tmp_path: Path) -> None:
    _, out = make(tmp_path)
    line = f"no manifest of its own: {out}/.* Name the whole output: {out}"
    with pytest.raises(InputUnreadable, match=line):
        verify(str(out / name))
    with pytest.raises(InputUnreadable, match=line):
        replay(str(out / name), str(tmp_path / "again"))


def test_a_manifest_of_another_name_belongs_to_no_output(tmp_path: Path) -> None:
    _, out = make(tmp_path)
    recipe = shutil.copy(out / "noisytune.json", tmp_path / "recipe.json")
    with pytest.raises(InputInvalid, match="cannot tell which output"):
        verify(str(recipe))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_without_its_manifest_is_told_so(kind: str, tmp_path: Path) -> None:
    base, out = make(tmp_path, kind=kind)
    manifest = out / "noisytune.json" if kind == "folder" else Path(f"{out}.noisytune.json")
    manifest.unlink()
    with pytest.raises(InputUnreadable, match=f"no manifest: {manifest}"):
        replay(str(out), str(tmp_path / "again"), base=str(base))
    with pytest.raises(InputUnreadable, match=f"no manifest: {manifest}"):
        verify(str(out))
