"""The worker extension of docs/python.md, with stand-ins for vLLM: its slices have the checkpoint's bits."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from noisytune_cli import perturb_

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
LAYER = "model.layers.0."


def whole() -> dict[str, torch.Tensor]:
    """A checkpoint with Llama's names: four heads, two of keys and values, five rows of vocabulary."""
    torch.manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (5, 8),
        **{f"{LAYER}self_attn.{n}_proj.weight": (rows, 8) for n, rows in (("q", 8), ("k", 4), ("v", 4))},
        f"{LAYER}self_attn.q_proj.bias": (8,),
        f"{LAYER}self_attn.k_proj.bias": (4,),
        f"{LAYER}self_attn.v_proj.bias": (4,),
        f"{LAYER}self_attn.o_proj.weight": (8, 8),
        f"{LAYER}mlp.gate_proj.weight": (12, 8),
        f"{LAYER}mlp.up_proj.weight": (12, 8),
        f"{LAYER}mlp.down_proj.weight": (8, 12),
        f"{LAYER}input_layernorm.weight": (8,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def held(tensors: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """What a rank of an engine holds of a checkpoint, fused and split."""

    def rows(name: str, copies: int = 1) -> torch.Tensor:
        return tensors[LAYER + name].chunk(world // copies)[rank // copies]

    copies = max(1, world // 2)
    made = {LAYER + "input_layernorm.weight": tensors[LAYER + "input_layernorm.weight"].clone()}
    for kind in ("weight", "bias"):
        parts = [rows(f"self_attn.{n}_proj.{kind}", c) for n, c in (("q", 1), ("k", copies), ("v", copies))]
        made[f"{LAYER}self_attn.qkv_proj.{kind}"] = torch.cat(parts)
    made[LAYER + "mlp.gate_up_proj.weight"] = torch.cat(
        [rows("mlp.gate_proj.weight"), rows("mlp.up_proj.weight")]
    )
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        made[LAYER + name] = tensors[LAYER + name].chunk(world, dim=1)[rank].clone()
    table = torch.cat([tensors["model.embed_tokens.weight"], torch.zeros(3, 8)])  # padded to eight rows
    made["model.embed_tokens.weight"] = table.chunk(world)[rank].clone()
    return made


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_workers_slices_have_the_bits_of_the_checkpoint(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"^```python\n(.*?class NoiseExtension.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    code = code[code.rindex("import noisytune_cli\n") :]
    at = {"rank": 0}
    distributed: Any = ModuleType("vllm.distributed")
    distributed.get_tensor_model_parallel_rank = lambda: at["rank"]
    distributed.get_tensor_model_parallel_world_size = lambda: world
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    names: dict[str, Any] = {}
    exec(compile(code, "python.md", "exec"), names)
    config = SimpleNamespace(
        num_attention_heads=4, num_key_value_heads=2, hidden_size=8, intermediate_size=12, vocab_size=5
    )
    expected = whole()
    perturb_(expected, sigma=0.1, seed=7)
    for rank in range(world):
        at["rank"] = rank
        parameters = {n: torch.nn.Parameter(t) for n, t in held(whole(), rank, world).items()}
        model = SimpleNamespace(config=config, named_parameters=parameters.items)
        worker = names["NoiseExtension"]()
        worker.model_runner = SimpleNamespace(model=model)
        for seed in (3, 7):
            worker.set_noise(seed, 0.1)
        wanted = held(expected, rank, world)
        assert {n: torch.equal(p, wanted[n]) for n, p in parameters.items()} == dict.fromkeys(
            parameters, True
        )
        worker.set_noise(0, 0)
        before = held(whole(), rank, world)
        assert all(torch.equal(p, before[name]) for name, p in parameters.items())
