"""A quantised module is refused like its state dict, whatever holds its codes; integers alone are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import noisytune_cli
from noisytune_cli.errors import InputInvalid

USES: dict[str, Callable[[Any], Any]] = {
    "perturb_": noisytune_cli.perturb_,
    "Population": noisytune_cli.Population,
    "noisy": lambda model: noisytune_cli.noisy(model, sigma=0.1).__enter__(),
    "ladder": lambda model: noisytune_cli.ladder(model, lambda _: 0.0, sigma=[0.1]),
}


def layer(**buffers: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, values in buffers.items():
        module.register_buffer(name, values)
    return module


class Model(nn.Module):
    """An embedding and a norm in full precision, and one projection."""

    def __init__(self, q_proj: nn.Module) -> None:
        super().__init__()
        self.embed_tokens, self.q_proj, self.norm = nn.Embedding(50, 16), q_proj, nn.LayerNorm(16)
        nn.init.normal_(self.norm.weight)


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


def quantized_by_torch(**options: Any) -> nn.Module:
    made = torch.ao.quantization.quantize_dynamic(Model(nn.Linear(16, 16)), {nn.Linear}, **options)
    assert isinstance(made, nn.Module)
    return made


def quantized_lstm() -> nn.Module:
    return Model(torch.ao.nn.quantized.dynamic.LSTM(16, 16))


QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "GPTQ": lambda: Model(
        layer(
            qweight=integers(2, 16),
            qzeros=integers(1, 2),
            scales=torch.rand(1, 16).half(),
            g_idx=integers(16),
        )
    ),
    "8 bits with scales": lambda: Model(
        layer(weight=integers(8, 8, dtype=torch.int8), scales=torch.rand(8).bfloat16())
    ),
    "fp8": lambda: Model(layer(weight=torch.randn(8, 8).to(torch.float8_e4m3fn), weight_scale=torch.rand(1))),
    "packed": lambda: quantized_by_torch(dtype=torch.qint8),
    "packed, recurrent": quantized_lstm,
    "quantised buffer": lambda: Model(
        layer(weight=torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8))
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("make", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_module_whose_codes_are_no_parameters_is_refused(
    make: Callable[[], nn.Module], use: Callable[[Any], Any]
) -> None:
    model = make()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(InputInvalid, match="quantised"):
        use(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_so_is_one_that_is_to_get_the_noise_of_a_manifest() -> None:
    record = noisytune_cli.perturb_(Model(nn.Linear(16, 16)))
    with pytest.raises(InputInvalid, match="quantised"):
        noisytune_cli.perturb_(QUANTIZED["GPTQ"](), manifest=record)


class Attention(nn.Module):
    """What models keep as integers: positions, masks, indexes of a table, counts, a cache of codes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(16, 48), nn.BatchNorm1d(16)
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("relative_position_index", integers(4, 4, dtype=torch.int64))
        self.register_buffer("position_ids", integers(1, 16, dtype=torch.int64))
        self.register_buffer("bias", torch.tril(torch.ones(1, 1, 16, 16, dtype=torch.uint8)))
        self.cache = nn.Module()
        self.cache.register_buffer("keys", integers(4, 16, dtype=torch.int8), persistent=False)
        self.cache.register_buffer("scales", torch.rand(4), persistent=False)
        self.table = nn.Module()
        self.table.register_buffer("index", integers(4, 4, dtype=torch.int64))
        self.table.bias = nn.Parameter(torch.randn(4))
        self.lazy = nn.LazyBatchNorm1d(affine=False)


def test_integers_that_are_no_codes_are_no_matter() -> None:
    record = noisytune_cli.perturb_(Attention())
    assert {r.step.tensor.name for r in record.receipts if r.action == "perturb"} == {
        "qkv.weight",
        "qkv.bias",
        "relative_position_bias_table",
        "table.bias",
    }
