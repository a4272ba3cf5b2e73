"""Every family of models: built small by transformers, perturbed, and loaded again by those who use it.

Each is saved as transformers saves it, perturbed by the command line, and loaded with no weight missing or
left over. The same weights as a pickle and in chunks get the same noise; JAX and NumPy read the same values.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunked import load_chunked, save_chunked
from pickles import saved
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.cli.app import app
from noisytune_cli.plan.evidence.buffers import find_buffers
from noisytune_cli.plan.evidence.meta_model import _kinds, _own_names

transformers = pytest.importorskip("transformers")


def noisytune(*arguments: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


_SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {**_SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class Family:
    """A model class and its config; `tied` are two modules with one weight, `copied` ends of names."""

    model: str
    config: dict[str, Any]
    tied: tuple[str, str] | None = None
    copied: tuple[str, ...] = ()


FAMILIES = {
    "GPT-2": Family(
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32},
        ("lm_head", "transformer.wte"),
    ),
    "BERT": Family(
        "BertForMaskedLM",
        {**_SMALL, "intermediate_size": 24, "max_position_embeddings": 32},
        ("cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        ("encoder.embed_tokens", "shared"),
    ),
    "Llama, tied": Family(
        "LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}, ("lm_head", "model.embed_tokens")
    ),
    "Llama, untied": Family("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": False}),
    "GPT-NeoX": Family(
        "GPTNeoXForCausalLM", {**_SMALL, "intermediate_size": 24, "max_position_embeddings": 32}
    ),
    "Mixtral": Family("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 1}),
    "DeepSeek V3": Family(
        "DeepseekV3ForCausalLM",
        {
            **_LLAMA,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        copied=("e_score_correction_bias",),
    ),
    "CLIP": Family(
        "CLIPModel",
        {
            "text_config": {**_TOWER, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2},
            "vision_config": {**_TOWER, "image_size": 8, "patch_size": 4},
            "projection_dim": 8,
        },
        copied=("logit_scale", "position_ids"),
    ),
    "a batch-norm network": Family(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        copied=("running_mean", "running_var", "num_batches_tracked"),
    ),
    "Mamba": Family(
        "MambaForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
        ("lm_head", "backbone.embeddings"),
    ),
}


@dataclass(frozen=True)
class Perturbed:
    """A family's model, the folder it was saved to, and the one that was perturbed."""

    family: Family
    model: Any
    source: Path
    output: Path

    @property
    def before(self) -> dict[str, torch.Tensor]:
        return load_file(self.source / "model.safetensors")

    @property
    def after(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "model.safetensors")

    def actions(self) -> dict[str, str]:
        manifest = json.loads((self.output / "noisytune.json").read_text())
        return {tensor["name"]: tensor.get("reason", "perturb") for tensor in manifest["tensors"]}


