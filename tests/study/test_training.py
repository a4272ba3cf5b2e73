"""Runs by themselves: every method, regression, LoRA, a decoder, the probe, and what must not change."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    XLNetConfig,
    XLNetModel,
)

from noisytune_cli.errors import InputInvalid
from noisytune_cli.study import methods
from noisytune_cli.study.data.encoding import Encoded, encode
from noisytune_cli.study.data.tasks import Task, TaskRows
from noisytune_cli.study.design import Run, Seeds, plan_runs
from noisytune_cli.study.settings import Material, Recipe
from noisytune_cli.study.training.pretrained import Lora, Pretrained, _without_adapters
from noisytune_cli.study.training.probe import features
from noisytune_cli.study.training.training import Bench

from .conftest import Tiny
from .tiny import save_model

TASK = Task("tiny", ("sentence",), "label", ("accuracy", "matthews"))
RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=1e-3)


def bench(tiny: Tiny, recipe: Recipe = RECIPE, **changed: Any) -> Bench:
    material = Material(tiny.model, TASK, (tiny.train,), (tiny.dev,), train_rows=24, held_out=8)
    return Bench(dataclasses.replace(material, **changed), recipe, "cpu", 1)


def a_run(method: str, **seeds: int) -> Run:
    (run,) = plan_runs(
        [method],
        lambdas=[0.15],
        noises=["uniform"],
        scopes=["matrix"],
        shares=[1.0],
        seeds=Seeds([3], **seeds),
        settings={"deni.members": 3, "recadam.gamma": 100.0},  # what so few steps at so high a rate allow
    )
    return run


@pytest.mark.parametrize("method", [*methods.names(), "noisytune+mixout", "noisytune+recadam"])
def test_every_method_runs_to_its_end_and_gives_the_same_numbers_again(tiny: Tiny, method: str) -> None:
    place = bench(tiny)
    pretrained = {name: p.clone() for name, p in place.pretrained.start(0, place.device).anchor.items()}
    first, second = place.carry_out(a_run(method)), place.carry_out(a_run(method))
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    assert math.isfinite(first["loss"])
    assert first["method"] == method
    assert first["steps"] == 6
    assert first["member_steps"] >= 6
    assert first["forwards"] >= first["member_steps"]
    assert set(first["dev"]) == set(first["held_out"]) == {"accuracy", "matthews"}
    after = place.pretrained.start(0, place.device).anchor
    assert all(torch.equal(after[name], values) for name, values in pretrained.items())


def test_methods_differ_from_plain(tiny: Tiny) -> None:
    place = bench(tiny)
    losses = {name: place.carry_out(a_run(name))["loss"] for name in ("plain", "noisytune", "neftune", "r3f")}
    assert len(set(losses.values())) == 4


def test_bfloat16_is_that_of_the_passes_alone(tiny: Tiny) -> None:
    full = bench(tiny).carry_out(a_run("plain"))
    place = bench(tiny, dataclasses.replace(RECIPE, precision="bfloat16"))
    half = place.carry_out(a_run("plain"))
    assert half["loss"] != full["loss"]
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02)
    # The weights stay float32: changes that bfloat16 could not hold are kept.
    for kind, change in full["drift"].items():
        assert half["drift"][kind]["change_norm"] == pytest.approx(change["change_norm"], rel=0.05)


def test_the_cost_is_counted(tiny: Tiny) -> None:
    place = bench(tiny)
    counted = {name: place.carry_out(a_run(name)) for name in ("plain", "r3f")}
    assert [counted["plain"][k] for k in ("member_steps", "forwards")] == [6, 6]
    assert [counted["r3f"][k] for k in ("member_steps", "forwards")] == [6, 12]


def test_the_head_is_drawn_from_its_seed_alone(tiny: Tiny) -> None:
    place = bench(tiny)
    one, same, other = (place.pretrained.start(seed, place.device) for seed in (1, 1, 2))
    assert one.fresh == {"classifier.weight", "classifier.bias"}
    assert not one.fresh & one.anchor.keys()
    heads = [start.model.get_parameter("classifier.weight") for start in (one, same, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.1 < float(heads[0].detach().std()) < 0.3  # the config's initializer_range is 0.2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_run_says_whether_anything_is_drawn_from_the_seed_of_initialisation(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    Pretrained(tiny.model, 2)._model.save_pretrained(folder)
    runs = [bench(tiny, model=folder).carry_out(a_run("plain", init=init, order=0)) for init in (0, 1)]
    assert [run["fresh"] for run in runs] == [False, False]
    assert runs[0]["loss"] == runs[1]["loss"]
    adapted = bench(tiny, dataclasses.replace(RECIPE, lora_rank=2), model=folder)
    assert adapted.carry_out(a_run("plain"))["fresh"]
    assert bench(tiny).carry_out(a_run("plain"))["fresh"]


def test_the_order_of_rows_is_its_seed_s_and_every_epoch_has_all_of_them(tiny: Tiny) -> None:
    place = bench(tiny)
    batches = list(place._batches(place.train, order_seed=5))
    assert [len(batch) for batch in batches] == [8] * 6
    epochs = [[i for batch in part for i in batch] for part in (batches[:3], batches[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]
    assert batches == list(place._batches(place.train, order_seed=5))
    assert batches != list(place._batches(place.train, order_seed=6))


def test_batches_of_similar_length_have_less_padding_and_every_row(tiny: Tiny) -> None:
    place = bench(tiny, dataclasses.replace(RECIPE, group_by_length=True))
    lengths = [3, 30, 9] * 100
    rows = Encoded(
        {"input_ids": [[1] * n for n in lengths]}, {"input_ids": 0}, (0.0,) * len(lengths), regression=False
    )
    batches = list(place._batches(rows, order_seed=5))
    assert [sorted(i for b in part for i in b) for part in (batches[:38], batches[38:])] == [
        list(range(300))
    ] * 2
    assert batches == list(place._batches(rows, order_seed=5))
    assert batches[:38] != batches[38:]

    def padded(found: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in found)

    assert padded(batches) < 0.7 * padded(list(bench(tiny)._batches(rows, order_seed=5)))


def test_the_rate_rises_and_falls_to_0(tiny: Tiny) -> None:
    from noisytune_cli.study.training.training import _linear_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    schedule = _linear_schedule(optimizer, 2, 6)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.5, 1.0, 0.5, 0.0])


def test_biases_and_norms_do_not_decay(tiny: Tiny) -> None:
    place = bench(tiny)
    model = place.pretrained.start(0, place.device).model
    decayed, spared = place._optimizer(model).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith(".bias") or "LayerNorm" in names[id(p)] for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_regression_predicts_numbers(tiny: Tiny) -> None:
    task = dataclasses.replace(TASK, metrics=("pearson", "spearman"))
    run = bench(tiny, task=task).carry_out(a_run("plain"))
    assert set(run["dev"]) == {"pearson", "spearman"}
    assert len({type(value) for value in run["predictions"]} | {float}) == 1
    assert len(set(run["predictions"])) > 2


def test_lora_trains_adapters_and_head_and_has_the_noise_of_a_full_run(tiny: Tiny) -> None:
    place = bench(tiny, dataclasses.replace(RECIPE, lora_rank=2, learning_rate=1e-2))
    start = place.pretrained.start(0, place.device)
    trained = {name for name, p in start.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert not any("lora_" in name or "classifier" in name for name in start.anchor)
    full = bench(tiny).pretrained.start(0, place.device)
    assert len(start.anchor) == len(full.anchor)
    record = place.carry_out(a_run("noisytune"))
    assert record["drift"] is None
    assert record["loss"] != place.carry_out(a_run("plain"))["loss"]


def test_a_decoder_without_a_padding_token_is_trained_too(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "[PAD]"', '"eos_token": "[SEP]"'))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2Model(config).save_pretrained(folder)
    place = bench(tiny, model=folder)
    assert place.train.padding["input_ids"] == place.pretrained.tokenizer.eos_token_id
    for method in ("plain", "noisytune", "r3f"):
        assert math.isfinite(place.carry_out(a_run(method))["loss"])


def alone_and_padded(pretrained: Pretrained) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row's logits by itself, and beside a longer one."""
    texts = (("the film was good",), ("the film was very very very dull",))
    rows = TaskRows(texts, (0.0, 1.0))
    encoded = encode(pretrained.tokenizer, rows, max_length=32, regression=False)
    model = pretrained.start(0, torch.device("cpu")).model.eval()
    batches = (encoded.batch(places, torch.device("cpu")) for places in ([0], [0, 1]))
    with torch.inference_mode():
        alone, padded = (model(**{k: v for k, v in b.items() if k != "labels"}).logits[0] for b in batches)
    return alone, padded


