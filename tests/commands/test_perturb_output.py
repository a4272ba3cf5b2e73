"""What perturb writes beside the noise, what it refuses, and what it leaves alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from checkpoints import Tensor, Tensors, noised, numbers, save, save_sharded, split, weights
from runs import run

from noisytune_cli.checkpoint.formats.safetensors import SafetensorsSource
from noisytune_cli.commands.average import average
from noisytune_cli.commands.perturb import Request, plan_perturb
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import (
    InputInvalid,
    InputUnreadable,
    Mismatch,
    NoisytuneError,
    OutputUnsafe,
    ResourceExhausted,
    UsageError,
)
from noisytune_cli.output import destination, staging
from noisytune_cli.output import space as space_module
from noisytune_cli.records import NoiseSpec


def contents(root: Path) -> dict[str, bytes]:
    return {os.fspath(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_no_noise_at_all_is_a_copy(tmp_path: Path) -> None:
    root = tmp_path / "model"
    save_sharded(
        root, {"a": weights("F32", 9, 9), "ids": Tensor("I64", np.arange(3))}, {"b": weights("F64", 3)}
    )
    (root / "config.json").write_text("{}")
    result = run(root, noise=NoiseSpec(lam=0.0))
    after = contents(result.output)
    after.pop("noisytune.json")
    assert after == contents(root)


def test_a_folder_and_what_lies_in_it(tmp_path: Path) -> None:
    root = tmp_path / "model"
    save(root / "model.safetensors", {"w": weights("F32", 9, 9)}, {"format": "pt"})
    beside = {
        "config.json": b"{}",
        "tokenizer.json": b"[]",
        "modeling_custom.py": b"raise SystemExit",
        "1_Pooling/config.json": b"{ }",
        "2_Dense/model.safetensors": (root / "model.safetensors").read_bytes(),
    }
    left_out = {
        "pytorch_model.bin": b"pickle",
        "optimizer.pt": b"state",
        "onnx/model.onnx": b"onnx",
        ".git/HEAD": b"ref",
        ".cache/x": b"cache",
    }
    for name, content in (beside | left_out).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    result = run(root, f"{tmp_path}/deep/er/out/")
    assert result.output == tmp_path / "deep/er/out"
    found = contents(result.output)
    assert found.keys() == beside.keys() | {"model.safetensors", "noisytune.json"}
    assert {name: found[name] for name in beside} == beside
    digests = {name: f"blake3:{blake3(content).hexdigest()}" for name, content in beside.items()}
    assert dict(result.manifest.copied) == digests
    assert [name for name, _ in result.manifest.left_out] == [
        ".cache/",
        ".git/",
        "onnx/model.onnx",
        "optimizer.pt",
        "pytorch_model.bin",
    ]
    assert json.loads(found["noisytune.json"])["source"]["id"] == "model"


def test_shards(tmp_path: Path) -> None:
    shards: list[Tensors] = [
        {"lm_head.weight": weights("F32", 30, 8, seed=1), "a": weights("F16", 40)},
        {"model.embed_tokens.weight": weights("F32", 30, 8, seed=1), "ids": Tensor("I32", np.arange(3))},
    ]
    root = save_sharded(tmp_path / "model", *shards)
    result = run(root, threads=2)
    everything = {name: tensor for shard in shards for name, tensor in shard.items() if name != "ids"}
    expected = noised(everything, NoiseSpec(), {"lm_head.weight": "model.embed_tokens.weight"})
    expected["ids"] = shards[1]["ids"].data
    for file in (f"model-0000{i}-of-00002.safetensors" for i in (1, 2)):
        header, found = split((result.output / file).read_bytes())
        assert header == split((root / file).read_bytes())[0]
        assert found == {name: expected[name] for name in found}
    index = "model.safetensors.index.json"
    assert (result.output / index).read_bytes() == (root / index).read_bytes()


def test_one_of_several_weights(tmp_path: Path) -> None:
    root = tmp_path / "model"
    save(root / "a.safetensors", {"w": weights("F32", 9)})
    save(root / "b.safetensors", {"w": weights("F32", 9, seed=5)})
    result = run(root, weights="b.safetensors")
    assert contents(result.output).keys() == {"b.safetensors", "noisytune.json"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "in.safetensors", {"w": weights("F32", 100, 10)})


@pytest.mark.parametrize(
    ("noise", "error"),
    [
        (NoiseSpec(lam=math.nan), UsageError),
        (NoiseSpec(lam=math.inf), UsageError),
        (NoiseSpec(rules=(("w", math.inf),)), UsageError),
        (NoiseSpec(seed=-1), UsageError),
        (NoiseSpec(seed=2**64), UsageError),
        (NoiseSpec(include=("nowhere",)), UsageError),
        (NoiseSpec(exclude=("@nothing",)), UsageError),
        (NoiseSpec(exclude=("*",)), UsageError),
        (NoiseSpec(rules=(("nowhere", 0.1),)), UsageError),
    ],
)
def test_a_request_that_makes_no_sense(noise: NoiseSpec, error: type[NoisytuneError], source: Path) -> None:
    with pytest.raises(error):
        run(source, noise=noise)
    assert os.listdir(source.parent) == ["in.safetensors"]


@pytest.mark.parametrize("device", ["abacus", "cpu:1", ""])
def test_an_unknown_device(device: str, source: Path) -> None:
    with pytest.raises(UsageError):
        run(source, device=device)
    assert os.listdir(source.parent) == ["in.safetensors"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"ids": Tensor("I64", np.arange(4))},
        {"c": numbers("F32", 1.0, 1.0)},
        {"n": numbers("F32", 1.0, math.nan)},
        {},
    ],
    ids=["no floats", "constant", "non-finite", "no tensors"],
)
def test_nothing_to_perturb_is_the_inputs_fault(tensors: Tensors, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", tensors)
    with pytest.raises(InputInvalid, match=f"nothing to perturb: {source}: "):
        run(source)
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_a_source_noised_before(source: Path, tmp_path: Path) -> None:
    noisy = run(source, tmp_path / "noisy.safetensors").output
    with pytest.raises(InputInvalid, match="--again"):
        run(noisy)
    again = run(noisy, again=True)
    assert again.output.read_bytes() not in (source.read_bytes(), noisy.read_bytes())


def test_a_folder_noised_before(tmp_path: Path) -> None:
    save(tmp_path / "in/model.safetensors", {"w": weights("F32", 99)})
    noisy = run(tmp_path / "in", tmp_path / "noisy").output
    with pytest.raises(InputInvalid, match="--again"):
        run(noisy)
    again = run(noisy, again=True)
    assert contents(again.output).keys() == {"model.safetensors", "noisytune.json"}
    assert again.manifest.left_out[0][0] == "noisytune.json"


def test_a_quantised_checkpoint_is_refused_whole(tmp_path: Path) -> None:
    tensors = {
        "w": weights("F32", 99),
        "layer.qweight": Tensor("I32", np.arange(9)),
        "layer.scales": weights("F16", 9),
    }
    with pytest.raises(InputInvalid, match="GPTQ"):
        run(save(tmp_path / "in.safetensors", tensors | {"layer.g_idx": Tensor("I32", np.arange(9))}))


@pytest.mark.parametrize("folder", [False, True])
def test_overwriting(folder: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "in/model.safetensors", {"w": weights("F32", 99)}).parent
    source = source if folder else source / "model.safetensors"
    run(source, tmp_path / "out")
    old = contents(tmp_path)
    with pytest.raises(OutputUnsafe, match="exists"):
        run(source, tmp_path / "out", NoiseSpec(seed=1))
    assert contents(tmp_path) == old
    second = run(source, tmp_path / "out", NoiseSpec(seed=1), overwrite=True)
    assert json.loads(second.manifest_path.read_bytes())["noise"]["seed"] == "1"
    new = contents(tmp_path)
    assert new.keys() == old.keys()
    assert {name for name in new if new[name] != old[name]} == {
        "out/model.safetensors" if folder else "out",
        "out/noisytune.json" if folder else "out.noisytune.json",
    }


def test_a_left_over_is_cleared_and_named_and_a_live_run_refused(source: Path) -> None:
    output = source.parent / "out"
    path, lock = staging.create(source.parent, output)
    with pytest.raises(OutputUnsafe, match="in use"):
        run(source, output)
    os.close(lock)
    assert run(source, output).cleared == (path.name,)
    assert not path.exists()


def test_the_source_is_left_as_it_was(source: Path) -> None:
    source.chmod(0o440)
    before, content = source.stat(), source.read_bytes()
    run(source)
    after = source.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_ino) == (
        before.st_mtime_ns,
        before.st_mode,
        before.st_ino,
    )
    assert source.read_bytes() == content


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


@pytest.mark.parametrize("change", [touch, replace, lambda path: os.truncate(path, 200), os.remove])
@pytest.mark.parametrize("mmap", [False, True])
def test_an_input_that_changes_while_it_is_read(change: Any, mmap: bool, source: Path) -> None:
    @contextmanager
    def progress(nbytes: int) -> Iterator[Any]:
        change(source)
        yield lambda done: None

    with pytest.raises(Mismatch):
        run(source, mmap=mmap, progress=progress)
    assert [name for name in os.listdir(source.parent) if name != "in.safetensors"] == []


def test_a_file_beside_the_weights_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in/model.safetensors", {"w": weights("F32", 99)})
    (tmp_path / "in/config.json").write_text("{}")
    resolve = destination.resolve_rewritten

    def vanish(*arguments: Any, **options: Any) -> Path:
        (tmp_path / "in/config.json").unlink()
        return resolve(*arguments, **options)

    monkeypatch.setattr(destination, "resolve_rewritten", vanish)
    with pytest.raises(InputUnreadable):
        run(tmp_path / "in")


def test_a_sparse_terabyte_is_refused_for_want_of_space(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    source = tmp_path / "in.safetensors"
    source.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(source, 8 + len(header) + (1 << 40))
    if os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize > 1 << 40:
        pytest.skip("there is room for a terabyte")
    with pytest.raises(ResourceExhausted, match="free"):
        run(source)
    assert os.listdir(tmp_path) == ["in.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; skips where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 100_000)})
    with pytest.raises(ResourceExhausted, match="nothing was written"):
        run(source, small_disk / "out")
    # Found while writing, where space is not what it seemed.
    monkeypatch.setattr(space_module, "check_space", lambda *_: None)
    with pytest.raises(ResourceExhausted, match="free; nothing was published"):
        run(source, small_disk / "out")
    assert os.listdir(small_disk) == []


def test_an_output_is_no_more_readable_than_its_source(tmp_path: Path) -> None:
    source = save(tmp_path / "in/model.safetensors", {"w": weights("F32", 8, 8)}).parent
    (source / "README.md").write_text("private")
    for path in source.iterdir():
        path.chmod(0o600)
    run(source, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out/README.md").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("folder", ["noisytune.json", "noisytune.json/more"])
def test_a_folder_in_the_manifests_place_is_the_inputs_fault_from_the_start(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = tmp_path / "model", tmp_path / "other"
    for root in (source, other):
        save(root / "model.safetensors", {"w": weights("F32", 9, 9)})
    (source / folder).mkdir(parents=True)
    (source / folder / "notes.txt").touch()
    monkeypatch.setattr(SafetensorsSource, "read", None)
    for attempt in (
        lambda: run(source),
        lambda: run(source, recipe_only=True),
        lambda: plan_perturb(Request(str(source), NoiseSpec())),
        lambda: average([str(source), str(other)], str(tmp_path / "out")),
    ):
        with pytest.raises(InputInvalid, match=r'both a file "noisytune.json" and a folder of that name'):
            attempt()
    assert sorted(os.listdir(tmp_path)) == ["model", "other"]


def test_an_empty_folder_in_the_manifests_place_is_in_nobodys_way(tmp_path: Path) -> None:
    save(tmp_path / "model" / "model.safetensors", {"w": weights("F32", 9, 9)})
    (tmp_path / "model" / "noisytune.json").mkdir()
    (tmp_path / "model" / "deeper" / "noisytune.json").mkdir(parents=True)
    (tmp_path / "model" / "deeper" / "noisytune.json" / "notes.txt").touch()
    assert verify(str(run(tmp_path / "model").output)).ok
