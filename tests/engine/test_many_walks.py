"""Several outputs of one walk: each is what a walk of its own gives, and the source is read as for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, numbers, save, weights

from noisytune_cli.checkpoint.formats import open_source
from noisytune_cli.engine import walk as walk_module
from noisytune_cli.engine.walk import Output, Walk, work_bytes
from noisytune_cli.noise.devices import open_device
from noisytune_cli.plan.plan import make_plan
from noisytune_cli.records import NoiseSpec, Receipt, TensorSpec

TENSORS = {
    **{f"{dtype}.weight": weights(dtype, 11, 30, seed=i) for i, dtype in enumerate(("F32", "F64", "BF16"))},
    "small.weight": weights("F16", 7),
    "constant.weight": numbers("F32", *[1.0] * 9),
    "infinite.weight": numbers("F32", 1.0, math.inf),
    "logit_scale": Tensor("F32", np.array(2.5, "<f4")),
    "ids": Tensor("I64", np.arange(50)),
    "empty.weight": Tensor("F32", np.zeros((0, 3), "<f4")),
}

RULE = (("F32.weight", 0.3),)


class Counting:
    """A source that counts what is read of it."""

    def __init__(self, source: Any) -> None:
        self.read_bytes = 0
        self.tensors = source.tensors
        self._source = source

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        self.read_bytes += len(buffer)
        return self._source.read(tensor, start, buffer)


class Kept:
    """A sink that keeps what is written, by tensor and place."""

    def __init__(self) -> None:
        self.written: dict[tuple[str, int], bytes] = {}

    def space(self, tensor: TensorSpec, start: int, nbytes: int) -> memoryview | None:
        return None

    def write(self, tensor: TensorSpec, start: int, buffer: bytes | memoryview) -> None:
        assert (tensor.name, start) not in self.written
        self.written[tensor.name, start] = bytes(buffer)

    def finish(self) -> None: ...
    def abort(self) -> None: ...


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("many") / "in.safetensors", TENSORS)


def carry_out(
    path: Path, noises: Sequence[NoiseSpec], threads: int = 1, recorded: Sequence[Any] = ()
) -> tuple[list[dict[tuple[str, int], bytes]], tuple[tuple[Receipt, ...], ...], int]:
    """Walk with tiles of 64 bytes; return what each output was given, the receipts, and the bytes read."""
    opened = open_source(path, "f", False)
    source = Counting(opened)
    done: list[int] = []
    sinks = [Kept() for _ in noises]
    variants = [
        Output(make_plan(source.tensors, noise), {"f": sink}, recorded=dict(recorded[i]) if recorded else {})
        for i, (noise, sink) in enumerate(zip(noises, sinks, strict=True))
    ]
    walk = Walk(open_device("cpu"), threads, tile_bytes=64, progress=done.append)
    receipts = walk.carry_out(variants, {"f": source})  # type: ignore[dict-item]
    opened.close()
    assert sum(done) == work_bytes(variants)
    return [sink.written for sink in sinks], receipts, source.read_bytes


@pytest.mark.parametrize("buffer", [0, 512, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("rules", [(), RULE], ids=["", "rule"])
def test_each_output_is_that_of_a_walk_of_its_own(
    source: Path,
    buffer: int,
    threads: int,
    distribution: str,
    scope: Any,
    rules: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walk_module, "_LARGEST_KEPT", buffer)
    noises = [
        NoiseSpec(lam=lam, seed=seed, distribution=distribution, scope=scope, rules=rules)
        for lam, seed in ((0.1, 0), (0.1, 1), (0.0, 0), (0.2, 0), (1e-44, 0))
    ]
    written, receipts, read = carry_out(source, noises, threads)
    alone = [carry_out(source, [noise]) for noise in noises]
    assert written == [one[0] for (one, _, _) in alone]
    assert receipts == tuple(one for (_, (one,), _) in alone)
    assert read == max(bytes_read for (_, _, bytes_read) in alone)


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_recorded_outputs_are_written_without_measuring(source: Path, scope: Any) -> None:
    noises = [NoiseSpec(seed=seed, scope=scope) for seed in (4, 5)]
    written, receipts, _ = carry_out(source, noises)
    recorded = [{r.step.tensor.name: r for r in one} for one in receipts]
    again, receipts_again, read = carry_out(source, noises, recorded=recorded)
    assert again == written
    for one, other in zip(receipts, receipts_again, strict=True):
        assert [(r.amplitude, r.source_digest, r.digest, r.unchanged) for r in one] == [
            (r.amplitude, r.source_digest, r.digest, r.unchanged) for r in other
        ]
    assert read == sum(len(tensor.data) for tensor in TENSORS.values())


def test_of_a_checkpoint_without_tensors_every_output_has_no_receipts(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", {})
    assert carry_out(path, [NoiseSpec(seed=seed) for seed in range(3)]) == ([{}] * 3, ((),) * 3, 0)
