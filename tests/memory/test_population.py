"""Noise after noise on one model: the bits of `perturb_` each time, and the base's own bits afterwards."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import noisytune_cli
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.memory import host, in_place, spreads
from noisytune_cli.noise.devices import cuda

MIX = [{"seed": 1, "sigma": 0.02}, {"seed": 2, "sigma": 0.03, "coefficient": -0.5}]
NOISES: list[dict[str, Any]] = [
    {"sigma": 0.01, "seed": 3},
    {"sigma": -0.01, "seed": 3},
    {"mix": MIX},
    {"lam": 0.2, "seed": 9, "shrink": 0.5},
    {"scope": "global"},
    {"lam": 0.3, "granularity": "matrix", "splits": {"fused.weight": "0:/3"}},
    {"sigma": 0, "rules": {"plain.*": 0.5}},
    {"mix": MIX, "shrink": 0.0},
]


def model() -> Any:
    """Every layout and dtype, a tie, a frozen parameter, values that are not finite, and a NaN's payload."""
    torch.manual_seed(0)
    made = torch.nn.ModuleDict(
        {
            "plain": torch.nn.Linear(33, 17),
            "brief": torch.nn.Linear(9, 5).to(torch.bfloat16),
            "small": torch.nn.Linear(9, 5).half(),
            "wide": torch.nn.Linear(4, 3).double(),
            "fused": torch.nn.Linear(8, 12),
            "table": torch.nn.Embedding(11, 4),
            "head": torch.nn.Linear(4, 11, bias=False),
            "norm": torch.nn.BatchNorm1d(3),
        }
    )
    made["head"].weight = made["table"].weight
    made["plain"].bias.requires_grad_(False)
    made["turned"] = torch.nn.Linear(6, 7)
    made["turned"].weight = torch.nn.Parameter(torch.randn(6, 7).t())
    made["broken"] = torch.nn.Linear(3, 1)
    with torch.no_grad():
        made["broken"].weight.view(torch.int32)[0, 1] = 0x7FC00123
        made["norm"].weight.fill_(-0.0)
    return made


def bits(tensor: Any) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state(module: Any) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in module.state_dict().items()}


