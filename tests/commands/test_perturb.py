"""Which tensors get which noise, from end to end."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Tensor, Tensors, noised, numbers, save, save_sharded, split, weights
from runs import run

from noisytune_cli.commands.perturb import Perturbed, Planned, Request, perturb, plan_perturb
from noisytune_cli.records import NoiseSpec

EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


DECODER = "cls.predictions.decoder.weight"


BERT: Tensors = {
    EMBEDDINGS: weights("F32", 40, 8, seed=1),
    "bert.embeddings.position_ids": Tensor("I64", np.arange(16).reshape(1, 16)),
    "bert.embeddings.LayerNorm.weight": weights("F32", 8, seed=2, centre=1.0),
    "bert.encoder.layer.0.attention.self.query.weight": weights("F32", 8, 8, seed=3),
    "bert.encoder.layer.0.attention.self.query.bias": weights("F32", 8, seed=4),
    "bert.encoder.layer.0.intermediate.dense.weight": weights("F32", 16, 8, seed=5),
    "cls.predictions.bias": weights("F32", 40, seed=6),
    DECODER: weights("F32", 40, 8, seed=1),
    "cls.predictions.decoder.bias": weights("F32", 40, seed=6),
}


GPT2: Tensors = {
    "transformer.wte.weight": weights("F32", 30, 8, seed=1),
    "transformer.wpe.weight": weights("F32", 12, 8, seed=2),
    "transformer.h.0.attn.bias": Tensor("F32", np.tril(np.ones((1, 1, 12, 12), "<f4"))),
    "transformer.h.0.attn.c_attn.weight": weights("F32", 8, 24, seed=3),
    "transformer.h.0.attn.c_attn.bias": weights("F32", 24, seed=4),
    "transformer.ln_f.weight": numbers("F32", *[1.0] * 8),
    "lm_head.weight": weights("F32", 30, 8, seed=1),
}


def check(result: Perturbed, tensors: Tensors, noise: NoiseSpec, *copied: str, **streams: str) -> None:
    """Hold a file's tensors against the reference; `copied` name those without noise."""
    _, found = split(result.output.read_bytes())
    subject = {name: tensor for name, tensor in tensors.items() if name not in copied}
    expected = noised(subject, noise, streams)
    assert found == {name: expected.get(name, tensor.data) for name, tensor in tensors.items()}
    receipts = {r.step.tensor.name: r for r in result.manifest.receipts}
    for name, receipt in receipts.items():
        assert receipt.action == ("copy" if name in copied else "perturb")
        assert receipt.step.stream == streams.get(name, name)


def test_bert(tmp_path: Path) -> None:
    source = save(tmp_path / "bert.safetensors", BERT, {"format": "pt"})
    result = run(source, tmp_path / "out.safetensors")
    check(
        result,
        BERT,
        NoiseSpec(),
        "bert.embeddings.position_ids",
        **{DECODER: EMBEDDINGS, "cls.predictions.decoder.bias": "cls.predictions.bias"},
    )
    assert result.warnings == result.cleared == ()


def test_gpt2(tmp_path: Path) -> None:
    source = save(tmp_path / "gpt2.safetensors", GPT2)
    result = run(source)
    mask, constant = "transformer.h.0.attn.bias", "transformer.ln_f.weight"
    check(result, GPT2, NoiseSpec(), mask, constant, **{"lm_head.weight": "transformer.wte.weight"})
    reasons = {r.step.tensor.name: r.reason for r in result.manifest.receipts}
    assert (reasons[mask], reasons[constant]) == ("buffer", "constant")


def test_the_multilingual_preset_leaves_embeddings_and_their_tied_head(tmp_path: Path) -> None:
    noise = NoiseSpec(lam=0.1, exclude=("@embeddings",))
    for name, tensors, left in (
        ("bert", BERT, {EMBEDDINGS, DECODER, "bert.embeddings.position_ids"}),
        ("gpt2", GPT2, {"transformer.wte.weight", "lm_head.weight"}),
    ):
        result = run(save(tmp_path / f"{name}.safetensors", tensors), tmp_path / f"{name}-out", noise)
        _, found = split(result.output.read_bytes())
        unchanged = {key for key, tensor in tensors.items() if found[key] == tensor.data}
        assert left <= unchanged
        assert "bert.encoder.layer.0.attention.self.query.weight" not in unchanged
        assert "transformer.h.0.attn.c_attn.weight" not in unchanged


