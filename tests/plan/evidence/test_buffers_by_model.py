"""Who decides what is a buffer: names, or a model built without weights; and that asking it is safe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, weights

from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Request, plan_perturb
from noisytune_cli.errors import UsageError
from noisytune_cli.plan.evidence import buffers_by_model as parameters
from noisytune_cli.plan.evidence import meta_model
from noisytune_cli.plan.evidence.buffers_by_model import Answer
from noisytune_cli.plan.evidence.told import REGISTERED, Told, tell
from noisytune_cli.records import NoiseSpec, TensorSpec

CONFIG: dict[str, Any] = {"architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 2}

#: A small detection model: its backbone has frozen batch norms, whose weights are buffers.
FROZEN: dict[str, Any] = {
    "architectures": ["DetrModel"],
    "model_type": "detr",
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": True,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 4,
        "hidden_sizes": [4],
        "depths": [1],
        "out_features": ["stage1"],
        "layer_type": "basic",
    },
    "d_model": 8,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 8),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
}


def specs(*names: str, dtype: str = "F32") -> list[TensorSpec]:
    return [TensorSpec(name, dtype, (4,), "model.safetensors", 0, 16) for name in names]


def answering(monkeypatch: pytest.MonkeyPatch, answer: Mapping[str, str] | str) -> list[Any]:
    """Put an answer in the place of the process that builds models; return what it is asked."""
    asked: list[Any] = []

    def run(request: Any) -> Any:
        asked.append(request)
        return answer if isinstance(answer, str) else Answer(answer)

    monkeypatch.setattr(parameters, "_run", run)
    return asked


def by_model(told: Told) -> set[str]:
    return {name for name, by in told.by.items() if by == "model"}


def test_names_without_a_doubt_ask_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, {})
    plain = specs("layer.weight", "layer.bias", "mlp.experts.gate_up_proj", "mixer.A_log", "rope.inv_freq")
    told = tell(plain, config=CONFIG)
    assert asked == []
    assert list(told.buffers) == ["rope.inv_freq"]
    assert by_model(told) == set()


def test_a_doubt_is_put_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(
        monkeypatch, {"x.table": "buffer", "rope.inv_freq": "parameter", "x.weight": "parameter"}
    )
    told = tell(specs("x.table", "rope.inv_freq", "x.weight", "y.weight"), config=CONFIG)
    names = ["x.table", "rope.inv_freq", "x.weight", "y.weight"]
    assert asked == [{"library": "transformers", "config": CONFIG, "names": names}]
    assert told.buffers == {"x.table": REGISTERED}
    assert by_model(told) == {"x.table", "rope.inv_freq", "x.weight"}
    assert told.doubts == frozenset()


def test_a_batch_norm_that_counts_nothing_is_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, {})
    frozen = specs("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    tell([*frozen, *specs("bn.num_batches_tracked", dtype="I64")], config=CONFIG)
    assert asked == []
    tell(frozen, config=CONFIG)
    assert len(asked) == 1


def test_what_the_model_does_not_know_the_names_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"x.table": "parameter"})
    told = tell(specs("x.table", "h.rope.inv_freq"), config=CONFIG)
    assert list(told.buffers) == ["h.rope.inv_freq"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "names no architecture"),
        ({"architectures": None, "model_type": "bert"}, "names no architecture"),
        ({"architectures": ["A", "B"], "model_type": "bert"}, "names no architecture"),
        (CONFIG | {"auto_map": {"AutoModel": "x.Y"}}, "never run"),
        (CONFIG | {"architectures": ["os.system"]}, "none of transformers'"),
        (CONFIG | {"model_type": None}, "none of transformers'"),
        ({"_class_name": "os.system", "_diffusers_version": "0.30"}, "none of diffusers'"),
        ({"architecture": "hf-hub:x/y", "pretrained_cfg": {}}, "none of timm's"),
        ({"architecture": ["x"], "pretrained_cfg": {}}, "names no architecture"),
        (CONFIG | {"num_hidden_layers": 10**9}, "more than 1,000 parts"),
        (CONFIG | {"vision_config": {"depths": [2, 10**6]}}, "more than 1,000 parts"),
        (CONFIG | {"text_config": {"num_local_experts": 1e18}}, "more than 1,000 parts"),
    ],
)
def test_a_config_that_no_model_is_built_from(
    config: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, {})
    tensors = specs("x.table")
    with pytest.raises(UsageError, match=why):
        tell(tensors, config=config, decider="model")
    assert tell(tensors, config=config).buffers == {}
    assert asked == []


def test_an_unknown_decider() -> None:
    with pytest.raises(UsageError, match="auto, names, model"):
        tell(specs("w"), decider="oracle")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    find = parameters.importlib.util.find_spec
    monkeypatch.setattr(
        parameters.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(UsageError, match=r"pip install '\.\[transformers\]' in a clone"):
        tell(specs("w"), config=CONFIG, decider="model")


@pytest.mark.parametrize(
    "script", ["raise SystemExit(1)", "print('no JSON')", "print('{}')", "import time; time.sleep(60)"]
)
def test_a_process_that_gives_no_answer(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(script)
    monkeypatch.setattr(meta_model, "__file__", os.fspath(tmp_path / "stand_in.py"))
    monkeypatch.setattr(parameters, "_SECONDS", 1)
    with pytest.raises(UsageError, match="cannot build its architecture"):
        tell(specs("w"), config=CONFIG, decider="model")


def test_the_current_folder_has_no_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("open('ran', 'w')")
    (tmp_path / "stand_in.py").write_text(
        "import json; print(json.dumps({'kinds': {'w': 'buffer', 'other': 'x'}, 'tied': []}))"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meta_model, "__file__", os.fspath(tmp_path / "stand_in.py"))
    assert by_model(tell(specs("w"), config=CONFIG, decider="model")) == {"w"}
    assert not (tmp_path / "ran").exists()


def test_a_model_of_transformers_knows_its_frozen_batch_norms() -> None:
    pytest.importorskip("transformers")
    model = meta_model._build(FROZEN)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    norm = "backbone.conv_encoder.model.embedder.embedder.normalization"
    names = [f"{norm}.weight", f"{norm}.running_mean", "query_position_embeddings.weight", "no.such"]
    expected = {names[0]: "buffer", names[1]: "buffer", names[2]: "parameter"}
    assert meta_model._kinds(model, meta_model._own_names(model, names)) == expected
    prefixed = meta_model._kinds(model, meta_model._own_names(model, [f"model.{name}" for name in names]))
    assert prefixed == {f"model.{name}": kind for name, kind in expected.items()}


@pytest.mark.parametrize("architecture", ["AutoConfig", "NoSuchModel", "pipeline"])
def test_only_models_of_transformers_are_built(architecture: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises((TypeError, AttributeError)):
        meta_model._build({"architectures": [architecture], "model_type": "bert"})


def test_what_names_code_or_weights_is_left_out_at_any_depth() -> None:
    named = {"auto_map": {"AutoModel": "x.Y"}, "quantization_config": {}, "kept": 1}
    config = named | {"vision_config": named, "parts": [named, [named], "part"]}
    kept = {"kept": 1}
    assert meta_model._without_effects(config) == kept | {
        "vision_config": kept,
        "parts": [kept, [kept], "part"],
    }


#: Packages that stand in for a library, which need not be installed: one model, of a parameter and a buffer.
STAND_IN = """
import torch
class ModelMixin(torch.nn.Module):
    pass
