"""Folders of several models: perturbed whole or by component, under FOLDER/KEY, with one manifest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Tensors, noised, save, save_sharded, split, weights
from pickles import saved

from noisytune_cli.commands.average import average
from noisytune_cli.commands.compare import compare
from noisytune_cli.commands.detect import detect
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Perturbed, Request, perturb, plan_perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.plan.evidence import buffers_by_model
from noisytune_cli.plan.evidence.buffers_by_model import Answer
from noisytune_cli.records import Conversion, NoiseSpec
from tests.cli.test_cli import invoke

ENCODER: Tensors = {
    "embeddings.word_embeddings.weight": weights("F32", 20, 8, seed=1),
    "encoder.layer.0.attention.self.query.weight": weights("F32", 8, 8, seed=2),
}
DENSE: Tensors = {"linear.weight": weights("F32", 4, 8, seed=3), "linear.bias": weights("F32", 4, seed=4)}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def modules(*paths: str) -> list[dict[str, object]]:
    return [{"idx": i, "name": str(i), "path": path, "type": "x"} for i, path in enumerate(paths)]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A model of sentence-transformers as people publish it: pooling without weights, a dense layer twice."""
    root = tmp_path / "st"
    save(root / "model.safetensors", ENCODER, {"format": "pt"})
    save(root / "2_Dense/model.safetensors", DENSE)
    twin = {name: torch.from_numpy(tensor.values) for name, tensor in DENSE.items()}
    (root / "2_Dense/pytorch_model.bin").write_bytes(saved(twin))
    write(root / "config.json", {"model_type": "bert"})
    write(root / "1_Pooling/config.json", {})
    write(root / "modules.json", modules("", "1_Pooling", "2_Dense"))
    return root


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline of diffusers: three models with the same names, one of them in shards, with variants."""
    root = tmp_path / "pipe"
    into, out = ({f"conv_{name}.weight": weights("F32", 8, 9, seed=5)} for name in ("in", "out"))
    save_sharded(root / "unet", into, out)
    stem = "diffusion_pytorch_model"
    for folder, name in (("vae", stem), ("text_encoder", "model")):
        save(root / folder / f"{name}.safetensors", {"conv_in.weight": weights("F32", 8, 9, seed=6)})
        save(root / folder / f"{name}.fp16.safetensors", {"conv_in.weight": weights("F16", 8, 9, seed=6)})
        write(root / folder / "config.json", {})
    write(root / "scheduler/scheduler_config.json", {})
    parts: dict[str, Any] = {
        name: ["diffusers", "X"] for name in ("unet", "vae", "text_encoder", "scheduler")
    }
    write(
        root / "model_index.json",
        {"_class_name": "StableDiffusionPipeline", "feature": [None, None], **parts},
    )
    return root


def run(source: Path, out: Path, **options: Any) -> Perturbed:
    return perturb(Request(str(source), NoiseSpec(), **options), str(out))


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def check_noise(out: Path, of: Tensors, folder: str) -> None:
    """Hold a component's file against the reference, its streams named FOLDER/KEY."""
    _, found = split(out.read_bytes())
    prefix = f"{folder}/" if folder else ""
    expected = noised(of, NoiseSpec(), {name: prefix + name for name in of})
    assert found == expected


