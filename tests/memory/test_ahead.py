"""A device is given sums before the plan is made, and noise while later amplitudes are settled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import noisytune_cli
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.memory import in_place
from noisytune_cli.memory import perturb as memory
from noisytune_cli.noise.devices import cuda

pytest.importorskip("triton")

from triton_tiles import resize

from noisytune_cli.noise.devices.cuda import add as triton_noise
from noisytune_cli.noise.devices.cuda import sums as triton_sums
from noisytune_cli.noise.devices.cuda.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter stands in for a GPU here")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Take the CPU for a CUDA device; record what it is given, and when the plan is made."""
    seen: list[Any] = []

    def recorded(what: str, right: Callable[..., Any]) -> Callable[..., Any]:
        def call(items: Any, *rest: Any, **options: Any) -> Any:
            seen.append((what, len(items)))
            return right(items, *rest, **options)

        return call

    resize(monkeypatch, 1)
    monkeypatch.setattr(in_place, "_is_exact_device", lambda name: True)
    monkeypatch.setattr(cuda, "sums_exactly", lambda *kind: True)
    monkeypatch.setattr(cuda, "adds_exactly", lambda *kind: True)
    monkeypatch.setattr(triton_sums, "sums", recorded("sums", triton_sums.sums))
    monkeypatch.setattr(triton_noise, "add_noise", recorded("noise", triton_noise.add_noise))
    monkeypatch.setattr(memory, "plan_parameters", recorded("plan", memory.plan_parameters))
    with np.errstate(over="ignore", invalid="ignore"):
        yield seen


def tensors(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"{i}.weight": torch.randn(5, 3 + i % 7, generator=generator) for i in range(count)}


def on_host(monkeypatch: pytest.MonkeyPatch, state: Any, **options: Any) -> Any:
    """Perturb a copy of a state dict as the CPU does; return the record and the copy."""
    with monkeypatch.context() as patch:
        patch.setattr(in_place, "_is_exact_device", lambda name: False)
        copy = {name: tensor.clone() for name, tensor in state.items()}
        return noisytune_cli.perturb_(copy, **options), copy


def test_sums_begin_before_the_plan_and_noise_in_batches(
    events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**tensors(60), "codes": torch.ones(3, 3, dtype=torch.int64), "turned": torch.randn(4, 6).t()}
    here["constant"] = torch.ones(4, 4)
    record, expected = on_host(monkeypatch, here)
    events.clear()
    assert noisytune_cli.perturb_(here) == record
    assert all(torch.equal(here[name], expected[name]) for name in here)
    # The constant tensor is measured, and the transposed one by way of a copy of it.
    sums, noise = [("sums", n) for n in (16, 45)], [("noise", n) for n in (16, 32, 12)]
    assert events == [*sums, ("plan", 63), *noise]


@pytest.mark.parametrize("options", [{"scope": "global"}, {"include": "1*"}, {"granularity": "matrix"}])
def test_the_choice_of_noise_decides_what_can_begin(
    options: Any, events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tensors(40)
    here["layers.0.attn.qkv_proj.weight"] = torch.randn(12, 4)
    record, expected = on_host(monkeypatch, here, **options)
    events.clear()
    assert noisytune_cli.perturb_(here, **options) == record
    assert all(torch.equal(here[name], expected[name]) for name in here)
    assert (events[0][0] == "plan") == ("include" in options)
    assert sum(what == "noise" for what, _ in events) == (2 if "granularity" in options else 1)


def test_a_manifest_needs_sums_only_for_what_is_not_finite(
    events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tensors(20)
    record, expected = on_host(monkeypatch, here)
    events.clear()
    noisytune_cli.perturb_(here, manifest=record)
    assert all(torch.equal(here[name], expected[name]) for name in here)
    assert events == [("sums", 20), ("noise", 20)]


def test_a_refusal_changes_nothing(events: list[Any]) -> None:
    room = torch.randn(40)
    bad: list[tuple[type[Exception], dict[str, Any], dict[str, Any]]] = [
        (InputInvalid, {"a": room[:30].view(5, 6), "b": room[20:].view(4, 5)}, {}),
        (InputInvalid, {f"{i}.weight": torch.full((3, 3), float(i)) for i in range(40)}, {}),
        (InputInvalid, {"a": torch.randn(4, 4), "b": 1}, {}),
        (UsageError, tensors(3), {"exclude": "none"}),
    ]
    for error, state, options in bad:
        before = {name: t.clone() for name, t in state.items() if isinstance(t, torch.Tensor)}
        with pytest.raises(error):
            noisytune_cli.perturb_(state, **options)
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert "noise" not in [what for what, _ in events]
