"""An output is found from its manifest's path, and a manifest from its output's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoints import save
from test_replay import tree
from test_verify import TENSORS, make

from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid, InputUnreadable
from noisytune_cli.records import NoiseSpec


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