def test_what_a_row_is_padded_with_is_no_token_of_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (folder / "model.safetensors").unlink()
    # Its config names another token than the tokenizer pads with.
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=9)
    GPT2Model(config).save_pretrained(folder)
    alone, padded = alone_and_padded(Pretrained(folder, 2))
    torch.testing.assert_close(padded, alone)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_takes_the_last_position_finds_a_token_there(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32, initializer_range=0.5)
    (folder / "model.safetensors").unlink()
    XLNetModel(config).save_pretrained(folder)
    alone, padded = alone_and_padded(Pretrained(folder, 2))
    torch.testing.assert_close(padded, alone, rtol=1e-3, atol=1e-5)


def test_a_row_without_tokens_is_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = encode(tokenizer, TaskRows((("",), ("good",)), (0.0, 1.0)), max_length=8, regression=False)
    assert found.inputs["attention_mask"][0] == [1, 1]  # [CLS] [SEP]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    bare = encode(tokenizer, TaskRows((("",), ("",)), (0.0, 1.0)), max_length=8, regression=False)
    batch = bare.batch([0, 1], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[tokenizer.pad_token_id]] * 2
    assert batch["attention_mask"].tolist() == [[1]] * 2


#: Encoders whose heads have more than one layer, or other names than classifier and score.
HEADS: dict[str, Any] = {
    "bert": {},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    "deberta-v2": {},
    "modernbert": {"global_attn_every_n_layers": 1},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
    | {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "xlnet": {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 24},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HEADS)
def test_under_lora_the_whole_head_is_trained(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    special = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = AutoConfig.for_model(kind, vocab_size=34, **special, **(HEADS[kind] or size))
    if kind in ("deberta-v2", "modernbert"):
        config = AutoConfig.for_model(kind, vocab_size=34, **special, **size, **HEADS[kind])
    AutoModel.from_config(config).save_pretrained(folder)
    pretrained = Pretrained(folder, 2, Lora(2, 4, 0.0))
    model = pretrained.start(0, torch.device("cpu")).model
    trained = {_without_adapters(name) for name, p in model.named_parameters() if p.requires_grad}
    assert pretrained._fresh
    assert trained >= pretrained._fresh
    assert any(".lora_" in name for name in trained)
    assert not any(".lora_" in name and name.split(".")[0] in HEADS_OF for name in trained)


#: What heads are called.
HEADS_OF = {"classifier", "pre_classifier", "pooler", "head", "classification_head", "logits_proj"}


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mpnet", "bert", "camembert", "ibert"])
def test_a_row_has_no_more_tokens_than_the_model_has_positions(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "model")
    config = AutoConfig.for_model(
        kind,
        vocab_size=34,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    pretrained = Pretrained(tmp_path / "model", 2)
    assert pretrained.longest == (34 if kind == "bert" else 32)
    model = pretrained.start(0, torch.device("cpu")).model
    assert model(torch.full((1, pretrained.longest), 5)).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, pretrained.longest + 1), 5))


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


