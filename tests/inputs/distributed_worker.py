"""One of two processes that hold a model in parts; `test_sharded.py` starts both and reads their exit codes.

Every case perturbs the parts here and checks the gathered tensors against the whole model perturbed at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from noisytune_cli import Population, perturb_
from noisytune_cli.errors import InputInvalid
from noisytune_cli.memory import host as in_place_tables
from noisytune_cli.memory import sharded
from noisytune_cli.memory import spreads as memory

OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "global"},
    {"noise": "gaussian", "seed": 9, "exclude": "0.bias"},
    {"sigma": 0.1, "shrink": 0.7},
    {"mix": [{"seed": 1, "lambda": 0.5}, {"seed": 2, "lambda": 0.5}]},
]

_calls: list[Any] = []


def counted(all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        _calls.append(arguments[0].shape)
        return all_reduce(*arguments, **keywords)

    return call


def reductions(work: Callable[[], Any]) -> tuple[Any, int]:
    """Do some work; return its result and how many all-reduces it took."""
    _calls.clear()
    result = work()
    return result, len(_calls)


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """Sizes that two processes cannot share evenly; one parameter that only the first of them has, a tie."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(7, 5),
        torch.nn.Linear(5, 1),
        torch.nn.LayerNorm(3),
        torch.nn.Linear(5, 9),
        torch.nn.Linear(5, 9),
    )
    layers[4].weight = layers[3].weight
    return layers.to(dtype)


def whole(parameter: Any) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def same_bytes(part: Any, expected: torch.Tensor) -> bool:
    return torch.equal(whole(part).view(torch.uint8), expected.view(torch.uint8))


def assert_same(expected: Any, parts: Any) -> None:
    wanted = dict(expected.named_parameters())
    for name, parameter in parts.named_parameters():
        assert torch.equal(whole(parameter), wanted[name]), name


def fsdp() -> None:
    for dtype, options in [*((torch.float32, options) for options in OPTIONS), (torch.bfloat16, {})]:
        expected, parts = model(dtype), model(dtype)
        record = perturb_(expected, **options)
        fully_shard(parts)
        assert any(isinstance(p, DTensor) for p in parts.parameters())
        mine, count = reductions(lambda parts=parts, options=options: perturb_(parts, **options))
        assert count == 1, count
        assert_same(expected, parts)
        for here, there in zip(mine.receipts, record.receipts, strict=True):
            assert (here.step, here.reason, here.std, here.amplitude) == (
                there.step,
                there.reason,
                there.std,
                there.amplitude,
            )
        counts = torch.tensor([[r.unchanged, r.clamped] for r in mine.receipts])
        dist.all_reduce(counts)
        assert counts.tolist() == [[r.unchanged, r.clamped] for r in record.receipts]
        again = model(dtype)
        fully_shard(again)
        _, count = reductions(lambda again=again, record=record: perturb_(again, manifest=record))
        assert count == 1, count
        assert_same(expected, again)


def populations() -> None:
    """Noise after noise on parts, with forward passes in between, which leave whole parameters behind."""
    base, parts = model(), model()
    fully_shard(parts)
    inputs = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    population, count = reductions(lambda: Population(parts))
    assert count == 0, count
    for seed in range(3):
        for options in ({"sigma": 0.1, "shrink": 0.5}, {"lam": 0.3}):
            expected = model()
            perturb_(expected, seed=seed, **options)
            _, count = reductions(lambda options=options, seed=seed: population.set(seed=seed, **options))
            assert count == (seed == 0), count
            parts.unshard()
            assert torch.equal(parts[4](inputs), expected[4](inputs))
            assert not isinstance(parts[1].weight, DTensor)
    population.restore()
    assert isinstance(parts[1].weight, DTensor)
    assert_same(base, parts)
    parts.unshard()
    perturb_(base, sigma=0.1)
    perturb_(parts, sigma=0.1)
    assert_same(base, parts)


def replicas() -> None:
    expected, parts = model(), DistributedDataParallel(model())
    perturb_(expected)
    _, count = reductions(lambda: perturb_(parts, names="module"))
    assert count == 0, count
    assert_same(expected, parts.module)


def exact() -> None:
    decide = memory.std_and_equality
    memory.std_and_equality = lambda parts: None
    try:
        for scope in ("matrix", "global"):
            expected, parts = model(), model()
            fully_shard(parts)
            _, count = reductions(lambda parts=parts, scope=scope: perturb_(parts, scope=scope))
            assert count == 2, count
            perturb_(expected, scope=scope)
            assert_same(expected, parts)
    finally:
        memory.std_and_equality = decide


