"""What is opened, copied and left out of a local checkpoint, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, weights
from checkpoints import save as save_tensors

from noisytune_cli.checkpoint import folder as folder_module
from noisytune_cli.checkpoint import hub
from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def save(path: Path, *names: str, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file with one F32 tensor of shape [2] for each name."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    for i, name in enumerate(names):
        header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8 * len(names)))
    return path


def write(root: Path, *names: str) -> None:
    """Write small files; what they hold does not matter."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def save_sharded(root: Path, weight_map: object = None, **more: Any) -> Path:
    """Write two shards, a and b in the first, c in the second, and an index."""
    save(root / SHARDS[0], "a", "b", metadata={"format": "pt"})
    save(root / SHARDS[1], "c")
    index = {
        "weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]} if weight_map is None else weight_map
    }
    (root / "model.safetensors.index.json").write_text(json.dumps(index | more))
    return root


def refused(source: Path | str, **options: Any) -> str:
    """Return the one line with which opening is refused as malformed."""
    with pytest.raises(InputInvalid) as caught:
        open_checkpoint(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(checkpoint: Checkpoint) -> list[str]:
    return [source.name for source in checkpoint.sources]


def test_a_file(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.bin", "a", "b")
    write(tmp_path, "README.md")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with open_checkpoint(str(path)) as opened:
        assert (opened.id, opened.revision, opened.single_file) == ("weights.bin", None, True)
        assert [(t.name, t.file) for t in opened.tensors] == [("a", "weights.bin"), ("b", "weights.bin")]
        assert (opened.others, opened.left_out, opened.index) == ((), (), None)
        assert opened.config == {"model_type": "bert"}
        assert opened.previous_run is None


def test_a_broken_config_beside_a_file_only_warns(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_text("{")
    with open_checkpoint(str(path)) as opened:
        assert opened.config is None
        assert "not valid JSON" in opened.warnings[0]


def test_an_index_given_as_a_file_is_explained(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    assert "index" in refused(tmp_path / "model.safetensors.index.json")


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    root = tmp_path / "bert"
    save(root / "model.safetensors", "a")
    save(root / "2_Dense/model.safetensors", "d")
    (root / "config.json").write_text("{}")
    write(
        root,
        "tokenizer.json",
        "modeling.py",
        "1_Pooling/config.json",
        "3_Dense/pytorch_model.bin",
        "voices.pt",
    )
    with open_checkpoint(f"{root}/") as opened:
        assert (opened.id, opened.single_file, names(opened)) == ("bert", False, ["model.safetensors"])
        assert opened.others == (
            "1_Pooling/config.json",
            "2_Dense/model.safetensors",
            "3_Dense/pytorch_model.bin",
            "config.json",
            "modeling.py",
            "tokenizer.json",
            "voices.pt",
        )
        assert opened.left_out == ()


@pytest.mark.parametrize("name", ["sd.ckpt.safetensors", "step.ckpt-100.pt"])
def test_weights_that_were_a_ckpt_are_not_taken_for_tensorflow(tmp_path: Path, name: str) -> None:
    save(tmp_path / "m/model.safetensors", "a")
    save(tmp_path / "m" / name, "b")
    with open_checkpoint(str(tmp_path / "m"), weights=name) as opened:
        assert names(opened) == [name]
    for part in ("m.ckpt.meta", "m.ckpt-9.data-00000-of-00001", "m.ckpt-9"):
        (tmp_path / "m" / part).write_bytes(b"x")
    with open_checkpoint(str(tmp_path / "m"), weights="model.safetensors") as opened:
        assert {n for n, why in opened.left_out if "TensorFlow" in why} == {
            "m.ckpt.meta",
            "m.ckpt-9.data-00000-of-00001",
            "m.ckpt-9",
        }
        assert name in opened.others


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    save(tmp_path / "model.fp16.safetensors", "a")
    twins = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.ckpt",
    ]
    twins += [
        "pytorch_model-00001-of-00002.bin",
        "rust_model.ot",
        "model.tflite",
        "weights.npz",
        "model-Q4.GGUF",
        "model.pt",
    ]
    twins += [
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "openvino/openvino_model.xml",
        "openvino/openvino_model.bin",
    ]
    twins += ["original/consolidated.00.pth"]
    state = [
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_3.pth",
        "training_args.bin",
    ]
    state += ["trainer_state.json", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "distrib_optim.pt"]
    inside = [".git/config", ".cache/x", ".huggingface/y", "checkpoint-500/model.bin", "global_step5/a.pt"]
    inside += ["coreml/a.mlpackage/Data/weight.bin", "sub/.git/HEAD", ".noisytune-x1/model.safetensors"]
    write(tmp_path, *twins, *state, *inside, "onnx/config.json", ".gitattributes", "checkpoint-notes/a.txt")
    write(tmp_path, "speaker.npz")
    write(tmp_path, "noisytune.json")
    with open_checkpoint(str(tmp_path)) as opened:
        assert opened.others == (
            ".gitattributes",
            "checkpoint-notes/a.txt",
            "onnx/config.json",
            "speaker.npz",
        )
        left_out = dict(opened.left_out)
        assert any("noisytune.json is left out" in warning for warning in opened.warnings)
    folders = [".git/", ".cache/", ".huggingface/", "checkpoint-500/", "global_step5/", "coreml/a.mlpackage/"]
    folders += ["sub/.git/", ".noisytune-x1/"]
    assert left_out.keys() == {*twins, *state, *folders, "model.fp16.safetensors", "noisytune.json"}
    assert {left_out[name] for name in state} == {"optimizer and trainer state"}
    assert all("another format" in left_out[name] for name in twins)


def test_a_pickle_named_as_the_weights_is_a_twin(tmp_path: Path) -> None:
    save(tmp_path / "mnist.safetensors", "a")
    write(tmp_path, "mnist.pt", "LICENSE")
    with open_checkpoint(str(tmp_path)) as opened:
        assert opened.others == ("LICENSE",)
        assert opened.left_out == (("mnist.pt", "the weights in another format (PyTorch)"),)


def test_a_copy_under_another_ending_is_a_twin(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a", "b")
    for copy in ("model.safetensors.bak", "flux.sft"):
        (tmp_path / copy).write_bytes((tmp_path / "model.safetensors").read_bytes())
    save(tmp_path / "other.safetensors.bak", "c")
    write(tmp_path, "model.safetensors.sha256", "notes.bin.txt")
    with open_checkpoint(str(tmp_path)) as opened:
        assert opened.others == ("model.safetensors.sha256", "notes.bin.txt", "other.safetensors.bak")
        why = "other weights than those chosen (--weights chooses)"
        assert opened.left_out == (("flux.sft", why), ("model.safetensors.bak", why))


def test_an_adapter(tmp_path: Path) -> None:
    save(tmp_path / "adapter_model.safetensors", "a")
    save(tmp_path / "extra.safetensors", "b")
    write(tmp_path, "adapter_config.json", "adapter_model.bin")
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == ["adapter_model.safetensors"]
        assert opened.others == ("adapter_config.json", "extra.safetensors")
        assert opened.config is None


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


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors.index.json", SHARDS[1]])
def test_a_link_out_is_refused_by_name(tmp_path: Path, name: str) -> None:
    root = save_sharded(tmp_path / "model")
    outside = tmp_path / "model-secrets"
    outside.write_bytes((root / name).read_bytes() if (root / name).exists() else b"{}")
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(outside)
    said = refused(root)
    assert f"/{name}" in said
    assert "--follow-links" in said
    with open_checkpoint(str(root), follow_links=True):
        pass


def test_a_file_that_is_swapped_for_a_link_out_is_not_copied(tmp_path: Path) -> None:
    root = tmp_path / "model"
    save(root / "model.safetensors", "a")
    write(root, "README.md")
    (tmp_path / "secret").write_bytes(b"x")
    with open_checkpoint(str(root)) as opened:
        (root / "README.md").unlink()
        (root / "README.md").symlink_to(tmp_path / "secret")
        with pytest.raises(InputInvalid, match="link out"):
            opened.open_beside(root / "README.md")


def test_a_side_file_that_is_rewritten_is_noticed(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    write(tmp_path, "README.md")
    before = (tmp_path / "README.md").stat()
    with open_checkpoint(str(tmp_path)) as opened:
        opened.check_beside()
        (tmp_path / "README.md").write_bytes(b"y")
        os.utime(tmp_path / "README.md", ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(Mismatch, match=r"README\.md"):
            opened.check_beside()


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


@pytest.mark.parametrize("dropping", ["._{}", ".{}.swp", ".{}", "__MACOSX/._{}"])
@pytest.mark.parametrize("name", ["unet.safetensors", "weights.pth", "model.safetensors.index.json"])
def test_droppings_are_no_weights(tmp_path: Path, dropping: str, name: str) -> None:
    save(tmp_path / "unet.safetensors", "a")
    write(tmp_path, dropping.format(name))
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == ["unet.safetensors"]


def test_an_adapter_beside_a_model_comes_along(tmp_path: Path) -> None:
    save(tmp_path / "adapter_model.safetensors", "base_model.model.a.lora_A", "base_model.model.a.lora_B")
    write(tmp_path, "adapter_config.json")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    for whole in ("model.safetensors", "pytorch_model.bin"):
        save(tmp_path / whole, "a", "b")
        with open_checkpoint(str(tmp_path), weights=whole) as opened:
            assert "adapter_model.safetensors" in opened.others
        with open_checkpoint(str(tmp_path)) as opened:
            assert names(opened) == [whole]
            assert {"adapter_config.json", "adapter_model.safetensors"} <= {*opened.others}
        (tmp_path / whole).unlink()


OURS = ("enc.0.w", "enc.1.w", "enc.2.w", "head.w")


@pytest.mark.parametrize(
    ("theirs", "is_twin"),
    [
        (OURS, True),
        (OURS[:1], True),
        ((*OURS[:2], "x", "y"), True),
        ((*OURS, *"uvwxyz"), True),
        (tuple(f"module.{name}" for name in OURS), True),
        (tuple(name.removeprefix("enc.") for name in OURS), True),
        (("head.w", "x", "y"), False),
        (("w",), False),
        (
            ("base_model.model.enc.0.w.lora_A", "base_model.model.enc.0.w.lora_B", "base_model.model.head.w"),
            False,
        ),
        ((), False),
    ],
)
def test_a_twin_is_told_by_its_tensors(tmp_path: Path, theirs: tuple[str, ...], is_twin: bool) -> None:
    save(tmp_path / "ours.safetensors", *OURS)
    save(tmp_path / "other.ckpt", *theirs)
    index = {"weight_map": dict.fromkeys(theirs or ("z",), "shard.safetensors")}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(str(tmp_path), weights="ours.safetensors") as opened:
        left_out = [] if not is_twin else ["other.ckpt", "x.safetensors.index.json"]
        assert [name for name, _ in opened.left_out] == left_out
        assert len(opened.others) == 2 - len(left_out)


def test_a_twin_of_other_shapes_is_none_and_one_of_as_many_values_is(tmp_path: Path) -> None:
    ours = {"a": weights("F32", 100, 150, seed=1), "n": Tensor("I64", np.arange(3))}
    save_tensors(tmp_path / "ours.safetensors", ours)
    save_tensors(tmp_path / "generator.safetensors", {"a": weights("F32", 100, 151, seed=1)})
    save_tensors(
        tmp_path / "fused.safetensors", {"q": weights("F16", 100, 50), "kv": weights("F16", 100, 100)}
    )
    with open_checkpoint(str(tmp_path), weights="ours.safetensors") as opened:
        assert opened.others == ("generator.safetensors",)
        assert [name for name, _ in opened.left_out] == ["fused.safetensors"]


def test_what_cannot_be_looked_into_comes_along_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path / "net.safetensors", "a")
    (tmp_path / "labels.ckpt").write_text("'id1' => 0")
    (tmp_path / "other.ckpt").write_bytes(pickle.dumps(Path("x"), protocol=2))
    with open_checkpoint(str(tmp_path)) as opened:
        assert opened.others == ("labels.ckpt", "other.ckpt")
        assert [warning.split(" is copied")[0] for warning in opened.warnings] == ["other.ckpt"]


def test_weights_in_a_subfolder(tmp_path: Path) -> None:
    save_sharded(tmp_path / "unet")
    write(
        tmp_path, "model_index.json", "unet/model.fp16.safetensors", "vae/model.safetensors", "vae/model.bin"
    )
    (tmp_path / "unet/config.json").write_text('{"sample_size": 64}')
    assert "unet/model.safetensors.index.json" in refused(tmp_path)
    with open_checkpoint(str(tmp_path), weights="unet/model.safetensors.index.json") as opened:
        assert names(opened) == [f"unet/{shard}" for shard in SHARDS]
        assert opened.config == {"sample_size": 64}
        assert "vae/model.safetensors" in opened.others
        assert "vae/model.bin" in opened.others
        assert [name for name, _ in opened.left_out] == ["unet/model.fp16.safetensors"]


@pytest.mark.parametrize("weights", ["../model.safetensors", "/etc/passwd", "", "."])
def test_weights_cannot_leave_the_folder(tmp_path: Path, weights: str) -> None:
    save(tmp_path / "model.safetensors", "a")
    save(tmp_path / "in/model.safetensors", "a")
    with pytest.raises(UsageError):
        open_checkpoint(str(tmp_path / "in"), weights=weights)


def test_weights_that_are_not_there_or_no_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", "a")
    write(tmp_path, "model.onnx", "model.bin")
    with pytest.raises(InputUnreadable):
        open_checkpoint(str(tmp_path), weights="nothing.safetensors")
    assert "neither safetensors or PyTorch weights" in refused(tmp_path, weights="model.onnx")
    assert "not a valid PyTorch checkpoint" in refused(tmp_path, weights="model.bin")
    with pytest.raises(UsageError):
        open_checkpoint(str(path), weights="model.safetensors")


@pytest.mark.parametrize(("name", "says"), [("m.onnx", "like none of"), ("m.safetensors", "header has")])
def test_a_file_of_another_format_is_not_called_damaged(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99))
    with pytest.raises(InputInvalid, match=says):
        open_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "PyTorch"),
        ("resnet20.th", "PyTorch"),
        ("model.gguf", "GGUF"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("README.md", "no weights"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path: Path, name: str, says: str) -> None:
    write(tmp_path, name, "optimizer.pt")
    assert says in refused(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), r"it has no weights\. Give a folder or a hub id .* \*\.safetensors, \*\.bin, .*\*\.distcp\.$"),
        (
            ("checkpoint-900/", "checkpoint-1000/"),
            r"-900, checkpoint-1000\. .* checkpoint-1000 in it",
        ),
        (
            ("global_step9/", "global_step20/", "optimizer_1/"),
            r"only global_step9, global_step20\. .*_step20 in",
        ),
        (("checkpoint-5/", "optimizer.pt"), r"only checkpoint-5\. Give the folder checkpoint-5 in it\.$"),
        (("pytorch_model_fsdp_0/",), r"Give the folder pytorch_model_fsdp_0 in it\.$"),
        (("model_best.pth.tar", "optimizer.pt"), r"only model_best\.pth\.tar may be .* Give the file itself"),
        ((".metadata",), r"the checkpoint is incomplete: .* none of the chunks \(\*\.distcp\)"),
        (("step-1/.metadata",), r"the weights are in a folder inside: .* only step-1/\.metadata\. Give that"),
        (("a/model.safetensors",), r"only a/model\.safetensors\. Give that folder, or .*--weights=NAME\.$"),
        ((f"snapshots/{COMMIT}/model.bin",), r"Give that folder\.$"),
        ((f"snapshots/{COMMIT}/model.bin", f"snapshots/{COMMIT[::-1]}/m.bin"), r"Give one of the folders\.$"),
        (("a/model.bin", "b/model.bin"), r"candidates are a/model\.bin, b/model\.bin"),
    ],
)
def test_what_has_no_weights_itself_says_what_to_give(
    tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            write(tmp_path, name)
    assert re.search(says, refused(tmp_path))


def test_links_and_special_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    write(outside, "secret.txt", "vocab.txt")
    root = tmp_path / "model"
    save(root / "model.safetensors", "a")
    write(root, "sub/deep/file.txt")
    (root / "vocab.txt").symlink_to("sub/deep/file.txt")
    (root / "out").symlink_to(outside)
    (root / "sub/deep/up").symlink_to("../..")
    (root / "alias").symlink_to("sub/deep")
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
    (root / os.fsdecode(b"bad\xff.txt")).write_bytes(b"x")
    with open_checkpoint(".") as opened:
        assert opened.id == "model"
        assert opened.others == ("alias/file.txt", "sub/deep/file.txt", "vocab.txt")
        assert dict(opened.left_out) == {
            "alias/up/": "a link to a folder it lies in",
            "bad\\udcff.txt": "a file whose name is not UTF-8",
            "broken": "a broken link",
            "out/": "a link out of the checkpoint",
            "pipe": "a FIFO",
            "sock": "a socket",
            "sub/deep/up/": "a link to a folder it lies in",
        }


def test_linked_folders_cannot_multiply(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    folders = "abcdefghij"
    for folder in folders:
        write(tmp_path, f"{folder}/file")
        for other in folders:
            (tmp_path / folder / other).symlink_to(f"../{other}")
    with open_checkpoint(str(tmp_path)) as opened:
        assert opened.others.count("a/b/file") == 1
        assert len(opened.others) == 10 + 10 * 9
        assert ("a/b/c/", "a link inside a linked folder") in opened.left_out


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model.safetensors", "a")
    write(tmp_path, "sub/1", "sub/2")
    monkeypatch.setattr(folder_module, "_MAX_ENTRIES", 3)
    assert "more than 3 files" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[64, 3], [128, 3]]", "not a JSON object"),
        ('{"a": 1, // of the audio\n}', "not valid JSON"),
        ("model: vits\n", "not valid JSON"),
    ],
)
def test_the_config_of_another_program_is_copied(tmp_path: Path, text: str, why: str) -> None:
    save(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_text(text)
    with open_checkpoint(str(tmp_path)) as opened:
        assert (opened.config, opened.others) == (None, ("config.json",))
        assert [why in warning for warning in opened.warnings] == [True]


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    config = tmp_path / "config.json"
    config.mkdir()
    assert "a directory" in refused(tmp_path)
    config.rmdir()
    os.mkfifo(config)
    assert "a FIFO" in refused(tmp_path)


def test_a_path_into_the_hub_cache_tells_id_and_commit(tmp_path: Path) -> None:
    root = tmp_path / f"models--owner--name/snapshots/{COMMIT}"
    blob = save(tmp_path / "models--owner--name/blobs/abc", "a")
    root.mkdir(parents=True)
    (root / "model.safetensors").symlink_to(os.path.relpath(blob, root))
    (tmp_path / "latest").symlink_to(root)
    for source in (root, root / "model.safetensors", tmp_path / "latest"):
        with open_checkpoint(str(source)) as opened:
            assert (opened.id, opened.revision) == ("owner/name", COMMIT)
    other = save(tmp_path / f"models--gpt2/snapshots/{COMMIT}/model.safetensors", "a")
    with open_checkpoint(str(other)) as opened:
        assert (opened.id, opened.revision) == ("gpt2", COMMIT)


@pytest.mark.parametrize(
    "source", ["./nothing", "./a\0b", "/nothing/at/all", "~/nothing-of-this-name", "a/b/c", "x.safetensors"]
)
def test_a_missing_path_is_unreadable_and_never_a_hub_id(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(hub, "Repository", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(InputUnreadable):
        open_checkpoint(source)


def test_what_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "owner/name/model.safetensors", "a")
    with open_checkpoint("owner/name") as opened:
        assert (opened.id, opened.revision) == ("name", None)


def test_revision_is_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_checkpoint(str(save(tmp_path / "model.safetensors", "a")), revision="main")


def test_a_failure_closes_what_was_opened(tmp_path: Path, open_files: Callable[[], int]) -> None:
    save_sharded(tmp_path)
    (tmp_path / SHARDS[1]).write_bytes(b"\x08")
    before = open_files()
    refused(tmp_path)
    assert open_files() == before
    with open_checkpoint(str(save_sharded(tmp_path))):
        assert open_files() == before + 2
    assert open_files() == before


def checkpoints() -> Path:
    """The folder of real checkpoints; the test is skipped where it is absent."""
    data = Path(os.environ.get("NOISYTUNE_DATA", Path(__file__).parents[3] / "shared/data")) / "checkpoints"
    if not data.is_dir():
        pytest.skip("the real checkpoints are not here (NOISYTUNE_DATA)")
    return data


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("burn", ["mnist.safetensors"]),
        ("capp-gpt", ["model.safetensors"]),
        ("peft-gpt2", ["adapter_model.safetensors"]),
        ("qwen3", ["model.safetensors"]),
        ("qwen3-mlx-4bit-sharded", list(SHARDS)),
    ],
)
def test_real_checkpoints(name: str, weights: list[str]) -> None:
    root = checkpoints() / name
    with open_checkpoint(str(root)) as opened:
        assert names(opened) == weights
        assert opened.tensors
        accounted = {*weights, *opened.others, *(left for left, _ in opened.left_out)}
        assert accounted == {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_weights_that_are_mostly_a_copy_are_offered_by_name(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(InputInvalid, match=r"only consolidated\.00\.pth.*--weights=consolidated\.00\.pth"):
        open_checkpoint(str(tmp_path))