def save_kind(kind: str, folder: Path, **settings: Any) -> Path:
    """Save a random encoder of a kind with the tiny model's tokenizer."""
    save_model(folder)
    special = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = AutoConfig.for_model(kind, vocab_size=34, **special, **settings)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["t5", "modernbert", "mpnet", "xlnet"])
def test_the_head_is_the_one_that_transformers_draws(kind: str, tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    folder = save_kind(kind, tmp_path, **{"t5": T5, "xlnet": HEADS["xlnet"]}.get(kind, size))
    drawn = Pretrained(folder, 2).start(5, torch.device("cpu")).model
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    named = dict(model.named_parameters())
    assert all(torch.equal(values, named[name]) for name, values in drawn.named_parameters())


def test_a_model_without_a_limit_reads_rows_of_any_length(tmp_path: Path) -> None:
    pretrained = Pretrained(save_kind("xlnet", tmp_path, **HEADS["xlnet"]), 2)
    assert pretrained.longest == 1 << 20


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 3}, {"vocab_size": 40}, {"hidden_size": 16}, {}])
def test_an_encoder_that_would_begin_at_random_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    if not changed:  # names that are another wrapper's
        weights = load_file(folder / "model.safetensors")
        renamed = {f"module.{name}": values for name, values in weights.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputInvalid, match="weights do not fit the model"):
        Pretrained(folder, 2)


