"""replay: the very bytes that perturb wrote, or nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, save_sharded, weights
from hub_server import Repository, serve
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid, Mismatch, OutputUnsafe, ResourceExhausted, UsageError
from noisytune_cli.records import NoiseSpec
from tests.commands.test_verify import TENSORS, edit, make


def tree(root: Path) -> dict[str, bytes]:
    """Every file under a folder, by name."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("pristine"))


@pytest.mark.parametrize("kind", ["folder", "sharded"])
@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_a_folder_comes_back_byte_for_byte(kind: str, distribution: str, scope: Any, tmp_path: Path) -> None:
    noise = NoiseSpec(seed=9, distribution=distribution, scope=scope, exclude=("one",))
    base, out = make(tmp_path, noise, kind)
    for i, options in enumerate(({"threads": 1}, {"threads": 5}, {"mmap": True})):
        again = tmp_path / f"again-{i}"
        replay(str(out / "noisytune.json"), str(again), base=str(base), **options)
        assert tree(again) == tree(out)


def test_a_file_comes_back_from_a_renamed_base(tmp_path: Path) -> None:
    base, out = make(tmp_path, kind="file")
    recipe = (tmp_path / "out.safetensors.noisytune.json").rename(tmp_path / "recipe.json")
    base = base.rename(tmp_path / "renamed")
    result = replay(str(recipe), f"{tmp_path}/again/", base=str(base))
    assert result.output == tmp_path / "again" / "renamed"
    assert result.output.read_bytes() == out.read_bytes()
    assert (tmp_path / "again" / "renamed.noisytune.json").read_bytes() == recipe.read_bytes()
    assert verify(str(result.output), base=str(base)).ok


