"""Ties by equal bytes: settled by reading no more than it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, save

from noisytune_cli.checkpoint.formats.safetensors import SafetensorsSource, open_source
from noisytune_cli.plan.plan import make_plan
from noisytune_cli.plan.settle import settle_ties
from noisytune_cli.records import NoiseSpec, Plan, TensorSpec

MIB = 1 << 20
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Counting:
    """A source that counts the bytes read from it."""

    def __init__(self, source: SafetensorsSource) -> None:
        self._source = source
        self.read_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        self.read_bytes += len(buffer)
        return self._source.read(tensor, start, buffer)


def settle(path: Path, tensors: dict[str, np.ndarray], **noise: Any) -> tuple[Plan, int]:
    save(path, {name: Tensor("F32", array) for name, array in tensors.items()})
    source = Counting(open_source(path, "w", False))
    plan = make_plan(source.tensors, NoiseSpec(**noise))
    (settled,) = settle_ties([plan], {"w": source})
    source.close()
    return settled, source.read_bytes


def table(difference_at: int | None = None) -> np.ndarray:
    array = np.arange(3 * MIB // 4 + 7, dtype="<f4")
    if difference_at is not None:
        array[difference_at] += 1
    return array


def test_equal_bytes_share_a_stream(tmp_path: Path) -> None:
    plan, read = settle(tmp_path / "f", {HEAD: table(), EMBEDDING: table(), "x.weight": table()})
    assert [step.stream for step in plan.steps] == [EMBEDDING, EMBEDDING, "x.weight"]
    assert all("tied" not in step.unsure for step in plan.steps)
    assert read == 2 * table().nbytes


@pytest.mark.parametrize(("at", "tiles"), [(0, 1), (MIB // 4, 2)])
def test_reading_stops_at_the_tile_that_differs(tmp_path: Path, at: int, tiles: int) -> None:
    plan, read = settle(tmp_path / "f", {EMBEDDING: table(), HEAD: table(difference_at=at)})
    assert [step.stream for step in plan.steps] == [EMBEDDING, HEAD]
    assert plan.ties == ()
    assert read == 2 * tiles * MIB


def test_a_difference_in_the_last_element_counts(tmp_path: Path) -> None:
    plan, _ = settle(tmp_path / "f", {EMBEDDING: table(), HEAD: table(difference_at=-1)})
    assert [step.stream for step in plan.steps] == [EMBEDDING, HEAD]


def test_two_of_three_can_be_tied(tmp_path: Path) -> None:
    shared, encoder, decoder = "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
    plan, _ = settle(tmp_path / "f", {shared: table(), encoder: table(-2), decoder: table()})
    assert [step.stream for step in plan.steps] == [shared, encoder, shared]


def test_excluding_one_name_of_a_tie_excludes_the_other(tmp_path: Path) -> None:
    plan, _ = settle(
        tmp_path / "f", {EMBEDDING: table(), HEAD: table(), "x.weight": table()}, exclude=(EMBEDDING,)
    )
    assert [step.reason for step in plan.steps] == ["excluded", "excluded", None]


def test_without_candidates_nothing_is_read(tmp_path: Path) -> None:
    plan, read = settle(tmp_path / "f", {"a.weight": table(), "b.weight": table()})
    assert [step.stream for step in plan.steps] == ["a.weight", "b.weight"]
    assert read == 0
