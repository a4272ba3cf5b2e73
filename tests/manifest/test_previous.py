"""What a manifest that lies with a source says of the weights; what merely has its name says nothing."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from checkpoints import save, weights
from runs import run

from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.commands.average import average
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.errors import InputInvalid

W = {"w": weights("F32", 99)}
NAMESAKE = "it has the name of a manifest of noisytune, and is none"


def clean(folder: Path) -> Path:
    save(folder / "model.safetensors", W)
    return folder


def elsewhere(source: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=source.parent)) / "out"


def refused(source: Path) -> str:
    """Return the line that refuses a source unless it is told --again, of which inspect warns."""
    with pytest.raises(InputInvalid) as caught:
        run(source, elsewhere(source))
    assert "pass --again" in caught.value.line().lower()
    told = inspect(str(source)).earlier
    assert told.startswith(caught.value.what)
    assert told.endswith("perturb needs --again")
    assert run(source, elsewhere(source), again=True).output.exists()
    return caught.value.line()


def taken(source: Path) -> tuple[str, ...]:
    """Return the warnings about a source that is taken as it is."""
    assert run(source, elsewhere(source)).output.exists()
    return inspect(str(source)).warnings


def test_a_folder_that_was_noised(tmp_path: Path) -> None:
    noisy = run(clean(tmp_path / "in"), tmp_path / "noisy").output
    assert "the source was noised before" in refused(noisy)


def test_a_file_that_was_noised(tmp_path: Path) -> None:
    noisy = run(save(tmp_path / "in.safetensors", W), tmp_path / "noisy.safetensors").output
    assert "its manifest noisy.safetensors.noisytune.json says so" in refused(noisy)
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (noisy, Path(f"{noisy}.noisytune.json")):
        path.rename(folder / path.name)
    assert "the source was noised before" in refused(folder)


def test_a_file_whose_name_leaves_no_room_for_a_manifests(tmp_path: Path) -> None:
    assert taken(save(tmp_path / f"{'x' * 243}.safetensors", W)) == ()


def test_a_file_in_a_folder_that_was_noised_and_one_that_was_put_there(tmp_path: Path) -> None:
    noisy = run(clean(tmp_path / "in"), tmp_path / "noisy").output
    assert "its manifest noisytune.json says so" in refused(noisy / "model.safetensors")
    assert taken(save(noisy / "clean.safetensors", W)) == ()


def test_an_average_says_of_what(tmp_path: Path) -> None:
    members = [str(clean(tmp_path / name)) for name in ("a", "b")]
    average(members, str(tmp_path / "mean"))
    line = refused(tmp_path / "mean")
    assert "the source is an average" in line
    assert "the mean of a, b, and does not say whether these were noised. Pass --again" in line


def test_an_unrelated_file_is_left_out_with_the_reason(tmp_path: Path) -> None:
    source = clean(tmp_path / "in")
    (source / "noisytune.json").write_text('{"my": "settings"}')
    assert taken(source) == (f"noisytune.json is left out: {NAMESAKE}",)
    with open_checkpoint(str(source)) as opened:
        assert opened.left_out == (("noisytune.json", NAMESAKE),)
    assert taken(source / "model.safetensors") == ()


def test_a_recipe_in_the_folder_is_about_another_file(tmp_path: Path) -> None:
    noisy = run(save(tmp_path / "other.safetensors", W), tmp_path / "noisy.safetensors").output
    source = clean(tmp_path / "in")
    shutil.copy(f"{noisy}.noisytune.json", source)
    assert taken(source) == ()


@pytest.mark.parametrize(
    "change", ["cut", "newer", "reformatted and cut", "sorted", "with a byte order mark"]
)
def test_a_manifest_that_cannot_be_used_may_be_that_of_noise(change: str, tmp_path: Path) -> None:
    noisy = run(clean(tmp_path / "in"), tmp_path / "noisy").output
    path = noisy / "noisytune.json"
    text = path.read_text()
    path.write_text(
        {
            "cut": text[:-20],
            "newer": text.replace('"schema": 1', '"schema": 7'),
            "reformatted and cut": json.dumps(json.loads(text), indent=4)[:-9],
            "sorted": json.dumps(json.loads(text), indent=2, sort_keys=True),
            "with a byte order mark": f"\ufeff{text}",
        }[change]
    )
    line = refused(noisy)
    assert re.search(r"may have been noised before.*its manifest noisytune\.json cannot be used \(", line)


def test_a_name_is_escaped_once(tmp_path: Path) -> None:
    source = save(tmp_path / "a\x1bb.safetensors", {"w": weights("F32", 9)})
    (tmp_path / "a\x1bb.safetensors.noisytune.json").write_bytes(
        b'{"schema": 1, "tool": {"name": "noisytune"}}'
    )
    assert r"its manifest a\x1bb.safetensors.noisytune.json cannot be used" in refused(source)
