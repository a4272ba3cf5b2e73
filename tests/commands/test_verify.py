"""verify: nothing that was changed goes unseen, and nothing unchanged is blamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FLOATS, Tensor, numbers, save, save_sharded, weights
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.verify import Verified, verify
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch
from noisytune_cli.records import NoiseSpec

TENSORS = {
    **{dtype: weights(dtype, 40, 9, seed=i) for i, dtype in enumerate(FLOATS)},
    "constant": numbers("F32", 0.5, 0.5),
    "nan": numbers("F16", 1.0, np.nan),
    "one": numbers("F32", 2.0),
    "empty": Tensor("F32", np.empty((0, 4), "<f4")),
    "ids": Tensor("I64", np.arange(5)),
    "\x1b[2J": weights("F32", 9),
    "model.embed_tokens.weight": weights("F32", 8, 8, seed=5),
    "lm_head.weight": weights("F32", 8, 8, seed=5),
}


def make(tmp_path: Path, noise: NoiseSpec | None = None, kind: str = "sharded") -> tuple[Path, Path]:
    """Write a base and perturb it; return base and output."""
    names = list(TENSORS)
    if kind == "file":
        base = save(tmp_path / "base.safetensors", TENSORS)
    elif kind == "folder":
        base = save(tmp_path / "base" / "model.safetensors", TENSORS).parent
    else:
        base = save_sharded(
            tmp_path / "base", {n: TENSORS[n] for n in names[:6]}, {n: TENSORS[n] for n in names[6:]}
        )
    if base.is_dir():
        (base / "sub").mkdir()
        (base / "sub" / "tokenizer.json").write_text('{"a": 1}')
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    perturb(Request(str(base), noise or NoiseSpec()), str(out))
    return base, out


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def output(pristine: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of an output, to be damaged."""
    return Path(shutil.copytree(pristine[1], tmp_path / "out"))


def found(result: Verified) -> set[tuple[str, str | None]]:
    return {(d.file, d.tensor) for d in result.mismatches}


@pytest.mark.parametrize("kind", ["file", "folder", "sharded"])
@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_what_was_written_verifies(kind: str, distribution: str, scope: Any, tmp_path: Path) -> None:
    noise = NoiseSpec(seed=7, distribution=distribution, scope=scope, rules=(("F16", 0.3),))
    base, out = make(tmp_path, noise, kind)
    for options in ({}, {"threads": 3}, {"mmap": True}):
        assert verify(str(out), **options).ok
        assert verify(str(out), base=str(base), **options).ok
    done: list[int] = []
    result = verify(str(out), base=str(base), progress=lambda n: nullcontext(done.append))
    assert result.checked.tensors == len(TENSORS)
    assert result.checked.base
    assert sum(done) == 2 * sum(len(t.data) for t in TENSORS.values())
    assert result.warnings == ()


def test_a_renamed_file_verifies_against_a_renamed_base(tmp_path: Path) -> None:
    base, out = make(tmp_path, kind="file")
    moved = base.rename(tmp_path / "elsewhere.bin")
    renamed = out.rename(tmp_path / "renamed")
    (tmp_path / "out.safetensors.noisytune.json").rename(tmp_path / "renamed.noisytune.json")
    assert verify(str(renamed), base=str(moved)).ok


