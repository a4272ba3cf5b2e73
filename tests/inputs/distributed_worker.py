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

from noisytune_cli import perturb_
from noisytune_cli.errors import InputInvalid
from noisytune_cli.memory import host as in_place_tables
from noisytune_cli.memory import perturb as memory
from noisytune_cli.memory import sharded

OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "global"},
    {"noise": "gaussian", "seed": 9, "exclude": "0.bias"},
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
        assert count == 0, count
        assert_same(expected, again)


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
    expected = {name: torch.randn(shape) for name in kinds}
    parts = {name: distribute_tensor(expected[name].clone(), mesh, [kind]) for name, kind in kinds.items()}
    broken = torch.tensor([1.0, 2.0, float("nan")])
    expected["broken"], parts["broken"] = broken, distribute_tensor(broken.clone(), mesh, [Shard(0)])
    perturb_(expected)
    record, count = reductions(lambda: perturb_(parts))
    assert count == 1, count
    for name in kinds:
        assert torch.equal(parts[name].full_tensor(), expected[name]), name
    assert next(r for r in record.receipts if r.step.tensor.name == "broken").reason == "non-finite"


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
    for case in (replicas, fsdp, several_tiles, exact, placements, strided, partial):
        case()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # all cases have passed; torch's own threads now and then abort a process on its way out
