"""Pickles written as safetensors: the same noise, under names and headers that loaders expect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Tensor, split, weights
from pickles import saved, to_torch
from runs import run
from safetensors.torch import load_file, load_model

from noisytune_cli.checkpoint.formats.torch import open_source
from noisytune_cli.commands.average import average
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.records import Conversion, NoiseSpec
from tests.commands.test_convert import tree

TO = Conversion(format="safetensors")
W, V = weights("F32", 30, 20), weights("BF16", 7, 9, seed=1)


def write(path: Path, value: object, *, zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(saved(value, zipped=zipped))
    return path


def header(path: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(split(path.read_bytes())[0][8:])
    return found


def contents(path: Path) -> dict[str, bytes]:
    """Return every tensor of a pickle, row-major."""
    source = open_source(path, path.name, False)
    try:
        return {t.name: bytes(source.read(t, 0, memoryview(bytearray(t.nbytes)))) for t in source.tensors}
    finally:
        source.close()


def check(out: Path, base: Path, again: Path) -> None:
    """Verify an output alone and with its base, and make it again."""
    assert verify(str(out)).mismatches == ()
    assert verify(str(out), base=str(base)).mismatches == ()
    manifest = out / "noisytune.json" if out.is_dir() else out.with_name(out.name + ".noisytune.json")
    replay(str(manifest), str(again / out.name), base=str(base))
    if out.is_dir():
        assert tree(again / out.name) == tree(out)
    else:
        assert (again / out.name).read_bytes() == out.read_bytes()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_noise_and_values_are_those_of_the_pickle(zipped: bool, tmp_path: Path) -> None:
    tensors = {"w": to_torch(W), "t": to_torch(W).t(), "v": to_torch(V), "i": torch.arange(5)}
    source = write(tmp_path / "model.pt", tensors, zipped=zipped)
    run(source, f"{tmp_path}/pickled/")
    run(source, f"{tmp_path}/out/", conversion=TO)
    out = tmp_path / "out" / "model.safetensors"
    assert split(out.read_bytes())[1] == contents(tmp_path / "pickled" / "model.pt")
    assert header(out)["__metadata__"] == {"format": "pt"}
    assert load_file(out)["t"].is_contiguous()
    check(out, source, tmp_path / "again")


def test_with_another_dtype(tmp_path: Path) -> None:
    source = write(tmp_path / "model.bin", {"w": to_torch(W), "v": to_torch(V)})
    run(source, tmp_path / "out.safetensors", conversion=Conversion(dtype="F64", format="safetensors"))
    assert {str(value.dtype) for value in load_file(tmp_path / "out.safetensors").values()} == {
        "torch.float64"
    }
    check(tmp_path / "out.safetensors", source, tmp_path / "again")
    with pytest.raises(UsageError, match="--to=safetensors is missing"):
        run(source, tmp_path / "out.bin", conversion=Conversion(dtype="F64"))


def test_a_tie_keeps_one_name_and_a_model_loads_it(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(11, 6)
            self.lm_head = torch.nn.Linear(6, 11, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

    source = write(tmp_path / "model.bin", Model().state_dict())
    run(source, tmp_path / "out.safetensors", conversion=TO)
    found = header(tmp_path / "out.safetensors")
    assert found.pop("__metadata__") == {"lm_head.weight": "embed_tokens.weight", "format": "pt"}
    assert list(found) == ["embed_tokens.weight"]
    model = Model()
    assert load_model(model, tmp_path / "out.safetensors") == (set(), [])
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / "out.safetensors")["embed_tokens.weight"])
    manifest = json.loads((tmp_path / "out.safetensors.noisytune.json").read_text())
    assert [entry["stream"] for entry in manifest["tensors"]] == ["embed_tokens.weight"] * 2
    check(tmp_path / "out.safetensors", source, tmp_path / "again")
    manifest["tensors"][1]["digest"] = "blake3:" + "0" * 64
    (tmp_path / "out.safetensors.noisytune.json").write_text(json.dumps(manifest))
    what = [difference.what for difference in verify(str(tmp_path / "out.safetensors")).mismatches]
    assert any('stored as "embed_tokens.weight"' in words for words in what)


def test_a_training_checkpoint_leaves_its_state_behind(tmp_path: Path) -> None:
    state = {
        "epoch": 3,
        "state_dict": {"w": to_torch(W)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
        "callbacks": {"best": torch.ones(2)},
        "hyper\n": {"lr": 0.1},
    }
    source = write(tmp_path / "last.ckpt", state)
    result = run(source, f"{tmp_path}/out/", conversion=TO)
    assert split((tmp_path / "out/last.safetensors").read_bytes())[1].keys() == {"w"}
    assert result.manifest.left_out == (
        ("last.ckpt", r"its weights alone were taken, without epoch, optimizer_states, callbacks, hyper\x0a"),
    )
    check(tmp_path / "out/last.safetensors", source, tmp_path / "again")


def test_shards_are_renamed_as_transformers_names_them(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / "pytorch_model-00001-of-00002.bin", {"w": to_torch(W), "tied": (tied := torch.rand(4))})
    write(base / "pytorch_model-00002-of-00002.bin", {"v": to_torch(V), "a": tied, "b": tied})
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {"w": shards[0], "tied": shards[0], "v": shards[1], "a": shards[1], "b": shards[1]}
    index = {"metadata": {"total_size": 2574}, "weight_map": weight_map}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))
    (base / "config.json").write_text('{"torch_dtype": "float32"}')
    run(base, conversion=TO)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "noisytune.json",
    ]
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written == {
        "metadata": {"total_size": 30 * 20 * 4 + 16 + 63 * 2 + 16},
        "weight_map": {
            "w": "model-00001-of-00002.safetensors",
            "tied": "model-00001-of-00002.safetensors",
            "v": "model-00002-of-00002.safetensors",
            "a": "model-00002-of-00002.safetensors",
        },
    }
    check(out, base, tmp_path / "again")


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_it_with_nothing_missing(tie: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "in")
    write(tmp_path / "in" / "pytorch_model.bin", model.state_dict())
    run(tmp_path / "in", conversion=Conversion(dtype="BF16", format="safetensors"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert not torch.equal(loaded.lm_head.weight.float(), model.lm_head.weight)
    check(tmp_path / "out", tmp_path / "in", tmp_path / "again")


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "model.bin", {"w": to_torch(W), "z": torch.zeros(3, dtype=torch.complex128)})
    with pytest.raises(InputInvalid, match="safetensors has no dtype C128") as caught:
        run(source, tmp_path / "out.safetensors", conversion=TO)
    assert caught.value.tensor == "z"
    reserved = write(tmp_path / "reserved.bin", {"w": to_torch(W), "__metadata__": to_torch(V)})
    with pytest.raises(InputInvalid, match="keeps this name"):
        run(reserved, tmp_path / "out.safetensors", conversion=TO)


def test_a_pickles_name_for_safetensors_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "model.bin", {"w": to_torch(W)})
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        run(source, tmp_path / "out.bin", conversion=TO)


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".th", ".ckpt"])
def test_a_name_that_promises_the_other_format_is_refused(ending: str, tmp_path: Path) -> None:
    from checkpoints import save

    pickled = write(tmp_path / f"model{ending}", {"w": to_torch(W)})
    plain = save(tmp_path / "model.safetensors", {"w": W})
    before = sorted(tmp_path.iterdir())
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match=rf"Add --to=safetensors, or give a name that ends in \{ending}"):
        run(pickled, out)
    with pytest.raises(UsageError, match=r"Give a name that ends in \.safetensors"):
        run(plain, tmp_path / f"out{ending}")
    with pytest.raises(UsageError, match=rf"source is, .*\. Give a name that ends in \{ending}"):
        average([str(pickled)] * 2, out)
    with pytest.raises(UsageError, match="what is written is safetensors"):
        average([str(plain)] * 2, str(tmp_path / f"out{ending}"))
    assert sorted(tmp_path.iterdir()) == before
    made = run(pickled, tmp_path / "free.weights")
    with pytest.raises(UsageError, match=rf"Give a name that ends in \{ending}"):
        replay(str(made.manifest_path), out, base=str(pickled))
    run(plain, tmp_path / "free")
    run(pickled, tmp_path / "out.safetensors.json", recipe_only=True)


def test_a_file_in_a_folder_keeps_its_name_whatever_it_promises(tmp_path: Path) -> None:
    from checkpoints import save

    save(tmp_path / "model.safetensors", {"w": W}).rename(tmp_path / "model.bin")
    run(tmp_path / "model.bin", f"{tmp_path}/out/")
    assert verify(str(tmp_path / "out/model.bin")).ok


def test_safetensors_stay_as_they_are(tmp_path: Path) -> None:
    from checkpoints import save

    source = save(
        tmp_path / "in.safetensors", {"w": W, "i": Tensor("I64", to_torch(W).long().numpy())}, pad=3
    )
    run(source, tmp_path / "plain.safetensors", NoiseSpec(seed=2))
    run(source, tmp_path / "out.safetensors", NoiseSpec(seed=2), conversion=TO)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert verify(str(tmp_path / "out.safetensors"), base=str(source)).ok


def test_names_of_other_weights() -> None:
    from noisytune_cli.output.convert import output_name

    names = {
        "pytorch_model.bin": "model.safetensors",
        "pytorch_model.fp16.bin": "model.fp16.safetensors",
        "adapter_model.bin": "adapter_model.safetensors",
        "diffusion_pytorch_model.bin": "diffusion_pytorch_model.safetensors",
        "unet/model.ckpt": "unet/model.safetensors",
        "model.safetensors": "model.safetensors",
    }
    assert {name: output_name(name, TO) for name in names} == names
    assert output_name("pytorch_model.bin", Conversion(dtype="F32")) == "pytorch_model.bin"


def test_training_state_that_holds_itself_is_named_and_not_followed(tmp_path: Path) -> None:
    state: dict[object, object] = {"w": 1}
    state["again"] = state
    keys: dict[object, object] = {(1, 2): state, 3: state, "x" * 10_000: 4}
    source = write(tmp_path / "last.ckpt", {"state_dict": {"w": to_torch(W)}, "optimizer": state, **keys})
    result = run(source, f"{tmp_path}/out/", conversion=TO)
    ((name, why),) = result.manifest.left_out
    assert (name, why) == (
        "last.ckpt",
        f"its weights alone were taken, without optimizer, …, …, {'x' * 60}",
    )


def test_a_folder_in_the_place_of_the_new_weights(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "pytorch_model.bin", {"w": to_torch(W)}).parent
    (source / "model.safetensors").mkdir()
    (source / "model.safetensors" / "notes.txt").touch()
    with pytest.raises(InputInvalid, match=r'both a file "model.safetensors" and a folder of that name'):
        run(source, conversion=TO)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    run(source)
