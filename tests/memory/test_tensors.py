"""What is refused before anything is changed, and which views of one storage are tensors of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from noisytune_cli import perturb_
from noisytune_cli.errors import NoisytuneError


def marked(mark: str) -> Any:
    tensor = torch.randn(4, 4)
    setattr(tensor, mark, object())
    return tensor


def overlapping() -> dict[str, Any]:
    line = torch.randn(10)
    return {"a": line[:6], "b": line[4:]}


class Wrapping(torch.Tensor):
    """A tensor whose values are another's, as those of float8 and QLoRA are; it cannot be taken apart."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        return cls(torch.randn(4, 4))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: {"w": torch.eye(3).to_sparse()}, "sparse"),
    "meta": (lambda: {"w": torch.empty(3, 3, device="meta")}, "meta device"),
    "lazy": (lambda: torch.nn.LazyLinear(3), "not initialised"),
    "wrapping": (lambda: {"w": Wrapping(torch.randn(4, 4))}, "held in other tensors"),
    "bitsandbytes": (lambda: {"w": marked("quant_state")}, "quantised"),
    "deepspeed": (lambda: {"w": marked("ds_id")}, "DeepSpeed"),
    "flat": (lambda: {"w": marked("_is_flat_param")}, "fully_shard"),
    "fsdp": (lambda: {"_fsdp_wrapped_module.w": torch.randn(3)}, "fully_shard"),
    "float8": (lambda: {"w": torch.randn(4).to(torch.float8_e4m3fn)}, "quantised"),
    "mlx": (lambda: {"q.weight": torch.zeros(4, dtype=torch.uint32), "q.scales": torch.ones(4)}, "MLX"),
    "gptq": (lambda: {"q.qweight": torch.zeros(4, dtype=torch.int32), "q.g_idx": torch.zeros(4)}, "GPTQ"),
    "no state dict": (lambda: {"model": {"w": torch.randn(3)}}, "not a state dict"),
    "overlap": (overlapping, "overlap"),
    "expanded": (lambda: {"w": torch.randn(3, 1).expand(3, 4)}, "overlap"),
    "two widths": (lambda: {"a": (line := torch.randn(4)), "b": line.view(torch.float64)}, "overlap"),
    "nothing": (lambda: {"w": torch.zeros(3, 3)}, "nothing to perturb.*Give the model that has the weights"),
    "no tensors": (lambda: torch.nn.ReLU(), "it has no tensors. Give the model that has the weights"),
    "exported": (lambda: torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2),)), "neither a module"),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_take_noise_is_refused_before_any_change(make: Callable[[], Any], why: str) -> None:
    refused = make()
    first = torch.randn(3, 3)
    tensors = {"first": first, **refused} if isinstance(refused, dict) and "nothing" not in why else refused
    before = first.clone()
    with pytest.raises(NoisytuneError, match=why):
        perturb_(tensors)
    assert torch.equal(first, before)


def test_disjoint_views_of_one_storage_are_independent() -> None:
    block = torch.randn(8, 6)
    apart = {"a": block[:, :3].clone(), "b": block[:, 3:].clone()}
    perturb_(apart)
    perturb_({"a": block[:, :3], "b": block[:, 3:]})
    assert torch.equal(block, torch.cat(list(apart.values()), dim=1))


def test_a_slice_of_a_larger_tensor_gets_the_noise_of_a_tensor_of_its_own() -> None:
    wide = torch.randn(40, 50)
    kept = wide[:, 45:].clone()
    alone = {"w": wide[:, :45].clone()}
    perturb_(alone)
    perturb_({"w": wide[:, :45]})
    assert torch.equal(wide[:, :45], alone["w"])
    assert torch.equal(wide[:, 45:], kept)


def test_arrays_that_share_memory_overlap_though_each_is_a_storage() -> None:
    line = np.linspace(-1, 1, 20, dtype=np.float32)
    with pytest.raises(NoisytuneError, match="overlap"):
        perturb_({"a": torch.from_numpy(line[:12]), "b": torch.from_numpy(line[8:])})
    two_names = {"u": torch.from_numpy(line), "v": torch.from_numpy(line[:])}
    record = perturb_(two_names)
    assert {r.step.stream for r in record.receipts} == {"u"}  # a tie, and noise once
    apart = {"u": torch.from_numpy(line[::2]), "v": torch.from_numpy(line[1::2])}
    perturb_(apart)


@pytest.mark.parametrize(
    ("shape", "stride"), [((4, 3), (2, 1)), ((3, 4), (1, 2)), ((2, 2, 2), (3, 2, 1)), ((5,), (0,))]
)
def test_views_that_have_an_element_twice_are_refused(
    shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    with pytest.raises(NoisytuneError, match="overlap"):
        perturb_({"w": torch.randn(40).as_strided(shape, stride)})


def test_strides_that_interleave_without_meeting_are_no_overlap() -> None:
    # Not in order of their strides, and yet no element comes twice.
    line = torch.arange(40.0)
    perturb_({"w": line.as_strided((2, 3), (3, 2))})
    assert not torch.equal(line[:8], torch.arange(8.0))


def test_a_stride_that_is_never_taken_tells_no_tensors_apart() -> None:
    column = torch.randn(4, 1)
    record = perturb_({"a": column, "b": column.as_strided((4, 1), (1, 7))})
    assert {r.step.stream for r in record.receipts} == {"a"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    with pytest.raises(NoisytuneError, match="it is nested"):
        perturb_({"w": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])})


@pytest.mark.parametrize("left", [0, 40])
def test_what_has_no_memory_any_more_is_refused(left: int) -> None:
    freed = torch.randn(64, 64)
    freed.untyped_storage().resize_(left)
    first = torch.randn(3, 3)
    before = first.clone()
    with pytest.raises(NoisytuneError, match="its memory was freed"):
        perturb_({"first": first, "w": freed})
    assert torch.equal(first, before)


def test_what_does_not_change_may_overlap() -> None:
    mask = torch.ones(1, dtype=torch.bool).expand(4, 4)
    codes = torch.arange(10)
    record = perturb_({"w": torch.randn(3, 3), "mask": mask, "a": codes[:6], "b": codes[4:]})
    assert [r.action for r in record.receipts] == ["perturb", "copy", "copy", "copy"]
    floats = torch.randn(4)
    with pytest.raises(NoisytuneError, match="overlap"):
        perturb_({"w": floats, "codes": floats.view(torch.int32)[1:]})
