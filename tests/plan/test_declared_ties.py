"""Every pair that transformers declares to be one weight is one here, where both names are stored alike."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, save, weights

import noisytune_cli
from noisytune_cli.commands.perturb import Request, perturb, plan_perturb
from noisytune_cli.plan.evidence import buffers_by_model
from noisytune_cli.plan.evidence.buffers_by_model import Answer
from noisytune_cli.plan.ties import find_ties
from noisytune_cli.records import NoiseSpec, TensorSpec

#: What stands in transformers' patterns, and a name that fits it.
_EXAMPLES = (
    (r"\(\?!\[0\]\)\\d\+", "1"),
    (r"\(\?:\[\^\.\]\+\\\.\)\*", "0.mlp."),
    (r"\(\?!rotary_emb[^)]*\)$", "layers.0.mlp.weight"),
    (r"\\\.", "."),
    (r"[\^$]", ""),
)


def declared() -> set[tuple[str, str]]:
    """The pairs in the source of the installed transformers: to import all its models takes minutes."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        pytest.skip("transformers is not installed")
    pairs: set[tuple[str, str]] = set()
    for path in Path(found.origin).parent.glob("models/*/modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if getattr(target, "id", getattr(target, "attr", "")) == "_tied_weights_keys":
                    keys, values = node.value.keys, node.value.values
                    pairs |= {
                        (key.value, value.value)
                        for key, value in zip(keys, values, strict=True)
                        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
                    }
    return pairs


def names(pair: tuple[str, str]) -> list[str]:
    """Two names that a pair of patterns is of."""
    shown = list(pair)
    for pattern, example in _EXAMPLES:
        shown = [re.sub(pattern, example, name) for name in shown]
    is_weight = re.compile(r".*(weight|bias|embedding|scale|proj)")
    whole = any(map(is_weight.fullmatch, shown))
    return [name if whole and is_weight.fullmatch(name) else f"{name}.weight" for name in shown]


def test_all_pairs_that_transformers_declares_are_known() -> None:
    pairs = declared()
    assert len(pairs) > 100
    unknown = []
    for pair in sorted(pairs):
        for prefix in ("", "module."):
            specs = [TensorSpec(prefix + name, "F32", (9, 4), "m", 0, 144) for name in names(pair)]
            assert re.fullmatch(r"[\w.]+", "".join(spec.name for spec in specs)), pair
            if len(find_ties(specs)) != 1:
                unknown.append((pair, names(pair)))
    assert unknown == []


@pytest.mark.parametrize(
    "stored",
    [
        ("class_embed.4.bias", "model.decoder.class_embed.0.bias", "class_embed.0.bias"),
        ("model.layers.3.shared_transf.mlp.weight", "model.layers.9.shared_transf.mlp.weight"),
        ("a.encoder.language_model.layers.7.mlp.up_proj.weight", "a.decoder.layers.7.mlp.up_proj.weight"),
    ],
)
def test_all_names_of_one_module_are_one_tie(stored: tuple[str, ...]) -> None:
    specs = [TensorSpec(name, "F32", (9, 4), "m", 0, 144) for name in (*stored, "other.weight")]
    (tie,) = find_ties(specs)
    assert set(tie.names) == set(stored)


def test_equal_bytes_of_what_nobody_ties_are_no_tie(tmp_path: Path) -> None:
    table = weights("F32", 40, 8)
    source = save(tmp_path / "m.safetensors", {"a.inner.weight": table, "b.outer.weight": table})
    done = perturb(Request(str(source), NoiseSpec()), str(tmp_path / "o.safetensors"))
    assert len({receipt.digest for receipt in done.manifest.receipts}) == 2


CONFIG: dict[str, Any] = {"architectures": ["OfTomorrow"], "model_type": "tomorrow"}


@pytest.mark.parametrize(("equal", "tied"), [(True, True), (False, False)])
def test_what_a_model_declares_is_a_pair_too(
    equal: bool, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(request: dict[str, Any]) -> Answer:
        asked.append(request)
        return Answer(dict.fromkeys(request["names"], "parameter"), (("a.inner.weight", "b.outer.weight"),))

    monkeypatch.setattr(buffers_by_model, "_run", run)
    table = weights("F32", 40, 8)
    other = table if equal else Tensor("F32", np.concatenate([table.values[:39], table.values[:1]]))
    save(tmp_path / "m/model.safetensors", {"a.inner.weight": table, "b.outer.weight": other})
    (tmp_path / "m/config.json").write_text(json.dumps(CONFIG))
    # Names raise no doubt: that two tensors begin alike does, once they are read.
    assert plan_perturb(Request(str(tmp_path / "m"), NoiseSpec())).plan.ties == ()
    assert asked == []
    done = perturb(Request(str(tmp_path / "m"), NoiseSpec()), str(tmp_path / "o"))
    assert len(asked) == 1
    assert (len({receipt.digest for receipt in done.manifest.receipts}) == 1) == tied


def test_a_model_that_transformers_ties_stays_tied(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    config = transformers.CTRLConfig(
        vocab_size=30, n_embd=16, dff=16, n_layer=1, n_head=2, n_positions=8, tie_word_embeddings=True
    )
    model = transformers.CTRLLMHeadModel(config)
    model.save_pretrained(tmp_path / "m")
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    safetensors_torch.save_file(stored, tmp_path / "m/model.safetensors", {"format": "pt"})
    perturb(Request(str(tmp_path / "m"), NoiseSpec()), str(tmp_path / "o"))
    noised = safetensors_torch.load_file(tmp_path / "o/model.safetensors")
    assert torch.equal(noised["lm_head.weight"], noised["transformer.w.weight"])
    assert not torch.equal(noised["lm_head.weight"], stored["lm_head.weight"])
    noisytune_cli.perturb_(model)
    assert torch.equal(model.transformer.w.weight, noised["transformer.w.weight"])