@pytest.fixture(scope="module", params=FAMILIES)
def perturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Perturbed:
    family = FAMILIES[request.param]
    root = tmp_path_factory.mktemp("family")
    kind = getattr(transformers, family.model)
    torch.manual_seed(0)
    model = kind(kind.config_class(**family.config)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():  # nothing is constant in a trained model
            if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
                tensor += torch.rand_like(tensor) * 0.1
    model.save_pretrained(root / "model")
    run = noisytune("perturb", root / "model", "-o", root / "noisy", "--buffers-from", "names", "--quiet")
    assert run.exit_code == 0, run.output
    return Perturbed(family, model, root / "model", root / "noisy")


def test_it_loads_with_nothing_missing_or_left_over(perturbed: Perturbed) -> None:
    model, report = type(perturbed.model).from_pretrained(perturbed.output, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = dict(perturbed.model.named_parameters())
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert set(changed) == {name for name, value in before.items() if value.numel() > 1}
    assert all(torch.isfinite(value).all() for value in model.parameters())
    kept = dict(perturbed.model.named_buffers())
    assert all(torch.equal(value, kept[name]) for name, value in model.named_buffers())


def test_ties_stay_ties(perturbed: Perturbed) -> None:
    model = type(perturbed.model).from_pretrained(perturbed.output)
    if perturbed.family.tied is None:
        tables = (model.get_input_embeddings(), model.get_output_embeddings()) if _generates(model) else ()
        assert len({table.weight.data_ptr() for table in tables}) == len(tables)
        return
    one, other = (model.get_submodule(name).weight for name in perturbed.family.tied)
    assert one.data_ptr() == other.data_ptr()
    assert not torch.equal(one, perturbed.model.get_submodule(perturbed.family.tied[1]).weight)


def _generates(model: Any) -> bool:
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def test_buffers_and_single_elements_are_copied(perturbed: Perturbed) -> None:
    before, after = perturbed.before, perturbed.after
    actions = perturbed.actions()
    copied = {name for name, action in actions.items() if action != "perturb"}
    assert all(name.endswith(perturbed.family.copied or ("\0",)) for name in copied), copied
    for end in perturbed.family.copied:
        assert end == "position_ids" or any(name.endswith(end) for name in copied)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name in copied), name


def test_names_tell_what_the_model_knows(perturbed: Perturbed) -> None:
    with open_checkpoint(str(perturbed.source)) as opened:
        tensors, config = opened.tensors, opened.config
    own = _own_names(perturbed.model, [tensor.name for tensor in tensors])
    kinds = _kinds(perturbed.model, own)
    assert len(kinds) > len(tensors) / 2
    buffers = find_buffers(tensors, config=config)
    assert {name for name, kind in kinds.items() if kind == "buffer"} == set(buffers) & set(kinds)


def test_pickles_and_chunks_get_the_same_noise(perturbed: Perturbed, tmp_path: Path) -> None:
    before, after = perturbed.before, perturbed.after
    for folder in ("pickle", "chunks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((perturbed.source / "config.json").read_bytes())
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(saved(before))
    save_chunked(tmp_path / "chunks", {("model", name): tensor for name, tensor in before.items()})
    for folder in ("pickle", "chunks"):
        out = tmp_path / f"out-{folder}"
        run = noisytune("perturb", tmp_path / folder, "-o", out, "--buffers-from", "names", "--quiet")
        assert run.exit_code == 0, run.output
    pickled = torch.load(tmp_path / "out-pickle" / "pytorch_model.bin", weights_only=True)
    chunked = load_chunked(tmp_path / "out-chunks", "model")
    assert pickled.keys() == chunked.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(pickled[name], tensor), name
        assert torch.equal(chunked[name], tensor), name


#: Reads the safetensors file that a line names with JAX, and writes it with NumPy where the next line says.
_JAX = """
import sys
import numpy as np
from safetensors.flax import load_file
while path := sys.stdin.readline().rstrip("\\n"):
    np.savez(sys.stdin.readline().rstrip("\\n"), **load_file(path))
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def jax_reader() -> Iterator[Callable[[Path, Path], dict[str, Any]]]:
    """Read files with JAX in a process of its own: its threads do not bear forks."""
    pytest.importorskip("jax")
    command = [sys.executable, "-c", _JAX]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def read(path: Path, scratch: Path) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(path, scratch, sep="\n", file=process.stdin, flush=True)
            assert process.stdout.readline() == "done\n"
            with np.load(scratch) as arrays:
                return dict(arrays)

        yield read
        process.stdin.close()


def test_numpy_reads_the_same(perturbed: Perturbed) -> None:
    from safetensors.numpy import load_file as load_numpy

    path, after = perturbed.output / "model.safetensors", perturbed.after
    arrays = load_numpy(path)
    assert arrays.keys() == after.keys()
    assert all(np.array_equal(arrays[name], tensor.numpy()) for name, tensor in after.items())


def test_jax_reads_the_same(
    perturbed: Perturbed, jax_reader: Callable[[Path, Path], dict[str, Any]], tmp_path: Path
) -> None:
    after = perturbed.after
    arrays = jax_reader(perturbed.output / "model.safetensors", tmp_path / "arrays.npz")
    assert arrays.keys() == after.keys()
    for name, tensor in after.items():
        # JAX has integers of 32 bits unless asked for more.
        assert np.array_equal(arrays[name], tensor.numpy()), name


def test_experts_may_be_stacked(tmp_path: Path) -> None:
    family = FAMILIES["Mixtral"]
    kind = transformers.MixtralForCausalLM
    torch.manual_seed(0)
    model = kind(kind.config_class(**family.config))
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "stacked")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        tmp_path / "stacked" / "model.safetensors",
        {"format": "pt"},
    )
    stacked = load_file(tmp_path / "stacked" / "model.safetensors")
    apart = load_file(tmp_path / "apart" / "model.safetensors")
    assert any(tensor.dim() == 3 for tensor in stacked.values())
    assert all(tensor.dim() < 3 for tensor in apart.values())
    for folder in ("apart", "stacked"):
        run = noisytune("perturb", tmp_path / folder, "-o", tmp_path / f"out-{folder}", "--quiet")
        assert run.exit_code == 0, run.output
        loaded, report = kind.from_pretrained(tmp_path / f"out-{folder}", output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(torch.isfinite(value).all() for value in loaded.parameters())


def test_block_fp8_is_refused_whole(tmp_path: Path) -> None:
    codes = torch.randn(256, 128).to(torch.float8_e4m3fn)
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, 16).bfloat16(),
        "model.layers.0.mlp.down_proj.weight": codes,
        "model.layers.0.mlp.down_proj.weight_scale_inv": torch.rand(2, 1),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for config in ({}, {"model_type": "deepseek_v3", "quantization_config": quantized}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        run = noisytune("perturb", tmp_path, "-o", tmp_path / "out")
        assert run.exit_code == 3
        assert "block fp8" in run.stderr
    save_chunked(tmp_path / "chunks", {(name,): tensor for name, tensor in tensors.items()})
    run = noisytune("perturb", tmp_path / "chunks", "-o", tmp_path / "out")
    assert (run.exit_code, "block fp8" in run.stderr) == (3, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_keeps_what_is_zero(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    family = FAMILIES["GPT-2"]
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**family.config))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    model.save_pretrained(tmp_path / "adapter")
    run = noisytune("perturb", tmp_path / "adapter", "-o", tmp_path / "noisy", "--quiet")
    assert run.exit_code == 0, run.output
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "noisy"))
    assert len(before) == 4
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == ("lora_B" in name), name
        assert "lora_B" not in name or not after[name].any()
    torch.manual_seed(0)
    fresh = transformers.GPT2LMHeadModel(transformers.GPT2Config(**family.config))
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "noisy")
    name = next(name for name in after if "lora_A" in name)
    own = dict(loaded.named_parameters())[name.replace("lora_A.weight", "lora_A.default.weight")]
    assert torch.equal(own, after[name])