def flips(size: int, every: int = 1) -> list[tuple[int, int]]:
    """A bit to flip, as (byte, bit), in each byte or in one of `every`."""
    return [(at, 1 << (at // every % 8)) for at in range(0, size, every)]


def test_weights_of_a_name_that_is_not_printable_verify_against_their_base(tmp_path: Path) -> None:
    base = save(tmp_path / "base" / "my\u00a0model.safetensors", {"w": weights("F32", 9)}).parent
    perturb(Request(str(base), NoiseSpec()), str(tmp_path / "out"))
    assert verify(str(tmp_path / "out"), base=str(base)).ok


def test_a_flipped_bit_in_any_byte_is_found(tmp_path: Path) -> None:
    """Every byte of the weights, their headers, the index and a copied file of a small output."""
    base = save_sharded(
        tmp_path / "in", {"a": weights("F32", 6)}, {"b": weights("BF16", 9), "c": numbers("F16", 1)}
    )
    (base / "tokenizer.json").write_text('{"a": 1}')
    out = tmp_path / "out"
    perturb(Request(str(base), NoiseSpec()), str(out))
    files = sorted(path for path in out.iterdir() if path.name != "noisytune.json")
    assert len(files) == 4
    for path in files:
        content = path.read_bytes()
        for at, bit in flips(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            result = verify(str(out), threads=1)
            assert {d.file for d in result.mismatches} == {path.name}, (path.name, at)
        path.write_bytes(content)
    assert verify(str(out)).ok


@pytest.mark.parametrize(
    "change", [lambda content: content[:-1], lambda content: content + b"x", lambda content: b""]
)
def test_a_file_of_another_length_is_found(change: Callable[[bytes], bytes], output: Path) -> None:
    for path in sorted(p for p in output.rglob("*") if p.is_file() and p.name != "noisytune.json"):
        content = path.read_bytes()
        path.write_bytes(change(content))
        assert path.relative_to(output).as_posix() in {d.file for d in verify(str(output)).mismatches}
        path.write_bytes(content)


#: What the manifest says that no byte of the output or the base can bear out: it is on record, not checked.
UNCHECKED = {"version", "id", "revision", "lambda", "rules", "include", "exclude", "left_out"}


def test_every_changed_byte_of_the_manifest_is_found(pristine: tuple[Path, Path], output: Path) -> None:
    manifest = output / "noisytune.json"
    content = manifest.read_bytes()
    original = json.loads(content)
    unseen = set()
    for at, bit in flips(len(content), 11):
        changed = bytearray(content)
        changed[at] ^= bit
        manifest.write_bytes(changed)
        try:
            ok = verify(str(output), base=str(pristine[0]), threads=1).ok
        except (InputInvalid, Mismatch):
            continue
        if ok:
            unseen |= changed_keys(original, json.loads(changed))
    assert unseen <= UNCHECKED


def changed_keys(a: Any, b: Any, key: str = "") -> set[str]:
    """The innermost keys whose values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {found for k in a for found in changed_keys(a[k], b[k], k)}
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return {found for x, y in zip(a, b, strict=True) for found in changed_keys(x, y, key)}
    return set() if a == b else {key}


def edit(out: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest and write it as noisytune would."""
    path = out / "noisytune.json"
    document = json.loads(path.read_text())
    lines = path.read_text()
    before = json.loads(lines)
    change(document)
    for old, new in zip(before["tensors"], document["tensors"], strict=True):
        lines = lines.replace(json.dumps(old), json.dumps(new))
    path.write_text(lines.replace(json.dumps(before["noise"]), json.dumps(document["noise"])))


D0 = "blake3:" + "0" * 64


def test_only_the_base_tells_of_another_seed(pristine: tuple[Path, Path], output: Path) -> None:
    edit(output, lambda document: document["noise"].update(seed="1"))
    assert verify(str(output)).ok
    result = verify(str(output), base=str(pristine[0]))
    perturbed = {(d["file"], d["name"]) for d in tensors(output) if d["action"] == "perturb"}
    assert found(result) == perturbed
    assert "other bytes" in result.mismatches[0].what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"source_digest": D0}, "base's bytes"),
        ({"unchanged": 1}, "counts"),
        ({"clamped": 1}, "counts"),
        ({"stream": "BF16"}, "other bytes"),
    ],
)
def test_only_the_base_tells(
    change: dict[str, Any], what: str, pristine: tuple[Path, Path], output: Path
) -> None:
    edit(output, lambda document: document["tensors"][0].update(change))
    assert verify(str(output)).ok
    result = verify(str(output), base=str(pristine[0]))
    assert [(d.tensor, what in d.what) for d in result.mismatches] == [("F32", True)]