def test_nothing_is_measured(
    pristine: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("noisytune_cli.noise.devices.cpu.Cpu.moments", pytest.fail)
    replay(str(pristine[1] / "noisytune.json"), str(tmp_path / "out"), base=str(pristine[0]))


def refused(manifest: Path, base: Path, tmp_path: Path) -> str:
    """Return the line with which a replay is refused as a mismatch, with nothing left behind."""
    place = tmp_path / "place"
    with pytest.raises(Mismatch) as caught:
        replay(str(manifest), str(place / "out"), base=str(base))
    assert not place.exists()
    return caught.value.line()


def test_another_base_is_refused_before_weights_are_read(
    pristine: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(TENSORS)
    parts = [{n: TENSORS[n] for n in part} for part in (names[:6], names[6:])]
    parts[0]["F64"] = weights("F64", 40, 10)
    base = save_sharded(tmp_path / "base", *parts)
    shutil.copytree(pristine[0] / "sub", base / "sub")
    monkeypatch.setattr("noisytune_cli.engine.walk.Walk.carry_out", pytest.fail)
    line = refused(pristine[1] / "noisytune.json", base, tmp_path)
    assert "the base is not the one in the manifest" in line
    assert '"F64"' in line
    assert "model-00001-of-00002.safetensors" in line


def test_one_flipped_bit_in_the_base_is_refused(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(pristine[0], tmp_path / "base"))
    for path in sorted(p for p in base.rglob("*") if p.is_file()):
        content = path.read_bytes()
        changed = bytearray(content)
        changed[-3] ^= 1
        path.write_bytes(changed)
        with pytest.raises((Mismatch, InputInvalid)):  # the index is checked when it is opened
            replay(str(pristine[1] / "noisytune.json"), str(tmp_path / "out"), base=str(base))
        path.write_bytes(content)
        assert not (tmp_path / "out").exists()


def test_a_base_without_a_recorded_file_is_refused(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(pristine[0], tmp_path / "base"))
    os.remove(base / "sub" / "tokenizer.json")
    assert "sub/tokenizer.json: it is absent" in refused(pristine[1] / "noisytune.json", base, tmp_path)
    os.remove(base / "model.safetensors.index.json")
    assert "index.json: it is absent" in refused(pristine[1] / "noisytune.json", base, tmp_path)


def test_a_file_is_no_base_for_a_folder(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", TENSORS)
    assert "it is absent" in refused(pristine[1] / "noisytune.json", base, tmp_path)


@pytest.mark.parametrize("change", [{"digest": "blake3:" + "0" * 64}, {"stream": "BF16"}, {"unchanged": 3}])
def test_output_that_is_not_as_recorded_is_not_published(
    change: dict[str, Any], pristine: tuple[Path, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(pristine[1], tmp_path / "out"))
    edit(out, lambda document: document["tensors"][0].update(change))
    assert 'tensor "F32"' in refused(out / "noisytune.json", pristine[0], tmp_path)


def test_a_reformatted_manifest_is_refused(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(json.loads((pristine[1] / "noisytune.json").read_text())))
    assert "not as noisytune wrote it" in refused(recipe, pristine[0], tmp_path)


def test_existing_output_stays_unless_it_may_be_replaced(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    base, made = pristine
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputUnsafe, match="did not write"):
            replay(str(made / "noisytune.json"), str(out), base=str(base), overwrite=overwrite)
        assert tree(out) == {"mine": b"x"}
    with pytest.raises(OutputUnsafe):
        replay(str(made / "noisytune.json"), str(base / "inside"), base=str(base), overwrite=True)
    shutil.rmtree(out)
    shutil.copytree(made, out)
    (out / "sub/tokenizer.json").write_text("changed")
    with pytest.raises(OutputUnsafe, match="not as its manifest records it"):
        replay(str(made / "noisytune.json"), str(out), base=str(base), overwrite=True)
    replay(str(made / "noisytune.json"), str(out), base=str(base), overwrite_changed=True)
    assert tree(out) == tree(made)


def test_without_a_base_the_manifest_must_name_a_commit(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--base is missing"):
        replay(str(pristine[1] / "noisytune.json"), str(tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub with one sharded model, owner/model, which huggingface_hub asks."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    source = save_sharded(tmp_path / "in", {"a": weights("F32", 9)}, {"b": weights("F16", 5)})
    (source / "config.json").write_text("{}")
    with serve(owner__model=Repository(tree(source))) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield
        close_session()


@pytest.mark.usefixtures("hub")
def test_without_a_base_the_recorded_commit_is_fetched(tmp_path: Path) -> None:
    made = perturb(Request("owner/model", NoiseSpec()), str(tmp_path / "out"))
    assert made.manifest.source.revision == Repository({}).commit
    for name, base in (("none", None), ("same", "owner/model")):
        replay(str(made.manifest_path), str(tmp_path / name), base=base)
        assert tree(tmp_path / name) == tree(made.output)
    assert verify(str(made.output), base="owner/model").ok
    (tmp_path / "owner" / "model").mkdir(parents=True)
    with pytest.raises(UsageError, match="has the name of the hub id"):
        replay(str(made.manifest_path), str(tmp_path / "x"))


def test_the_command(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    base, made = pristine
    arguments = ["replay", str(made / "noisytune.json"), "--base", str(base), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith(f"rebuilt {len(TENSORS)} tensors exactly as recorded: ")
    assert tree(tmp_path / "out") == tree(made)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 5
    result = CliRunner().invoke(app, [*arguments, "--overwrite", "--quiet"])
    assert (result.exit_code, result.stderr) == (0, "")


def test_the_result_as_json(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    base, output = pristine
    out = tmp_path / "again"
    ended = CliRunner().invoke(
        app, ["replay", str(output), "--base", str(base), "-o", str(out), "--json", "--quiet"]
    )
    assert ended.exit_code == 0, ended.output
    document = json.loads(ended.stdout)
    recorded = json.loads((output / "noisytune.json").read_text())
    assert document == {
        "output": str(out),
        "manifest": str(out / "noisytune.json"),
        "source": {"id": recorded["source"]["id"], "revision": recorded["source"]["revision"]},
        "tensors": len(recorded["tensors"]),
    }
    assert tree(out) == tree(output)


def test_a_limit_on_open_files_is_met_before_anything_is_written(
    pristine: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, output = pristine
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, 32))
    with pytest.raises(ResourceExhausted, match="too many open files"):
        replay(str(output), str(tmp_path / "out"), base=str(base))
    assert not (tmp_path / "out").exists()