def test_a_shard_without_the_others_is_warned_of(tmp_path: Path) -> None:
    head = {"lm_head.weight": GPT2["transformer.wte.weight"]}
    root = save_sharded(tmp_path / "model", {k: t for k, t in GPT2.items() if k not in head}, head)
    name = "model-00002-of-00002.safetensors"
    assert not any("shards" in warning for warning in run(root).warnings)
    for result in (run(root / name, tmp_path / "a.safetensors"), run(root, tmp_path / "b", weights=name)):
        (told,) = (warning for warning in result.warnings if "shards" in warning)
        assert told.startswith(f"{name} is one of 2 shards and is taken for a whole")
    whole = save(tmp_path / "model-00001-of-00001.safetensors", GPT2)
    assert not any("shards" in warning for warning in run(whole, tmp_path / "c.safetensors").warnings)


def test_equal_bytes_are_a_tie_only_where_the_config_allows(tmp_path: Path) -> None:
    root = tmp_path / "model"
    save(root / "model.safetensors", GPT2)
    (root / "config.json").write_text('{"model_type": "gpt2", "tie_word_embeddings": false}')
    result = run(root, tmp_path / "untied")
    found = split((result.output / "model.safetensors").read_bytes())[1]
    assert found["lm_head.weight"] != found["transformer.wte.weight"]
    (root / "config.json").write_text('{"model_type": "gpt2"}')
    result = run(root, tmp_path / "tied")
    found = split((result.output / "model.safetensors").read_bytes())[1]
    assert found["lm_head.weight"] == found["transformer.wte.weight"]


def test_an_alias_and_strangers_with_equal_bytes(tmp_path: Path) -> None:
    tensors = {name: weights("F32", 4, 4) for name in ("a.weight", "b.weight", "c.weight")}
    result = run(save(tmp_path / "in.safetensors", tensors, {"c.weight": "b.weight"}))
    check(result, tensors, NoiseSpec(), **{"c.weight": "b.weight"})