class Net(ModelMixin):
    def __init__(self, size=2):
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros(size, 4))
        self.register_buffer("pos_embed", torch.zeros(size, 4))
    @classmethod
    def from_config(cls, config):
        assert "quantization_config" not in config
        return cls(config["size"])
class Scheduler:
    pass
def is_model(name):
    return name.partition(".")[0] == "net"
def create_model(name, pretrained, num_classes, **arguments):
    assert not pretrained and arguments == {"wide": True}, arguments
    return Net(num_classes)
"""

CONFIGS = {
    "diffusers": {"_class_name": "Net", "_diffusers_version": "0.30", "size": 2, "quantization_config": {}},
    "timm": {
        "architecture": "net.tag",
        "num_classes": 2,
        "pretrained_cfg": {"url": "https://example.com/weights"},
        "model_args": {"wide": True, "pretrained_cfg": {}, "checkpoint_path": "x.pth", "cache_dir": "/"},
    },
}


@pytest.mark.parametrize("library", CONFIGS)
def test_a_model_of_another_library(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    (tmp_path / f"{library}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    told = tell(specs("embed", "pos_embed", "other"), config=CONFIGS[library])
    assert told.buffers == {"pos_embed": REGISTERED}
    assert told.by == {"embed": "model", "pos_embed": "model"}


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["diffusers"] | {"_class_name": "Scheduler"},
        CONFIGS["diffusers"] | {"_class_name": "is_model"},
        CONFIGS["timm"] | {"architecture": "other"},
    ],
)
def test_only_models_of_another_library_are_built(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    for library in CONFIGS:
        (tmp_path / f"{library}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(UsageError, match="cannot build its architecture"):
        tell(specs("w"), config=config, decider="model")


def test_a_model_of_diffusers_itself() -> None:
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    config = diffusers.AutoencoderKL(block_out_channels=(32,)).config
    model = meta_model._build_of_diffusers(dict(config) | {"_class_name": "AutoencoderKL"})
    own = meta_model._own_names(model, ["encoder.conv_in.weight", "no.such"])
    assert meta_model._kinds(model, own) == {"encoder.conv_in.weight": "parameter"}
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_model_of_timm_itself() -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    assert timm.is_model("resnet18")
    given = {
        "architecture": "resnet18.x",
        "num_classes": 3,
        "pretrained_cfg": {},
        "model_args": {"in_chans": 1},
    }
    model = meta_model._build_of_timm(given)
    own = meta_model._own_names(model, ["fc.weight", "bn1.running_mean", "no.such"])
    assert meta_model._kinds(model, own) == {"fc.weight": "parameter", "bn1.running_mean": "buffer"}


def test_the_plan_says_who_decided(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    norm = "backbone.conv_encoder.model.embedder.embedder.normalization"
    names = [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    tensors = {name: weights("F32", 4) for name in (*names, "query_position_embeddings.weight")}
    save(tmp_path / "model.safetensors", tensors | {"other.rope.inv_freq": weights("F32", 4)})
    (tmp_path / "config.json").write_text(json.dumps(FROZEN))
    asked = plan_perturb(Request(str(tmp_path), NoiseSpec(), buffers_from="model"))
    assert {step.tensor.name: (step.reason, step.told_by) for step in asked.plan.steps} == {
        **dict.fromkeys(names, ("buffer", "model")),
        "query_position_embeddings.weight": (None, "model"),
        "other.rope.inv_freq": ("buffer", "names"),
    }
    rows = inspect(str(tmp_path), headers_only=True, buffers_from="names").tensors
    assert {row.name: row.reason for row in rows}["other.rope.inv_freq"] == "buffer"
