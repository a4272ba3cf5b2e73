"""Noise in memory: the bits of the command line, nothing else touched, refusals before any change."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import noisytune_cli
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.engine import tiles
from noisytune_cli.errors import InputUnreadable, Mismatch, NoisytuneWarning, UsageError
from noisytune_cli.memory import host as in_place_tables
from noisytune_cli.memory import in_place
from noisytune_cli.memory import spreads as memory
from noisytune_cli.noise.devices import cuda
from noisytune_cli.records import Manifest, NoiseSpec, SourceRecord

DTYPES = ["float32", "bfloat16", "float16", "float64"]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"noise": "gaussian", "seed": 2**64 - 1},
    "global": {"scope": "global", "lam": 0.3},
    "patterns": {"include": ["*weight"], "exclude": "@norm", "rules": {"@attention": 0.5, "*query*": 0.0}},
}


def spec(lam: float = 0.15, seed: int = 0, noise: str = "uniform", **options: Any) -> NoiseSpec:
    """The command line's noise for the same options."""
    options = {
        key: (value,) if isinstance(value, str) and key != "scope" else value
        for key, value in options.items()
    }
    rules = tuple(options.pop("rules", {}).items())
    chosen = {key: value if key == "scope" else tuple(value) for key, value in options.items()}
    return NoiseSpec(lam=lam, seed=seed, distribution=noise, rules=rules, **chosen)


def on_disk(tensors: dict[str, Any], folder: Path, noise: NoiseSpec) -> tuple[dict[str, Any], Manifest]:
    """Store tensors, perturb them with the command line, read them back."""
    safetensors.torch.save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    done = perturb(Request(str(folder / "a.safetensors"), noise), str(folder / "b.safetensors"))
    return safetensors.torch.load_file(folder / "b.safetensors"), done.manifest


