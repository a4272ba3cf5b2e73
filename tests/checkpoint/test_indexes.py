"""Shards and the index that names them, and which of several weights is the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from opened import SHARDS, names, refused, save, save_sharded

from noisytune_cli.checkpoint.checkpoint import open_checkpoint


def test_shards(tmp_path: Path) -> None:
    save_sharded(tmp_path, metadata={"total_size": 24})
    save(tmp_path / "consolidated.safetensors", "a", "b", "c")
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == list(SHARDS)
        assert [tensor.name for tensor in opened.tensors] == ["a", "b", "c"]
        assert opened.index is not None
        assert opened.index.name == "model.safetensors.index.json"
        assert opened.others == ("model.safetensors.index.json",)
        assert opened.metadata == {"format": "pt"}
        assert opened.warnings == (
            "consolidated.safetensors is not listed in model.safetensors.index.json and is left out",
        )


@pytest.mark.parametrize("total", [25, "24", None, 24.0])
def test_a_wrong_total_size_warns(tmp_path: Path, total: object) -> None:
    save_sharded(tmp_path, metadata={"total_size": total})
    with open_checkpoint(str(tmp_path)) as opened:
        assert any("total_size" in warning for warning in opened.warnings) == (total in (25, "24"))


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": null}}',
        b'{"weight_map": {"a": 1}}',
        b"{",
        b"\xff",
        '{"weight_map": {}}'.encode("utf-16"),
        b'{"weight_map":' + b"[" * 2000 + b"]" * 2000 + b"}",
    ],
)
def test_a_malformed_index(tmp_path: Path, text: bytes) -> None:
    save_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    assert "index" in refused(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "",
        ".",
        "../x.safetensors",
        "a/../../x.safetensors",
        "/etc/x.safetensors",
        "a\0.safetensors",
        "\x1b[2J.safetensors",
        "\ud800.safetensors",
        "sub//x.safetensors",
        "pytorch_model.bin",
    ],
)
def test_a_shard_name_that_is_no_plain_name(tmp_path: Path, shard: str) -> None:
    root = tmp_path / "model"
    save(tmp_path / "x.safetensors", "c")
    save_sharded(root, {"a": SHARDS[0], "b": SHARDS[0], "c": shard})
    message = refused(root)
    assert 'tensor "c"' in message
    assert message.isprintable()


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    first, second = SHARDS
    whole = {"a": first, "b": first, "c": second}
    assert 'tensor "d"' in refused(save_sharded(tmp_path / "1", whole | {"d": second}))
    assert 'tensor "b"' in refused(save_sharded(tmp_path / "2", {"a": first, "c": second}))
    assert 'tensor "b"' in refused(save_sharded(tmp_path / "3", whole | {"b": second}))
    assert "absent (1 of 3" in refused(save_sharded(tmp_path / "4", whole | {"d": "other.safetensors"}))
    root = save_sharded(tmp_path / "5")
    save(root / second, "c", "a")
    assert f'{second}: tensor "a": the tensor is in {first} too' in refused(root)


def test_a_shard_that_is_no_regular_file(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    os.mkfifo(tmp_path / SHARDS[1])
    assert "a FIFO" in refused(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    (tmp_path / SHARDS[1]).symlink_to("nowhere")
    assert "a broken link" in refused(tmp_path)


def test_shards_may_be_links(tmp_path: Path) -> None:
    root = save_sharded(tmp_path / "model")
    os.rename(root / SHARDS[0], tmp_path / "blob")
    (root / SHARDS[0]).symlink_to("../blob")
    assert "--follow-links" in refused(root)
    with open_checkpoint(str(root), follow_links=True) as opened:
        assert names(opened) == list(SHARDS)


def test_shards_without_their_index(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "no index" in refused(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert "no index" in refused(tmp_path)


def test_weights_that_cannot_be_told_apart(tmp_path: Path) -> None:
    save(tmp_path / "b.safetensors", "b")
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == ["b.safetensors"]
    save(tmp_path / "a.safetensors", "a")
    message = refused(tmp_path)
    assert "a.safetensors, b.safetensors" in message
    assert "--weights" in message
    with open_checkpoint(str(tmp_path), weights="./a.safetensors") as opened:
        assert names(opened) == ["a.safetensors"]
        assert opened.others == ("b.safetensors",)


def test_two_indexes(tmp_path: Path) -> None:
    save_sharded(tmp_path / "1")
    text = (tmp_path / "1/model.safetensors.index.json").read_text()
    (tmp_path / "1/model.safetensors.index.json").rename(tmp_path / "1/one.safetensors.index.json")
    (tmp_path / "1/two.safetensors.index.json").write_text(text)
    assert "--weights" in refused(tmp_path / "1")
    save_sharded(tmp_path / "2")
    (tmp_path / "2/model.fp16.safetensors.index.json").write_text(text)
    with open_checkpoint(str(tmp_path / "2")) as opened:
        assert opened.others == ("model.safetensors.index.json",)
        assert [name for name, _ in opened.left_out] == ["model.fp16.safetensors.index.json"]


@pytest.mark.parametrize("stem", ["model", "net"])
def test_a_whole_file_comes_before_an_index_that_an_earlier_save_left(tmp_path: Path, stem: str) -> None:
    save_sharded(tmp_path)
    index = (tmp_path / "model.safetensors.index.json").rename(tmp_path / f"{stem}.safetensors.index.json")
    save(tmp_path / f"{stem}.safetensors", "a", "b", "c", "d")
    for shards_too in (True, False):
        with open_checkpoint(str(tmp_path)) as opened:
            assert (names(opened), opened.index, opened.others) == ([f"{stem}.safetensors"], None, ())
            assert opened.warnings == (f"{index.name} is left over: loaders take {stem}.safetensors",)
            assert {name for name, _ in opened.left_out} == {index.name, *(SHARDS if shards_too else ())}
        for shard in SHARDS:
            (tmp_path / shard).unlink(missing_ok=True)


def test_diffusers_takes_shards_that_are_there_before_a_whole_file(tmp_path: Path) -> None:
    stem = "diffusion_pytorch_model"
    save(tmp_path / f"{stem}.safetensors", "a")
    save(tmp_path / f"{stem}.fp16.safetensors", "a")
    save(tmp_path / "lora.safetensors", "x", "y")
    shards = {tensor: f"{stem}-0000{i}-of-00002.safetensors" for i, tensor in enumerate("ab", start=1)}
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == [f"{stem}.safetensors"]
        assert opened.others == ("lora.safetensors",)
    for tensor, shard in shards.items():
        save(tmp_path / shard, tensor)
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == list(shards.values())


def test_the_index_of_a_variant(tmp_path: Path) -> None:
    shards = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard, tensor in zip(shards, "ab", strict=True):
        save(tmp_path / shard, tensor)
    index = "model.safetensors.index.fp16.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    for options in ({}, {"weights": index}):
        with open_checkpoint(str(tmp_path), **options) as opened:
            assert names(opened) == shards
            assert opened.others == (index,)
    save(tmp_path / "model.safetensors", "a", "b")
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == ["model.safetensors"]
        assert {name for name, _ in opened.left_out} == {index, *shards}


def test_an_index_without_any_of_its_shards_was_left_over(tmp_path: Path) -> None:
    index = save_sharded(tmp_path) / "model.safetensors.index.json"
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    assert "incomplete" in refused(tmp_path)
    save(tmp_path / "output.safetensors", "a")
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == ["output.safetensors"]
        assert opened.warnings == (f"{index.name} is left over: none of its 2 shards is here",)
    save(tmp_path / SHARDS[0], "a", "b")
    assert "absent (1 of 2" in refused(tmp_path)