def by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch operations stand in for those of a GPU."""
    monkeypatch.setattr(in_place, "_is_exact_device", lambda name: True)
    for proof in ("adds_exactly", "sums_exactly"):
        monkeypatch.setattr(cuda, proof, lambda *kind: False)


@pytest.mark.parametrize("on_device", [False, True], ids=["kernels", "operations"])
@pytest.mark.parametrize("keeps", ["there", "host"])
def test_each_noise_has_the_bits_of_perturb_and_the_base_comes_back(
    on_device: bool, keeps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:
        by_operations(monkeypatch)
    here = model()
    before = state(here)
    layouts = {name: p.stride() for name, p in here.named_parameters()}
    population = noisytune_cli.Population(here, host=keeps == "host")
    assert state(here) == before
    for noise in NOISES:
        expected = model()
        record = noisytune_cli.perturb_(expected, **noise)
        mine = population.set(**noise)
        assert state(here) == state(expected), noise
        assert mine == record
    population.restore()
    assert state(here) == before
    assert {name: p.stride() for name, p in here.named_parameters()} == layouts
    assert here["head"].weight is here["table"].weight


def test_thirty_noises_leave_no_trace() -> None:
    here = model()
    before = state(here)
    with noisytune_cli.Population(here) as population:
        for seed in range(30):
            population.set(sigma=0.1, seed=seed)
    assert state(here) == before


def test_a_block_with_noise_ends_with_the_models_own_bits() -> None:
    here, expected = model(), model()
    before = state(here)
    noisytune_cli.perturb_(expected, sigma=0.01, seed=7)
    with noisytune_cli.noisy(here, sigma=0.01, seed=7) as record:
        assert state(here) == state(expected)
        assert record.noise.seed == 7
        with noisytune_cli.noisy(here, 0.3):  # noise on noise, which goes first
            assert state(here) != state(expected)
        assert state(here) == state(expected)
    assert state(here) == before


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=repr)
def test_the_base_comes_back_after_an_exception(error: BaseException) -> None:
    here = model()
    before = state(here)

    def fail() -> None:
        with noisytune_cli.noisy(here, sigma=0.01):
            assert state(here) != before
            raise error

    with pytest.raises(type(error)):
        fail()
    assert state(here) == before


def test_the_base_comes_back_when_noise_is_interrupted_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    here = model()
    before = state(here)
    add_noise = host.add_noise

    def interrupted(*arguments: Any) -> Any:
        add_noise(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "add_noise", interrupted)
    with pytest.raises(KeyboardInterrupt), noisytune_cli.noisy(here, sigma=0.01):
        pass
    assert state(here) == before


def test_the_base_is_measured_once_and_for_a_sigma_only_for_what_is_not_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[int] = []
    measure, find = in_place.measure, spreads.std_and_equality
    stds: list[int] = []
    monkeypatch.setattr(
        in_place, "measure", lambda parts, n: measured.append(len(parts)) or measure(parts, n)
    )
    monkeypatch.setattr(spreads, "std_and_equality", lambda parts: stds.append(1) or find(parts))
    population = noisytune_cli.Population(model())
    assert measured == []
    for seed in range(3):
        population.set(sigma=0.1, seed=seed)
    assert (len(measured), stds) == (1, [])
    for seed in range(3):
        population.set(lam=0.1, seed=seed)
    assert len(measured) == 1
    first = len(stds)
    population.set(lam=0.4)
    assert 0 < first == len(stds)


def test_what_was_done_to_the_model_meanwhile_is_overwritten() -> None:
    here, expected = model(), model()
    noisytune_cli.perturb_(expected, sigma=0.1, seed=1)
    before = state(here)
    population = noisytune_cli.Population(here)
    with torch.no_grad():
        for parameter in here.parameters():
            parameter.zero_()
    population.set(sigma=0.1, seed=1)
    assert state(here) == state(expected)
    with torch.no_grad():
        here["plain"].weight.fill_(3)
    population.restore()
    assert state(here) == before


def test_only_what_may_get_noise_is_kept_and_changed() -> None:
    here = model()
    before = state(here)
    population = noisytune_cli.Population(here, include="plain.*", frozen="copy")
    assert list(population._kept) == ["plain.weight"]
    population.set(sigma=0.1)
    after = state(here)
    assert [name for name in before if before[name] != after[name]] == ["plain.weight"]
    with pytest.raises(UsageError, match="matches nothing"):
        noisytune_cli.Population(here, include="none.*")
    with pytest.raises(UsageError, match="sigma"):
        population.set(sigma="much")
    assert state(here) == after


def test_a_state_dict_and_a_tie_by_equal_bytes() -> None:
    table = torch.randn(20, 4)
    tensors = {
        "model.embed_tokens.weight": table.clone(),
        "lm_head.weight": table.clone(),
        "n": torch.ones(3),
    }
    before = {name: bits(t) for name, t in tensors.items()}
    expected = {name: t.clone() for name, t in tensors.items()}
    noisytune_cli.perturb_(expected, sigma=0.1, seed=4)
    population = noisytune_cli.Population(tensors)
    # All values are equal now, and still only the pair that was one is one.
    population.set(sigma=0, shrink=0)
    population.set(sigma=0.1, seed=4)
    assert {name: bits(t) for name, t in tensors.items()} == {name: bits(t) for name, t in expected.items()}
    population.restore()
    assert {name: bits(t) for name, t in tensors.items()} == before


def test_a_model_whose_parameters_moved_gets_the_noise_where_they_are_now() -> None:
    here, expected = model(), model()
    noisytune_cli.perturb_(expected, sigma=0.1)
    before = state(here)
    population = noisytune_cli.Population(here)
    here.load_state_dict(copy.deepcopy(here.state_dict()), assign=True)
    here["head"].weight = here["table"].weight
    population.set(sigma=0.1)
    assert state(here) == state(expected)
    population.restore()
    assert state(here) == before


def freed(module: Any) -> None:
    module["plain"].weight = torch.nn.Parameter(torch.randn(17, 33))
    module["plain"].weight.untyped_storage().resize_(0)


def untied(module: Any) -> None:
    module["head"].weight = torch.nn.Parameter(module["head"].weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m["plain"].double(), "it is now torch.float64"),
        (lambda m: m["plain"].register_parameter("weight", None), "no tensor of that name"),
        (lambda m: setattr(m["plain"], "weight", torch.nn.Parameter(torch.ones(2))), r"\[2\], and was"),
        (freed, "freed"),
        (untied, "one parameter with it"),
        (lambda m: m["plain"].to("meta"), "freed|meta"),
    ],
)
def test_a_model_with_other_parameters_is_refused_and_the_rest_restored(
    change: Callable[[Any], Any], why: str
) -> None:
    here = model()
    before = state(here)
    population = noisytune_cli.Population(here)
    population.set(sigma=0.1)
    change(here)
    with pytest.raises(InputInvalid, match=why):
        population.set(sigma=0.2)
    with pytest.raises(InputInvalid, match=why):
        population.restore()
    assert bits(here["brief"].weight) == before["brief.weight"]
    assert bits(here["turned"].weight) == before["turned.weight"]


def test_parameters_that_were_tied_meanwhile_are_refused_and_the_first_restored() -> None:
    here = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "abc"})
    before = state(here)
    population = noisytune_cli.Population(here)
    population.set(sigma=0.1)
    here["b"].weight = here["a"].weight
    noisy = state(here)
    with pytest.raises(InputInvalid, match=r"b\.weight.*shares memory"):
        population.set(sigma=0.2)
    assert state(here) == noisy
    with pytest.raises(InputInvalid, match=r"b\.weight.*shares memory"):
        population.restore()
    assert state(here) == before | {"b.weight": before["a.weight"]}


def test_autograd_sees_the_changes() -> None:
    here = model()
    population = noisytune_cli.Population(here)
    for change in (lambda: population.set(sigma=0.1), population.restore):
        versions = {name: p._version for name, p in here.named_parameters() if "broken" not in name}
        change()
        assert all(p._version > versions[n] for n, p in here.named_parameters() if n in versions)
        assert here["plain"].weight.grad_fn is None


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"granularity": "matrix", "splits": {"0.weight": "0:/2"}}], ids=str)
def test_autocast_sees_the_changes_inside_its_block(options: dict[str, Any], grad: Any) -> None:
    torch.manual_seed(0)
    here = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    here[1].weight = torch.nn.Parameter(torch.randn(6, 4).t())
    population = noisytune_cli.Population(here)
    changes = [
        population.restore,
        lambda: population.set(sigma=1.0, seed=1, **options),
        lambda: noisytune_cli.perturb_(here, sigma=1.0, seed=2, again=True, **options),
        population.restore,
    ]

    def scores(autocast: Any, *, apart: bool) -> list[float]:
        """What the model says after each change, which is made with or without autocast."""
        found = []
        for change in changes:
            with torch.autocast("cpu", enabled=False) if apart else contextlib.nullcontext():
                change()
            with autocast():
                found.append(here(torch.ones(3, 8)).float().mean().item())
        return found

    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with grad():
        expected = scores(autocast, apart=False)
        assert len(set(expected)) == 3
        for inner in (contextlib.nullcontext, autocast):
            for apart in (False, True):
                with autocast():
                    assert scores(inner, apart=apart) == expected


def test_autocast_sees_the_change_of_a_slice() -> None:
    fused = torch.nn.Linear(8, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = fused(torch.ones(3, 8))
        noisytune_cli.add_noise_(fused.weight[2:4], name="k", sigma=1.0)
        changed = (fused(torch.ones(3, 8)) != before).any(0)
    assert changed.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("weight_norm", [True, False])
def test_cached_parametrizations_see_the_changes(weight_norm: bool) -> None:
    layer = torch.nn.Linear(6, 4)
    if weight_norm:
        torch.nn.utils.parametrizations.weight_norm(layer)
    else:
        torch.nn.utils.parametrizations.spectral_norm(layer.eval())
    plain = layer.weight.detach().clone()
    with torch.nn.utils.parametrize.cached():
        assert torch.equal(layer.weight, plain)
        with noisytune_cli.noisy(layer, sigma=1.0):
            assert not torch.equal(layer.weight, plain)
        assert torch.equal(layer.weight, plain)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        tensors = {"w": torch.randn(6, 4), "t": torch.randn(5, 3).t()}
    before = {name: bits(t) for name, t in tensors.items()}
    with noisytune_cli.noisy(tensors, sigma=0.1):
        assert {name: bits(t) for name, t in tensors.items()} != before
    assert {name: bits(t) for name, t in tensors.items()} == before


class _Adapted(torch.nn.Module):
    """A layer with an adapter, by the marks that peft's layers bear."""

    adapter_layer_names = ("lora_A",)

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = torch.nn.Linear(12, 8)
        self.lora_A = torch.nn.Linear(12, 2, bias=False)


def test_adapters_are_left_alone_and_the_base_has_its_own_names() -> None:
    torch.manual_seed(5)
    model = torch.nn.Sequential(_Adapted())
    base = {"0.weight": model[0].base_layer.weight.detach().clone()}
    adapter = model[0].lora_A.weight.detach().clone()
    noisytune_cli.perturb_(base, sigma=0.1, seed=3)
    before = model[0].base_layer.weight.detach().clone()
    with noisytune_cli.noisy(model, sigma=0.1, seed=3):
        assert torch.equal(model[0].lora_A.weight, adapter)
        assert torch.equal(model[0].base_layer.weight, base["0.weight"])
    assert torch.equal(model[0].base_layer.weight, before)


def test_noise_that_the_base_has_is_not_added_twice_afterwards() -> None:
    noised = torch.nn.Linear(4, 4)
    noisytune_cli.perturb_(noised, seed=3)
    with noisytune_cli.noisy(noised, sigma=0.1, seed=3):
        pass
    with pytest.raises(UsageError, match="noise of seed 3 from an earlier call"):
        noisytune_cli.perturb_(noised, seed=3)