@pytest.mark.parametrize("changed", [{"hidden_size": "x"}, {"pad_token_id": 9999}, {}])
def test_whatever_transformers_raises_is_one_line(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    if not changed:  # what torch's own loader does not read
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({**weights, "args": argparse.Namespace(epochs=3)}, folder / "pytorch_model.bin")
    with pytest.raises(InputInvalid, match="cannot load a classifier"):
        Pretrained(folder, 2)


def test_a_token_without_an_embedding_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["film"], special_tokens=True)  # known: no new number
    tokenizer.add_tokens(["novella"])
    tokenizer.save_pretrained(folder)
    assert bench(tiny, model=folder)  # no row has it
    dev = tmp_path / "dev.tsv"
    dev.write_text("sentence\tlabel\nthe novella was good\t1\n")
    number = len(tokenizer) - 1
    with pytest.raises(InputInvalid, match=f"the number {number}, and the model has {number} embeddings"):
        bench(tiny, model=folder, dev=(dev,))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputInvalid, match="the tokenizer is not this model's"):
        Pretrained(folder, 2)


@pytest.mark.filterwarnings("ignore")
def test_a_text_that_ends_twice_is_refused_where_the_head_reads_the_end(tiny: Tiny, tmp_path: Path) -> None:
    dev = tmp_path / "dev.tsv"
    dev.write_text("sentence\tlabel\nthe film was good\t1\nthe film [SEP] was bad\t0\n")
    assert bench(tiny, dev=(dev,))  # an encoder reads its first token
    folder = save_kind("t5", tmp_path / "t5", **T5)
    with pytest.raises(InputInvalid, match=r"\[CLS\] the film \[SEP\] was bad \[SEP\]. Take \[SEP\] out of"):
        bench(tiny, model=folder, dev=(dev,))


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_diverges_is_recorded_and_probed(tiny: Tiny) -> None:
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30)
    place = bench(tiny, recipe, probe=TASK, probe_train=(tiny.train,), probe_dev=(tiny.dev,))
    run = place.carry_out(a_run("plain"))
    assert run["loss"] is None
    assert "attention" not in run["drift"]
    json.dumps(run, allow_nan=False)


@pytest.mark.filterwarnings("ignore")
def test_the_probe_reads_the_encoder_where_there_is_a_decoder(tiny: Tiny, tmp_path: Path) -> None:
    place = bench(tiny, model=save_kind("t5", tmp_path, **T5))
    model = place.pretrained.start(0, place.device).model.eval()
    assert features(model, place.dev, 8).shape == (len(place.dev), 32)


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputInvalid, match="the tokenizer knows no words"):
        Pretrained(folder, 2)


def test_the_probe_reads_the_finetuned_encoder_and_changes_nothing(tiny: Tiny) -> None:
    plain = bench(tiny).carry_out(a_run("plain"))
    probed = bench(tiny, probe=TASK, probe_train=(tiny.train,), probe_dev=(tiny.dev,)).carry_out(
        a_run("plain")
    )
    assert plain["probe"] is None
    assert probed["probe"]["task"] == "tiny"
    # The adjective alone gives the label, so a linear model finds it in the mean of the tokens.
    assert probed["probe"]["accuracy"] > 0.9
    assert (probed["loss"], probed["predictions"]) == (plain["loss"], plain["predictions"])