def tensors(out: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads((out / "noisytune.json").read_text())["tensors"]
    return listed


def test_a_changed_base_is_named(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(pristine[0], tmp_path / "base"))
    shard = base / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = verify(str(pristine[1]), base=str(base))
    assert len(result.mismatches) == 1
    assert result.mismatches[0].what == "the base's bytes are not those recorded"


def test_another_base_is_named(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    names = list(TENSORS)
    parts = ({n: TENSORS[n] for n in names[:5]}, {n: TENSORS[n] for n in names[5:]})
    base = save_sharded(tmp_path / "base", *parts)
    result = verify(str(pristine[1]), base=str(base))
    assert {"the base: it is absent", "the base: it is not recorded", "the base: its header is another"} <= {
        d.what for d in result.mismatches
    }


def test_files_that_are_gone_or_are_none(output: Path) -> None:
    os.remove(output / "model-00001-of-00002.safetensors")
    os.remove(output / "model.safetensors.index.json")
    os.remove(output / "model-00002-of-00002.safetensors")
    os.mkfifo(output / "model-00002-of-00002.safetensors")
    shutil.rmtree(output / "sub")
    whats = {d.file: d.what for d in verify(str(output)).mismatches}
    assert whats["model-00001-of-00002.safetensors"] == "it is absent"
    assert "FIFO" in whats["model-00002-of-00002.safetensors"]
    assert whats["model.safetensors.index.json"] == whats["sub/tokenizer.json"] == "it is absent"


def test_stray_weights_are_warned_of(output: Path) -> None:
    (output / "pytorch_model.bin").write_bytes(b"x")
    (output / "a\x1b.safetensors").write_bytes(b"x")
    (output / "notes.txt").write_bytes(b"x")
    result = verify(str(output))
    assert result.ok
    assert len(result.warnings) == 2
    assert all(warning.isprintable() for warning in result.warnings)


def test_a_reformatted_manifest_does_not_match(output: Path) -> None:
    path = output / "noisytune.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert found(verify(str(output))) == {("noisytune.json", None)}


def test_no_output_and_no_manifest(output: Path, tmp_path: Path) -> None:
    with pytest.raises(InputUnreadable, match="No such file"):
        verify(str(tmp_path / "absent"))
    with pytest.raises(InputUnreadable, match="no manifest"):
        verify(str(output / "model-00001-of-00002.safetensors"))
    os.remove(output / "noisytune.json")
    with pytest.raises(InputUnreadable, match="no manifest"):
        verify(str(output))


def test_a_folder_s_manifest_beside_a_file(output: Path) -> None:
    file = output / "model-00001-of-00002.safetensors"
    shutil.copy(output / "noisytune.json", f"{file}.noisytune.json")
    with pytest.raises(InputInvalid, match="that of a folder"):
        verify(str(file))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_the_command_says_yes(pristine: tuple[Path, Path]) -> None:
    base, out = pristine
    result = run(out, "--base", base)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"verified {len(TENSORS)} tensors" in result.stderr
    result = run(out, "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["ok"] is True


def test_the_command_asks_for_the_right_base(pristine: tuple[Path, Path], tmp_path: Path) -> None:
    base = save(tmp_path / "model.safetensors", TENSORS)
    result = run(pristine[1], "--base", base)
    assert result.exit_code == 8
    assert "output, manifest and base do not match" in result.stderr
    assert "Give as --base the checkpoint that was perturbed" in result.stderr


def test_the_command_says_no(pristine: tuple[Path, Path], output: Path) -> None:
    edit(output, lambda d: [entry.update(digest=D0) for entry in d["tensors"] if entry["dtype"] == "F64"])
    result = run(output, "--json")
    assert result.exit_code == 8
    assert json.loads(result.stdout) == {
        "output": str(output),
        "ok": False,
        "checked": {
            "tensors": len(TENSORS),
            "files": 4,
            "bytes": json.loads(result.stdout)["checked"]["bytes"],
        }
        | {"base": False},
        "mismatches": [
            {
                "file": "model-00001-of-00002.safetensors",
                "tensor": "F64",
                "what": "its bytes are not those recorded",
            }
        ],
    }
    assert result.stderr.count("\n") == 1
    assert 'tensor "F64"' in result.stderr


def test_many_mismatches_are_counted(output: Path) -> None:
    perturbed = [entry["name"] for entry in tensors(output) if entry["action"] == "perturb"]
    edit(
        output,
        lambda d: [entry.update(digest=D0) for entry in d["tensors"] if entry["action"] == "perturb"],
    )
    for name in ("model.safetensors.index.json", "sub/tokenizer.json"):
        os.remove(output / name)
    result = run(output)
    assert result.exit_code == 8
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr
    named = [name for name in perturbed if f'"{name}"'.replace("\x1b", "\\x1b") in result.stderr]
    assert named == perturbed
    assert "sub/tokenizer.json" in result.stderr