def test_a_sentence_transformers_model_is_perturbed_whole(sentences: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(sentences, out)
    check_noise(out / "model.safetensors", ENCODER, "")
    check_noise(out / "2_Dense/model.safetensors", DENSE, "2_Dense")
    names = [*ENCODER, *(f"2_Dense/{name}" for name in DENSE)]
    assert sorted(r.step.tensor.name for r in done.manifest.receipts) == sorted(names)
    assert all(r.step.stream == r.step.tensor.name for r in done.manifest.receipts)
    copied = {"1_Pooling/config.json", "config.json", "modules.json"}
    assert files(out).keys() == {"model.safetensors", "2_Dense/model.safetensors", "noisytune.json", *copied}
    assert [name for name, _ in done.manifest.left_out] == ["2_Dense/pytorch_model.bin"]


def test_a_composition_is_verified_replayed_and_averaged(sentences: Path, tmp_path: Path) -> None:
    run(sentences, tmp_path / "out")
    assert verify(str(tmp_path / "out")).ok
    assert verify(str(tmp_path / "out"), base=str(sentences)).ok
    replay(str(tmp_path / "out"), str(tmp_path / "again"), base=str(sentences))
    assert files(tmp_path / "again") == files(tmp_path / "out")
    average([str(sentences), str(tmp_path / "out")], str(tmp_path / "mean"))
    assert verify(str(tmp_path / "mean")).ok
    _, mean = split((tmp_path / "mean/2_Dense/model.safetensors").read_bytes())
    assert mean["linear.bias"] != DENSE["linear.bias"].data
    dense = tmp_path / "out/2_Dense/model.safetensors"
    content = bytearray(dense.read_bytes())
    content[-1] ^= 1
    dense.write_bytes(content)
    (found,) = verify(str(tmp_path / "out")).mismatches
    assert (found.file, found.tensor) == ("2_Dense/model.safetensors", "2_Dense/linear.bias")


def test_a_component_may_be_a_pickle_whose_names_are_tied(tmp_path: Path) -> None:
    root = tmp_path / "in"
    table = torch.randn(9, 4)
    for folder in ("0_Transformer", "1_Head"):
        state = {"shared.weight": table, "encoder.embed_tokens.weight": table, "w": torch.randn(3, 4).t()}
        (root / folder).mkdir(parents=True)
        (root / folder / "pytorch_model.bin").write_bytes(saved(state))
    write(root / "modules.json", modules("0_Transformer", "1_Head"))
    run(root, tmp_path / "out")
    assert verify(str(tmp_path / "out"), base=str(root)).ok
    noisy = [
        torch.load(tmp_path / "out" / folder / "pytorch_model.bin", weights_only=True)
        for folder in ("0_Transformer", "1_Head")
    ]
    for state in noisy:
        assert state["shared.weight"].data_ptr() == state["encoder.embed_tokens.weight"].data_ptr()
    assert not torch.equal(noisy[0]["shared.weight"], noisy[1]["shared.weight"])


def test_a_pipeline_asks_for_its_components(pipeline: Path, tmp_path: Path) -> None:
    result = invoke("perturb", pipeline, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "its components with weights are text_encoder, unet, vae. Name those" in result.stderr
    assert invoke("perturb", pipeline, "-o", tmp_path / "out", "--component", "unet,x").exit_code == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputInvalid, match="a pipeline of several models"):
        inspect(str(pipeline))
    rows = inspect(str(pipeline), components=["vae"]).tensors
    assert [row.name for row in rows] == ["vae/conv_in.weight"]


def test_the_components_asked_for_get_noise_and_the_summary_says_of_how_many(
    pipeline: Path, tmp_path: Path
) -> None:
    result = invoke("perturb", pipeline, "-o", tmp_path / "out", "--component", "unet, vae", "--json")
    assert result.exit_code == 0, result.output
    assert "perturbed 3 of 3 tensors in 3 of 5 weight files (λ" in result.stderr
    assert json.loads(result.stdout)["weight_files"] == {"perturbed": 3, "copied": 2}
    before, after = files(pipeline), files(tmp_path / "out")
    assert {name for name in before if name in after and before[name] != after[name]} == {
        "unet/model-00001-of-00002.safetensors",
        "unet/model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert before.keys() - after.keys() == {"vae/diffusion_pytorch_model.fp16.safetensors"}
    tensors = {"conv_in.weight": weights("F32", 8, 9, seed=6)}
    check_noise(tmp_path / "out/vae/diffusion_pytorch_model.safetensors", tensors, "vae")
    assert verify(str(tmp_path / "out"), base=str(pipeline)).ok
    replay(str(tmp_path / "out"), str(tmp_path / "again"), base=str(pipeline))
    assert files(tmp_path / "again") == after


def test_all_components_get_noise_of_their_own(pipeline: Path, tmp_path: Path) -> None:
    done = run(pipeline, tmp_path / "out", components=("all",))
    streams = {r.step.stream for r in done.manifest.receipts if r.action == "perturb"}
    assert streams == {
        "text_encoder/conv_in.weight",
        "unet/conv_in.weight",
        "unet/conv_out.weight",
        "vae/conv_in.weight",
    }
    one, other = (
        split((tmp_path / "out" / name).read_bytes())[1]["conv_in.weight"]
        for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    )
    assert not np.array_equal(np.frombuffer(one, np.float32), np.frombuffer(other, np.float32))


def test_noise_in_a_pipeline_is_compared_and_detected(pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(pipeline, out, components=("unet",))
    found = compare(str(pipeline), str(out), components=("all",))
    changed = {row.name for row in found.rows if row.equal != 1.0}
    assert changed == {"unet/conv_in.weight", "unet/conv_out.weight"}
    assert [row.name for row in found.rows if row.name not in changed] == [
        "text_encoder/conv_in.weight",
        "vae/conv_in.weight",
    ]
    (score,) = detect(str(out), seeds=[0], base=str(pipeline), components=("unet",)).seeds
    assert {tensor.stream for tensor in score.tensors} == changed
    with pytest.raises(InputInvalid, match="a pipeline of several models"):
        compare(str(pipeline), str(out))


@pytest.fixture
def composed(tmp_path: Path) -> Path:
    """Two models side by side that name their tensors alike; only one config knows of the other's things."""
    root = tmp_path / "composed"
    table = weights("F32", 20, 8, seed=1)
    tensors = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "h.0.attn.query_key_value.weight": weights("F32", 24, 8, seed=2),
    }
    configs = {
        "0_Tied": {"model_type": "bloom", "n_head": 2, "hidden_size": 8},
        "1_Apart": {"model_type": "x", "tie_word_embeddings": False},
    }
    for folder, config in configs.items():
        save(root / folder / "model.safetensors", tensors)
        write(root / folder / "config.json", config)
    write(root / "modules.json", modules("0_Tied", "1_Apart"))
    return root


def test_each_component_is_judged_by_its_own_config(composed: Path, tmp_path: Path) -> None:
    done = perturb(Request(str(composed), NoiseSpec(granularity="matrix")), str(tmp_path / "out"))
    steps = {r.step.tensor.name: r.step for r in done.manifest.receipts}
    tied = {name: step.stream for name, step in steps.items() if step.stream != name}
    assert tied == {"0_Tied/lm_head.weight": "0_Tied/model.embed_tokens.weight"}
    fused = "h.0.attn.query_key_value.weight"
    assert [part.name for part in steps[f"0_Tied/{fused}"].parts] == ["q", "k", "v"]
    assert not steps[f"1_Apart/{fused}"].parts


def test_a_component_whose_config_calls_it_quantised_is_refused(composed: Path, tmp_path: Path) -> None:
    write(composed / "1_Apart/config.json", {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(InputInvalid, match="GPTQ") as refused:
        run(composed, tmp_path / "out")
    assert refused.value.path == str(composed / "1_Apart")
    run(composed, tmp_path / "out", components=("0_Tied",))
    metadata = {"format": "pt", "quantization": "gptq"}
    save(composed / "0_Tied/model.safetensors", {"w": weights("F32", 9, 4)}, metadata)
    with pytest.raises(InputInvalid, match="__metadata__ has quantization"):
        run(composed, tmp_path / "other", components=("0_Tied",))


def test_a_component_whose_config_is_of_no_use_is_warned_of(composed: Path, tmp_path: Path) -> None:
    (composed / "1_Apart/config.json").write_text("[]")
    done = run(composed, tmp_path / "out")
    assert [warning for warning in done.warnings if "1_Apart/config.json" in warning]


def test_configs_of_components_that_differ_are_refused_in_an_average(composed: Path, tmp_path: Path) -> None:
    shutil.copytree(composed, tmp_path / "other")
    write(tmp_path / "other/1_Apart/config.json", {"model_type": "y", "tie_word_embeddings": False})
    with pytest.raises(InputInvalid, match=r"1_Apart/config.json differs.*model_type"):
        average([str(composed), str(tmp_path / "other")], str(tmp_path / "out"))


def test_a_component_asks_the_model_of_its_own_config(
    composed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(request: Any) -> Answer:
        asked.append((request["config"]["model_type"], request["names"]))
        return Answer({"pos_embed": "buffer"}, (("pos_embed", "table"),))

    monkeypatch.setattr(buffers_by_model, "_run", answer)
    tensors = {"pos_embed": weights("F32", 9, 4), "table": weights("F32", 9, 4)}
    for folder in ("0_Tied", "1_Apart"):
        save(composed / folder / "model.safetensors", tensors)
    write(composed / "1_Apart/config.json", {"architectures": ["BertModel"], "model_type": "bert"})
    for buffers_from in ("auto", "model"):
        request = Request(str(composed), NoiseSpec(), buffers_from=buffers_from)
        told = {step.tensor.name: step.told_by for step in plan_perturb(request).plan.steps}
        assert told["1_Apart/pos_embed"] == "model"
        assert told["0_Tied/pos_embed"] != "model"
    assert asked == [("bert", ["pos_embed", "table"])] * 2
    write(composed / "1_Apart/config.json", {})
    with pytest.raises(UsageError, match="no model can be asked"):
        plan_perturb(replace(request, buffers_from="model"))


def test_weights_takes_one_file_under_its_own_keys(sentences: Path, tmp_path: Path) -> None:
    run(sentences, tmp_path / "out", weights="2_Dense/model.safetensors")
    check_noise(tmp_path / "out/2_Dense/model.safetensors", DENSE, "")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (sentences / "model.safetensors").read_bytes()
    assert verify(str(tmp_path / "out"), base=str(sentences)).ok
    result = invoke("perturb", sentences, "-o", tmp_path / "one", "--weights", "model.safetensors")
    assert "in 1 of 3 weight files" in result.stderr


def test_a_component_of_a_sentence_transformers_model_may_be_asked_for(
    sentences: Path, tmp_path: Path
) -> None:
    run(sentences, tmp_path / "out", components=(".",))
    check_noise(tmp_path / "out/model.safetensors", ENCODER, "")
    assert (tmp_path / "out/2_Dense/model.safetensors").read_bytes() == (
        sentences / "2_Dense/model.safetensors"
    ).read_bytes()
    assert verify(str(tmp_path / "out"), base=str(sentences)).ok


@pytest.mark.parametrize(
    "listed",
    ["[", "{}", "[]", '["2_Dense"]', '[{"path": 7}, {"path": "../x"}]', '[{"path": "1_Pooling"}]', "7"],
)
def test_what_lists_no_components_makes_no_composition(sentences: Path, tmp_path: Path, listed: str) -> None:
    (sentences / "modules.json").write_text(listed)
    done = run(sentences, tmp_path / "out")
    assert {r.step.tensor.name for r in done.manifest.receipts} == set(ENCODER)
    with pytest.raises(UsageError, match="--component cannot be used"):
        run(sentences, tmp_path / "other", components=("2_Dense",))


def test_a_component_cannot_be_chosen_twice_or_in_a_file(sentences: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--weights and --component"):
        run(sentences, tmp_path / "out", components=("2_Dense",), weights="model.safetensors")
    with pytest.raises(UsageError, match=r"--component cannot be used.*SOURCE is a file"):
        run(sentences / "model.safetensors", tmp_path / "out", components=("2_Dense",))


def test_components_are_not_converted(sentences: Path, tmp_path: Path) -> None:
    for conversion in (Conversion(dtype="BF16"), Conversion(format="safetensors")):
        with pytest.raises(UsageError, match=r"are for one model.*one by one"):
            run(sentences, tmp_path / "out", conversion=conversion)
    run(sentences, tmp_path / "out", conversion=Conversion(dtype="BF16"), components=(".",))
    assert verify(str(tmp_path / "out"), base=str(sentences)).ok


def test_another_model_of_one_training_comes_along_and_is_counted(tmp_path: Path) -> None:
    for name in ("model", "model_1", "model_2"):
        save(tmp_path / f"in/{name}.safetensors", {"w": weights("F32", 9, 4, seed=len(name))})
    result = invoke("perturb", tmp_path / "in", "-o", tmp_path / "out")
    assert "perturbed 1 of 1 tensors in 1 of 3 weight files" in result.stderr
    assert (tmp_path / "out/model_1.safetensors").read_bytes() == (
        tmp_path / "in/model_1.safetensors"
    ).read_bytes()
    assert "left out" not in result.stderr


def test_an_index_says_of_a_component_what_its_tensors_are_called(pipeline: Path, tmp_path: Path) -> None:
    shutil.rmtree(pipeline / "text_encoder")
    tied, other = ({name: weights("F32", 8, 9, seed=6)} for name in ("lm_head.weight", "model.w"))
    save_sharded(pipeline / "text_encoder", tied, other)
    (index,) = (pipeline / "text_encoder").glob("*.index.json")
    said = json.loads(index.read_bytes())
    said["metadata"]["model.embed_tokens.weight"] = "lm_head.weight"
    write(index, said)
    done = run(pipeline, tmp_path / "out", components=("text_encoder",))
    assert "text_encoder/model.embed_tokens.weight" in {r.step.stream for r in done.manifest.receipts}
    assert verify(str(tmp_path / "out")).mismatches == ()
    assert verify(str(tmp_path / "out"), base=str(pipeline)).mismatches == ()


def test_a_recipe_of_a_composition_is_replayed(sentences: Path, tmp_path: Path) -> None:
    run(sentences, tmp_path / "out")
    perturb(Request(str(sentences), NoiseSpec()), str(tmp_path / "recipe.json"), recipe_only=True)
    replay(str(tmp_path / "recipe.json"), str(tmp_path / "again"), base=str(sentences))
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_a_model_whose_names_begin_with_its_folder_is_no_component(tmp_path: Path) -> None:
    save(tmp_path / "in/params/model.safetensors", {"params/encoder": weights("F32", 8, 9)})
    run(tmp_path / "in", tmp_path / "out", weights="params/model.safetensors")
    for base in (None, str(tmp_path / "in")):
        assert verify(str(tmp_path / "out"), base=base).mismatches == ()
    replay(str(tmp_path / "out"), str(tmp_path / "again"), base=str(tmp_path / "in"))
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize("name", ["refiner", "model_1"])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_index_of_another_model_comes_along(tmp_path: Path, name: str, sharded: bool) -> None:
    first, second, *others = ({part: weights("F32", 8, 9)} for part in "abcd")
    save_sharded(tmp_path / "other", *others)
    for path in (tmp_path / "other").iterdir():
        target = tmp_path / "in" / path.name.replace("model", name, 1)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes().replace(b'"model-', f'"{name}-'.encode()))
    if sharded:
        save_sharded(tmp_path / "in", first, second)
    else:
        save(tmp_path / "in/model.safetensors", first)
    main = "model.safetensors.index.json" if sharded else "model.safetensors"
    done = run(tmp_path / "in", tmp_path / "out", weights=main)
    assert f"{name}.safetensors.index.json" in dict(done.manifest.copied)
    assert verify(str(tmp_path / "out"), base=str(tmp_path / "in")).mismatches == ()
    replay(str(tmp_path / "out"), str(tmp_path / "again"), base=str(tmp_path / "in"))
    assert files(tmp_path / "again") == files(tmp_path / "out")