def tiny(kind: str, dtype: str = "float32") -> Any:
    """A small model whose every parameter has a spread."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**size, vocab_size=51))
    else:
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, vocab_size=51))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(getattr(torch, dtype))


def bits(tensor: Any) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_model_gets_the_bits_of_the_command_line(
    kind: str, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if kind == "gpt2" and "rules" in options:
        options = {**options, "rules": {"@attention": 0.5, "*c_attn*": 0.0}}
    model = tiny(kind, dtype)
    unique = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected, manifest = on_disk(unique, tmp_path, spec(**options))
    record = noisytune_cli.perturb_(model, **options)
    assert {n: bits(p) for n, p in model.named_parameters()} == {n: bits(t) for n, t in expected.items()}
    here = {r.step.tensor.name: r for r in record.receipts}
    for receipt in manifest.receipts:
        mine = here[receipt.step.tensor.name]
        blank = {"source_digest": "", "digest": "", "step": mine.step}
        assert mine == replace(receipt, **blank)
        assert mine.step.stream == receipt.step.stream
    assert record.noise == manifest.noise


def hostile() -> dict[str, Any]:
    """A state dict with everything in it that must stay as it is."""
    torch.manual_seed(1)
    return {
        "w": torch.randn(70, 30),
        "norm.running_mean": torch.randn(30),
        "norm.running_var": torch.rand(30),
        "norm.num_batches_tracked": torch.tensor(3),
        "constant": torch.full((5, 5), 0.1),
        "logit_scale": torch.tensor(4.6),
        "broken": torch.tensor([1.0, float("nan"), 2.0]),
        "endless": torch.tensor([1.0, float("inf"), 2.0], dtype=torch.float16),
        "empty": torch.empty(0, 3),
        "count": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "near": torch.tensor([65504.0, -65504.0, 60000.0] * 9, dtype=torch.float16),
        "v": torch.randn(9, dtype=torch.float64),
    }


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_a_state_dict_gets_the_bits_of_the_command_line(scope: str, tmp_path: Path) -> None:
    tensors = hostile()
    expected, manifest = on_disk(tensors, tmp_path, spec(scope=scope, lam=0.4))
    record = noisytune_cli.perturb_(tensors, scope=scope, lam=0.4)
    assert {n: bits(t) for n, t in tensors.items()} == {n: bits(t) for n, t in expected.items()}
    reasons = {r.step.tensor.name: r.reason for r in record.receipts}
    assert reasons == {r.step.tensor.name: r.reason for r in manifest.receipts}
    assert sum(r.clamped for r in record.receipts) == sum(r.clamped for r in manifest.receipts) > 0


@pytest.mark.parametrize("names", [None, "net"])
def test_a_norm_is_of_the_kind_that_it_is_on_disk(names: str | None, tmp_path: Path) -> None:
    model = nn.Module()
    model.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    stored = dict(model.state_dict() if names is None else model.net.state_dict())
    expected, _ = on_disk(stored, tmp_path, spec(exclude="@norm"))
    record = noisytune_cli.perturb_(model, exclude="@norm", names=names)
    assert all(torch.equal(expected[name], held) for name, held in stored.items())
    assert [receipt.reason for receipt in record.receipts] == [None, None, "excluded", "excluded"]
    noisytune_cli.Population(model, exclude="@norm", names=names).restore()


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        ({"norm": 1 + torch.linspace(0, 0.01, 64)}, {"lam": 0.05}, "norm: rounding to BF16 left more"),
        ({"a": torch.tensor([1.0, float("nan")])}, {}, "a: left without noise, because"),
        (
            {"a": torch.randn(12, 12).triu(4)},
            {"sigma": 0.1},
            "a: half of the values or more were 0, .*; exclude= keeps pruned",
        ),
        (
            {"a": torch.randn(12, 12).index_fill(0, torch.tensor([3]), -10000.0)},
            {"lam": 0.1},
            "a: .* or less than a thirtieth of their std, .* exclude= keeps pruned",
        ),
        ({}, {"lam": 15}, r"λ 15 gives noise with 4\.33 times the weights' std"),
    ],
    ids=["unchanged", "broken", "pruned", "extreme", "strong"],
)
def test_what_the_noise_does_not_reach_is_warned_of(
    tensors: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    tensors = {name: t.bfloat16() for name, t in {"w": torch.randn(9, 9), **tensors}.items()}
    kept = noisytune_cli.Population({name: t.clone() for name, t in tensors.items()})
    with pytest.warns(NoisytuneWarning, match=words) as caught:
        record = noisytune_cli.perturb_(tensors, **options)
    assert caught[0].filename == __file__
    assert record.warnings == (str(caught[0].message),) == kept.set(**options).warnings


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"b.mean": torch.rand(9)}, r"b\.mean: perturbed, though .* to keep it: exclude='b\.mean'"),
        ({"c": torch.randn(9, 9, dtype=torch.complex64)}, "c: complex numbers, which get no noise"),
    ],
    ids=["doubt", "complex"],
)
def test_what_the_plan_warns_of_is_told_once_of_a_population_and_is_in_its_records(
    tensors: dict[str, Any], words: str
) -> None:
    tensors = {"w": torch.randn(9, 9), **tensors}
    with pytest.warns(NoisytuneWarning, match=words) as caught:
        population = noisytune_cli.Population(tensors)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = population.set(sigma=0.1).warnings
        population.restore()
    with pytest.warns(NoisytuneWarning, match=words) as caught:
        record = noisytune_cli.perturb_(tensors, sigma=0.1)
    assert told == record.warnings == (str(caught[0].message),)
    assert caught[0].filename == __file__


def test_a_warning_of_the_plan_that_is_raised_leaves_the_model_as_it_was() -> None:
    tensors = {"w": torch.randn(9, 9), "b.mean": torch.rand(9)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoisytuneWarning)
        with pytest.raises(NoisytuneWarning, match=r"b\.mean"):
            noisytune_cli.perturb_(tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_equal_bytes_of_a_known_pair_are_a_tie_in_a_state_dict_only() -> None:
    table = torch.randn(20, 4)
    pair = {"model.embed_tokens.weight": table.clone(), "lm_head.weight": table.clone()}
    record = noisytune_cli.perturb_(pair)
    assert {r.step.stream for r in record.receipts} == {"model.embed_tokens.weight"}
    assert torch.equal(*pair.values())
    pair = {"model.embed_tokens.weight": table.clone(), "lm_head.weight": table.clone()}
    noisytune_cli.perturb_(pair, config={"tie_word_embeddings": False})
    assert not torch.equal(*pair.values())
    apart = torch.nn.ModuleDict(
        {"embed_tokens": torch.nn.Embedding(20, 4), "lm_head": torch.nn.Linear(4, 20, False)}
    )
    apart["lm_head"].load_state_dict(apart["embed_tokens"].state_dict())
    noisytune_cli.perturb_(apart)
    assert not torch.equal(apart["lm_head"].weight, apart["embed_tokens"].weight)


def test_a_tie_counts_once_in_the_std_of_all(tmp_path: Path) -> None:
    table, rest = torch.randn(20, 4), {"w": 5 * torch.randn(30)}
    one_storage = {"model.embed_tokens.weight": table, "lm_head.weight": table, **rest}
    models = {
        "alone": {"model.embed_tokens.weight": table, **rest},
        "one storage": one_storage,
        "equal bytes": {**one_storage, "lm_head.weight": table.clone()},
    }
    stds = {}
    for kind, model in models.items():
        folder = tmp_path / kind
        folder.mkdir()
        _, manifest = on_disk({n: t.clone() for n, t in model.items()}, folder, spec(scope="global"))
        record = noisytune_cli.perturb_(copy.deepcopy(model), scope="global")
        stds[kind] = {r.std for r in (*manifest.receipts, *record.receipts)}
    assert len(stds["alone"]) == 1
    assert stds["one storage"] == stds["equal bytes"] == stds["alone"]


def test_one_storage_is_one_parameter_under_all_its_names() -> None:
    table = torch.randn(20, 4)
    once = {"z.embed_tokens.weight": table.clone()}
    noisytune_cli.perturb_(once)
    tied = {"a.weight": table, "z.embed_tokens.weight": table.view(20, 4)}
    record = noisytune_cli.perturb_(tied)
    assert torch.equal(table, once["z.embed_tokens.weight"])
    assert [r.step.stream for r in record.receipts] == ["z.embed_tokens.weight"] * 2


def test_a_modules_parameters_get_noise_whatever_their_names_and_its_buffers_do_not() -> None:
    module = torch.nn.Module()
    module.running_mean = torch.nn.Parameter(torch.randn(8))
    module.register_buffer("weight", torch.randn(8))
    before = bits(module.running_mean), bits(module.weight)
    noisytune_cli.perturb_(module)
    assert bits(module.running_mean) != before[0]
    assert bits(module.weight) == before[1]


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.cat([t, t], dim=1)[:, :7],
        lambda t: t.view(11, 7, 1, 1).to(memory_format=torch.channels_last).view(11, 7),
        lambda t: torch.empty(4 * t.numel() + 1, dtype=torch.uint8)[1:].view(-1)[: 4 * t.numel()].numpy(),
    ],
    ids=["transposed", "columns", "channels last", "unaligned"],
)
def test_noise_follows_the_logical_index_however_values_lie(lay_out: Callable[[Any], Any]) -> None:
    values = torch.randn(11, 7)
    expected = {"w": values.clone()}
    noisytune_cli.perturb_(expected)
    laid = lay_out(values)
    if isinstance(laid, np.ndarray):  # torch makes no unaligned views itself, but takes NumPy's
        unaligned = laid.view(np.float32).reshape(11, 7)
        unaligned[:] = values.numpy()
        laid = torch.from_numpy(unaligned)
        assert laid.data_ptr() % 4
    parameter = torch.nn.Parameter(laid)
    stride = parameter.stride()
    noisytune_cli.perturb_({"w": parameter})
    assert torch.equal(parameter, expected["w"])
    assert parameter.stride() == stride


def test_names_match_a_headed_model_to_its_base_checkpoint() -> None:
    base = torch.nn.ModuleDict({"encoder": torch.nn.Linear(5, 5)})
    headed = torch.nn.ModuleDict({"bert": base, "classifier": torch.nn.Linear(5, 2)})
    start = {name: p.clone() for name, p in headed.state_dict().items()}
    noisytune_cli.perturb_(base)
    expected = {name: bits(p) for name, p in base.state_dict().items()}
    ways = ["bert", "bert.", lambda name: name.removeprefix("bert."), {f"bert.{n}": n for n in expected}]
    for names in ways:
        headed.load_state_dict(start)
        record = noisytune_cli.perturb_(headed, names=names, fresh_names="classifier.*")
        assert {name: bits(p) for name, p in base.state_dict().items()} == expected
        assert torch.equal(headed["classifier"].weight, start["classifier.weight"])
        assert [r.reason for r in record.receipts] == [None, None, "excluded", "excluded"]
    with pytest.raises(UsageError, match="encoder"):
        noisytune_cli.perturb_(headed, names=lambda name: "encoder")


def test_frozen_and_fresh_parameters_are_left_out_or_not() -> None:
    def perturbed(**options: Any) -> list[bool]:
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, False), "b": torch.nn.Linear(3, 3, False)})
        model["a"].weight.requires_grad_(False)
        record = noisytune_cli.perturb_(model, **options)
        return [r.action == "perturb" for r in record.receipts]

    assert perturbed() == [True, True]
    assert perturbed(frozen="copy") == [False, True]
    assert perturbed(fresh_names=["b.*"]) == [True, False]
    assert perturbed(fresh_names=["b.*"], fresh="perturb") == [True, True]
    with pytest.raises(UsageError, match="matches nothing"):
        perturbed(fresh_names="c.*")
    with pytest.raises(UsageError, match="nothing would be perturbed"):
        perturbed(frozen="copy", fresh_names="b.*")


def test_autograd_sees_a_change_and_no_history() -> None:
    linear = torch.nn.Linear(4, 4)
    version = linear.weight._version
    loss = (linear.weight**2).sum()
    noisytune_cli.perturb_(linear)
    assert linear.weight.is_leaf
    assert linear.weight.requires_grad
    assert linear.weight.grad_fn is None
    assert linear.weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("granularity", ["tensor", "matrix"])
def test_autograd_sees_a_change_that_an_interrupt_ends(
    granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(4, 12)
    version = weight._version

    def add_half(*arguments: Any, **keywords: Any) -> Any:
        weight.numpy()[:2] = 0  # which torch does not count
        raise KeyboardInterrupt

    monkeypatch.setattr(in_place_tables if granularity == "tensor" else tiles, "add_noise", add_half)
    with pytest.raises(KeyboardInterrupt):
        noisytune_cli.perturb_({"h.0.attn.c_attn.weight": weight}, granularity=granularity)
    assert weight._version == version + 1


def test_one_copy_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[torch.Tensor]] = []
    host_values = in_place.host_values

    def copied(values: torch.Tensor) -> torch.Tensor:
        assert [copy() for copy in copies] == [None] * len(copies)
        host = host_values(values)
        assert host.data_ptr() != values.data_ptr()
        copies.append(weakref.ref(host))
        return host

    monkeypatch.setattr(in_place, "host_values", copied)
    noisytune_cli.perturb_({f"w{i}": torch.randn(3, 5 + i).t() for i in range(4)}, threads=1)
    assert len(copies) == 8


def test_inference_tensors_get_noise() -> None:
    with torch.inference_mode():
        values = torch.randn(6, 4)
        tensors = {"w": values.clone(), "t": values.t().clone().t()}
    noisytune_cli.perturb_(tensors)
    expected = {"w": values.clone(), "t": values.clone()}
    noisytune_cli.perturb_(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_manifest_gives_the_noise_again(tmp_path: Path) -> None:
    tensors = {name: t for name, t in hostile().items() if name != "near"}
    expected, manifest = on_disk(tensors, tmp_path, spec(noise="gaussian", seed=5, exclude=["v"]))
    path = tmp_path / "b.safetensors.noisytune.json"
    for given in (manifest, path, str(path), tmp_path / "b.safetensors"):
        again = {"head": torch.randn(3, 3), **{name: t.clone() for name, t in tensors.items()}}
        head = bits(again["head"])
        record = noisytune_cli.perturb_(again, manifest=given)
        assert bits(again.pop("head")) == head
        assert {n: bits(t) for n, t in again.items()} == {n: bits(t) for n, t in expected.items()}
        assert (record.noise, record.source) == (manifest.noise, manifest.source)
    with pytest.raises(Mismatch, match=r"\[70, 30\]"):
        noisytune_cli.perturb_({"w": torch.randn(30, 70)}, manifest=manifest)
    with pytest.raises(UsageError, match="manifest="):
        noisytune_cli.perturb_(tensors, manifest=manifest, lam=0.1)
    with pytest.raises(InputUnreadable):
        noisytune_cli.perturb_(tensors, manifest=tmp_path / "a.safetensors")


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_where_the_bound_cannot_decide_exact_sums_do(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, tensors = hostile(), hostile()
    noisytune_cli.perturb_(expected, scope=scope)
    monkeypatch.setattr(memory, "std_and_equality", lambda parts: None)
    noisytune_cli.perturb_(tensors, scope=scope)
    assert {n: bits(t) for n, t in tensors.items()} == {n: bits(t) for n, t in expected.items()}


@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_and_threads_do_not_matter(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, tensors = hostile(), hostile()
    noisytune_cli.perturb_(expected)
    for module in (in_place, in_place_tables):
        monkeypatch.setattr(module, "_TILE_BYTES", 64)
    noisytune_cli.perturb_(tensors, threads=threads)
    assert {n: bits(t) for n, t in tensors.items()} == {n: bits(t) for n, t in expected.items()}


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_a_devices_operations_give_the_same_and_are_waited_for_twice(
    noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> dict[str, Any]:
        return {**hostile(), "large": torch.randn(1001, 1003), "turned": torch.randn(30, 40).t()}

    torch.manual_seed(3)
    expected = make()
    record = noisytune_cli.perturb_(expected, noise=noise)
    torch.manual_seed(3)
    tensors = make()
    waits: list[int] = []
    fetch = in_place.fetch
    monkeypatch.setattr(in_place, "_is_exact_device", lambda name: True)
    for proof in ("adds_exactly", "sums_exactly"):  # the fused kernels have tests of their own
        monkeypatch.setattr(cuda, proof, lambda *kind: False)
    monkeypatch.setattr(in_place, "fetch", lambda sent: waits.append(len(sent[0][0])) or fetch(sent))
    assert noisytune_cli.perturb_(tensors, noise=noise) == record
    assert {n: bits(t) for n, t in tensors.items()} == {n: bits(t) for n, t in expected.items()}
    assert len(waits) == 2
    assert min(waits) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_subnormal_numbers_stay_though_torch_flushes_them(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    plain, flushed = {"w": tiny.to(dtype)}, {"w": tiny.to(dtype)}
    noisytune_cli.perturb_(plain)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormal numbers")
    try:
        noisytune_cli.perturb_(flushed)
        still = float(torch.tensor(torch.finfo(torch.float32).tiny) / 2)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(plain["w"].view(torch.uint8), flushed["w"].view(torch.uint8))
    assert still == 0.0  # the caller's setting is as it was


def test_importing_the_package_imports_nothing_heavy_and_every_public_name_is_there() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'huggingface_hub', 'typer'}"
    code = f"import sys, noisytune_cli; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.strip() == "[]"
    pytest.importorskip("transformers")
    for name in noisytune_cli.__all__:
        assert getattr(noisytune_cli, name)
        assert name in dir(noisytune_cli)
    with pytest.raises(AttributeError, match="perturbed"):
        noisytune_cli.perturbed  # noqa: B018


def test_the_same_seed_twice_is_refused_unless_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    noisytune_cli.perturb_(model, include="0.*")
    noisytune_cli.perturb_(model, exclude="0.*")
    noisytune_cli.perturb_(model, seed=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for options in ({}, {"seed": 1}, {"include": "1.weight"}, {"lam": 0.3}):
        with pytest.raises(UsageError, match=r"noised before.*again=True"):
            noisytune_cli.perturb_(model, **options)
    with pytest.raises(UsageError, match="noised before"):
        noisytune_cli.perturb_(nn.ModuleList([model]), names="0")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    noisytune_cli.perturb_(model, again=True)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    noisytune_cli.perturb_(copy.deepcopy(model))
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()})
    noisytune_cli.perturb_(model)


def test_a_record_shows_as_a_line_and_as_a_small_table() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)), nn.LayerNorm(8))
    record = noisytune_cli.perturb_(model, seed=5)
    assert repr(record) == (
        "<Manifest of 'Sequential': tensors 82, perturbed 80, constant 2, λ 0.15, seed 5, "
        "noise uniform scaled with each tensor's std>"
    )
    absolute = noisytune_cli.perturb_(nn.Linear(8, 8), sigma=0.01)
    assert "σ 0.01, seed 0, noise gaussian of one std for all tensors" in repr(absolute)
    mixed = noisytune_cli.perturb_(nn.Linear(8, 8), mix=[{"seed": s, "sigma": 0.01} for s in (3, 9)])
    assert "seed 2 in a mixture, noise gaussian of one std" in repr(mixed)
    shared = noisytune_cli.perturb_(nn.Linear(8, 8), scope="global")
    assert "scaled with one std for all tensors" in repr(shared)
    html = replace(record, source=SourceRecord("<b>", None, ()))._repr_html_()
    assert html.startswith("<table><caption>&lt;b&gt;</caption><tr><th>tensors</th><td>82</td></tr>")
    assert len(html) < 500