def several_tiles() -> None:
    """Parts of more than one tile: one sum for each, with the std and the noise of the whole."""
    size = in_place_tables._TILE_BYTES
    in_place_tables._TILE_BYTES = 8
    try:
        fsdp()
    finally:
        in_place_tables._TILE_BYTES = size


def placements() -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    shape = (5, 7, 3)
    kinds = {"0": Shard(0), "1": Shard(1), "2": Shard(2), "all": Replicate()}
    values = {name: torch.randn(shape) for name in kinds}
    values["broken"], kinds["broken"] = torch.tensor([1.0, 2.0, float("nan")]), Shard(0)
    for options in ({}, {"sigma": 0.1}):
        expected = {name: value.clone() for name, value in values.items()}
        parts, again = (
            {name: distribute_tensor(values[name].clone(), mesh, [kind]) for name, kind in kinds.items()}
            for _ in range(2)
        )
        perturb_(expected, **options)
        record, count = reductions(lambda parts=parts, options=options: perturb_(parts, **options))
        assert count == 1, count
        assert _calls[0] == ((4,) if options else (2, 4, 7)), _calls  # whether all is finite, or moments
        with Population(again) as many:
            many.set(**options)
            assert all(same_bytes(again[name], expected[name]) for name in kinds)
        assert all(same_bytes(again[name], values[name]) for name in kinds)
        assert all(same_bytes(parts[name], expected[name]) for name in kinds)
        assert next(r for r in record.receipts if r.step.tensor.name == "broken").reason == "non-finite"
    # Noise that was recorded for finite values, where one process alone holds what is not.
    record = perturb_({name: torch.randn(value.shape) for name, value in values.items()})
    parts = {name: distribute_tensor(values[name].clone(), mesh, [kind]) for name, kind in kinds.items()}
    repeated, count = reductions(lambda: perturb_(parts, manifest=record))
    assert count == 1, count
    assert [name for name in kinds if same_bytes(parts[name], values[name])] == ["broken"]
    assert next(r for r in repeated.receipts if r.step.tensor.name == "broken").reason == "non-finite"


def state_dicts() -> None:
    """A known pair is a tie where all its bytes are equal, in parts too; what is whole here is looked at."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    names = "model.embed_tokens.weight", "lm_head.weight"
    for differs in (False, True):
        table = torch.randn(8, 4)
        pair = {name: table.clone() for name in names}
        if differs:
            pair[names[1]][-1, -1] = 0.5  # which the second process alone can see
        expected = {name: values.clone() for name, values in pair.items()}
        perturb_(expected, sigma=0.1)
        parts = {name: distribute_tensor(values, mesh, [Shard(0)]) for name, values in pair.items()}
        _, count = reductions(lambda parts=parts: perturb_(parts, sigma=0.1))
        assert count == 2, count
        assert all(same_bytes(parts[name], expected[name]) for name in names)
        assert torch.equal(whole(parts[names[0]]), whole(parts[names[1]])) is not differs
    statistics = {"obs.mean": torch.randn(9), "obs.std": torch.rand(9) + 0.1}
    parts = {name: distribute_tensor(values, mesh, [Replicate()]) for name, values in statistics.items()}
    parts["w.weight"] = distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)])
    record = perturb_(parts)
    assert [r.reason for r in record.receipts] == ["buffer", "buffer", None], record.receipts


def strided() -> None:
    """What fully_shard makes of rows that tensor parallelism has split before: runs with gaps."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    values = torch.arange(22.0).view(11, 2)
    placement = _StridedShard(0, split_factor=2)
    pieces, _ = placement._split_tensor(values, 2, with_padding=False)
    local = pieces[mesh.get_local_rank("dp")]
    part = DTensor.from_local(
        local, mesh, [placement, Replicate()], shape=values.shape, stride=values.stride(), run_check=False
    )
    held = sharded.held_part(part, "w")
    assert len(held.runs) == 2
    flat = values.flatten()
    found = torch.cat([flat[run.first : run.first + run.count] for run in held.runs])
    assert torch.equal(found, local.flatten())


def partial() -> None:
    from torch.distributed.tensor.placement_types import Partial

    mesh = init_device_mesh("cpu", (2,))
    sums = DTensor.from_local(torch.randn(3), mesh, [Partial()], run_check=False)
    why = ""
    try:
        perturb_({"w": sums})
    except InputInvalid as error:
        why = error.why
    assert "placement" in why, why


def main(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    dist.all_reduce = counted(dist.all_reduce)
    for case in (
        replicas,
        fsdp,
        populations,
        several_tiles,
        exact,
        placements,
        state_dicts,
        strided,
        partial,
    ):
        case()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # all cases have passed; torch's own threads now and then abort a process on its way out
