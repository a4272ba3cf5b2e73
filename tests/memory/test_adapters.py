"""Of a model with adapters the base gets the noise that it has alone, wherever its layers are wrapped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import noisytune_cli
from noisytune_cli.errors import InputInvalid

peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.q_proj(x)
        return found


class Model(nn.Module):
    """A table, and layers of which the third and the last are one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "none"}
        self.emb = nn.Embedding(20, 8)
        shared = Block()
        self.layers = nn.ModuleList([shared if at in (2, 10) else Block() for at in range(11)])

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.emb(x)
        for layer in self.layers:
            x = layer(x)
        return x


CONFIGS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
    "LoRA and rows of a table": peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"emb": [1, 2]}, r=2, init_lora_weights=False
    ),
    "rows of a table": peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 2]),
    "a table trained whole": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["emb"], r=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_base_gets_its_own_noise_and_what_is_added_none(config: Any) -> None:
    torch.manual_seed(0)
    model = Model()
    alone = copy.deepcopy(model)
    noisytune_cli.perturb_(alone)
    adapted = peft.get_peft_model(model, copy.deepcopy(config))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters(remove_duplicate=False)}
    noisytune_cli.perturb_(adapted)
    after = dict(adapted.named_parameters(remove_duplicate=False))
    expected = dict(alone.named_parameters(remove_duplicate=False))
    changed = {name for name, values in after.items() if not torch.equal(values, before[name])}
    found = {}
    for name in changed:
        own = name.removeprefix("base_model.model.")
        for held in ("base_layer.", "original_module.", "token_adapter."):
            own = own.replace(held, "")
        found[own] = after[name]
    assert len(found) == len(changed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", ["LoRA", "rows of a table"])
def test_a_merged_adapter_is_refused_until_it_is_unmerged(kind: str) -> None:
    model = peft.get_peft_model(Model(), copy.deepcopy(CONFIGS[kind]))
    model.merge_adapter()
    merged = values(model)
    with pytest.raises(InputInvalid, match=r"base_layer.*is merged.*unmerge_adapter\(\)"):
        noisytune_cli.perturb_(model)
    with pytest.raises(InputInvalid, match="is merged"):
        noisytune_cli.Population(model)
    with pytest.raises(InputInvalid, match="is merged"), noisytune_cli.noisy(model, sigma=0.1):
        raise AssertionError("it is noisy")
    assert same(values(model), merged)
    model.unmerge_adapter()
    noisytune_cli.perturb_(model)


def test_a_population_waits_for_what_was_merged_since() -> None:
    model = peft.get_peft_model(Model(), copy.deepcopy(CONFIGS["LoRA"]))
    before = values(model)
    population = noisytune_cli.Population(model)
    population.set(sigma=0.1)
    model.merge_adapter()
    merged = values(model)
    with pytest.raises(InputInvalid, match="is merged"):
        population.set(sigma=0.2)
    assert same(values(model), merged)
    with pytest.raises(InputInvalid, match="is merged"):
        population.restore()
    left = {name for name, found in values(model).items() if torch.equal(found, merged[name])}
    assert {name for name in left if "lora_" not in name} == {n for n in before if "base_layer" in n}
    model.unmerge_adapter()
    population.restore()
    assert same(values(model), before)
