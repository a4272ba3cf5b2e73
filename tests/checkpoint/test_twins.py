"""What lies beside the weights: copies of them that are left out, and what comes along."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Tensor, weights
from checkpoints import save as save_tensors
from opened import names, save, write

from noisytune_cli.checkpoint.checkpoint import open_checkpoint


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