def test_a_different_head_is_no_tie(tmp_path: Path) -> None:
    tensors = dict(GPT2) | {"lm_head.weight": weights("F32", 30, 8, seed=99)}
    result = run(save(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")
    check(result, tensors, NoiseSpec(), "transformer.h.0.attn.bias", "transformer.ln_f.weight")


def test_rules_filters_and_seeds(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.{kind}": weights("F32", 6, 6, seed=i) for i in range(3) for kind in ("a", "b")}
    noise = NoiseSpec(
        lam=0.2,
        seed=9,
        rules=(("layer.*", 0.3), ("layer.1.*", 0.4), ("layer.2.*", 0.0)),
        include=("layer.*",),
        exclude=("*.b",),
    )
    result = run(save(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors", noise)
    found = split(result.output.read_bytes())[1]
    for lam, name in ((0.3, "layer.0.a"), (0.4, "layer.1.a")):
        assert found[name] == noised({name: tensors[name]}, NoiseSpec(lam=lam, seed=9))[name]
    reasons = {r.step.tensor.name: (r.reason, r.lam) for r in result.manifest.receipts}
    assert reasons["layer.2.a"] == ("lambda-zero", 0.0)
    assert reasons["layer.1.b"] == ("excluded", 0.0)
    assert reasons["layer.1.a"] == (None, 0.4)


def test_a_rule_for_buffers_alone_is_warned_of(tmp_path: Path) -> None:
    source = save(tmp_path / "gpt2.safetensors", GPT2)
    rules = (("*.attn.bias", 0.3), ("*.attn.*", 0.2))  # the first is the mask, the second more than it
    result = run(source, tmp_path / "out", NoiseSpec(rules=rules))
    (told,) = (warning for warning in result.warnings if "buffers alone" in warning)
    assert told.startswith("*.attn.bias matches buffers alone, which get no noise")


def test_a_rule_for_what_is_left_out_is_warned_of(tmp_path: Path) -> None:
    tensors = {name: weights("F32", 6, 6, seed=i) for i, name in enumerate(("a.weight", "b.weight"))}
    source = save(tmp_path / "in.safetensors", tensors)
    rules = (("b.*", 0.3), ("*.weight", 0.2))
    result = run(source, tmp_path / "out.safetensors", NoiseSpec(rules=rules, exclude=("b.*",)))
    (told,) = (warning for warning in result.warnings if "changes nothing" in warning)
    assert told == "b.* changes nothing: all that it matches is left out (excluded)"


def test_more_than_half_unchanged_is_warned_of(tmp_path: Path) -> None:
    tensors = {
        "norm.weight": weights("BF16", 500, centre=1.0, width=0.001),
        "w": weights("BF16", 500),
    }
    result = run(save(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")
    (warning,) = result.warnings
    assert "norm.weight" in warning
    assert "rounding" in warning
    receipt = result.manifest.receipts[0]
    before, after = tensors["norm.weight"].data, split(result.output.read_bytes())[1]["norm.weight"]
    assert receipt.unchanged == int(np.sum(np.frombuffer(before, "u2") == np.frombuffer(after, "u2"))) > 250


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_copied_and_warned_of(bad: float, tmp_path: Path) -> None:
    tensors = {"broken\n": numbers("F16", 1.0, 2.0, bad), "w": weights("F16", 50)}
    result = run(save(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")
    check(result, tensors, NoiseSpec(), "broken\n")
    (warning,) = result.warnings
    assert "broken" in warning
    assert "\n" not in warning


def test_finite_stays_finite(tmp_path: Path) -> None:
    tensors = {"w": numbers("F16", *[65504.0, -65504.0] * 200)}
    result = run(save(tmp_path / "in.safetensors", tensors), noise=NoiseSpec(lam=1.0))
    check(result, tensors, NoiseSpec(lam=1.0))
    assert np.isfinite(np.frombuffer(split(result.output.read_bytes())[1]["w"], "<f2")).all()
    assert result.manifest.receipts[0].clamped > 100


def test_a_dry_run_reads_no_weight(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", GPT2)
    planned = plan_perturb(Request(str(source), NoiseSpec()))
    assert isinstance(planned, Planned)
    steps = {step.tensor.name: step for step in planned.plan.steps}
    assert "tied" in steps["lm_head.weight"].unsure
    assert "constant" in steps["transformer.ln_f.weight"].unsure
    assert os.listdir(tmp_path) == ["in.safetensors"]


@pytest.mark.parametrize("noise", [NoiseSpec(), NoiseSpec(0.1, scope="absolute"), NoiseSpec(scope="global")])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_warns_of_a_matrix_that_was_sparse(dtype: str, noise: NoiseSpec, tmp_path: Path) -> None:
    dense = weights(dtype, 700, 1000, seed=1)
    pruned = dense.values.reshape(-1, 4).copy()
    pruned[:, 1::2] = 0
    pruned.view(f"u{pruned.itemsize}")[:, 3] = 1 << (8 * pruned.itemsize - 1)  # -0, as a product with 0 is
    late = dense.values.ravel().copy()
    late[1::7] = 0
    tensors: Tensors = {
        "dense": dense,
        "pruned": Tensor(dtype, pruned.reshape(dense.values.shape)),
        "some zeros": Tensor(dtype, late.reshape(dense.values.shape)),
        "vector": Tensor(dtype, pruned.reshape(-1)),
        "excluded": Tensor(dtype, pruned.reshape(dense.values.shape)),
    }
    save(tmp_path / "in.safetensors", tensors)
    request = Request(str(tmp_path / "in.safetensors"), replace(noise, exclude=("excluded",)))
    done = perturb(request, str(tmp_path / "out.safetensors"))
    assert [warning.split(":")[0] for warning in done.warnings if "were 0" in warning] == ["pruned"]


@pytest.mark.parametrize("noise", [NoiseSpec(), NoiseSpec(0.1, scope="absolute"), NoiseSpec(scope="global")])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_warns_of_a_std_that_a_few_extreme_values_make(dtype: str, noise: NoiseSpec, tmp_path: Path) -> None:
    def transitions(tags: int, forbidden: float) -> Tensor:
        # Of a CRF: none to the start, none from the end.
        scores = np.random.default_rng(tags).normal(size=(tags, tags))
        scores[0], scores[:, 1] = forbidden, forbidden
        return Tensor(dtype, numbers(dtype, *scores.ravel()).values.reshape(tags, tags))

    tensors: Tensors = {
        "few": transitions(7, -10000.0),
        "many": transitions(700, -10000.0),  # in several tiles
        "mild": transitions(12, -100.0),
        "soft": transitions(12, -1.0),
    }
    save(tmp_path / "in.safetensors", tensors)
    done = perturb(Request(str(tmp_path / "in.safetensors"), noise), str(tmp_path / "out.safetensors"))
    told = [warning.split(":")[0] for warning in done.warnings if "a few extreme values" in warning]
    assert told == (["few, many, mild"] if noise.scope == "matrix" else [])
