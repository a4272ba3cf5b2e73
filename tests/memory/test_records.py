"""The record of noise in memory, kept as JSON: it gives the noise again, and is no manifest of files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import noisytune_cli
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid
from noisytune_cli.manifest.read import read_manifest
from noisytune_cli.manifest.write import encode
from noisytune_cli.records import Manifest
from tests.memory.test_perturb import bits, hostile


def keep(record: Manifest, path: Path) -> Path:
    path.write_bytes(encode(record))
    return path


def state() -> dict[str, Any]:
    torch.manual_seed(2)
    shared = torch.randn(6, 4)
    return {**hostile(), "embed_tokens.weight": shared, "lm_head.weight": shared, "c_attn": torch.randn(4, 6)}


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 5},
        {"noise": "gaussian", "exclude": "v", "rules": {"w": 0.3}},
        {"scope": "global"},
        {"granularity": "matrix", "splits": {"c_attn": "1:/3"}},
        {"lam": 0.0},
    ],
)
def test_a_record_that_was_kept_gives_the_noise_again(options: dict[str, Any], tmp_path: Path) -> None:
    expected, tensors = state(), state()
    record = noisytune_cli.perturb_(expected, **options)
    path = keep(record, tmp_path / "record.json")
    assert encode(read_manifest(path).manifest) == path.read_bytes()
    again = noisytune_cli.perturb_(tensors, manifest=path)
    assert {n: bits(t) for n, t in tensors.items()} == {n: bits(t) for n, t in expected.items()}
    assert [r.amplitude for r in again.receipts] == [r.amplitude for r in record.receipts]


def test_so_does_the_record_of_a_repetition_on_less_or_more(tmp_path: Path) -> None:
    expected = state()
    first = keep(noisytune_cli.perturb_(expected), tmp_path / "first.json")
    # Its stream is that of embed_tokens, which is not here, and no record names `further`.
    some = {"lm_head.weight": state()["lm_head.weight"], "further": torch.arange(3)}
    second = keep(noisytune_cli.perturb_(some, manifest=first), tmp_path / "second.json")
    some["lm_head.weight"] = state()["lm_head.weight"]
    noisytune_cli.perturb_(some, manifest=second)
    assert bits(some["lm_head.weight"]) == bits(expected["lm_head.weight"])
    assert torch.equal(some["further"], torch.arange(3))


@pytest.mark.parametrize("shrink", [None, 0.5])
def test_what_is_not_finite_here_stays_as_it_is(shrink: float | None, tmp_path: Path) -> None:
    record = noisytune_cli.perturb_({n: torch.randn(6, 4) for n in "vwx"}, shrink=shrink)
    values = torch.randn(6, 4)
    values[0, 0] = 7e4
    here = {"v": values.half(), "w": values.clone(), "x": values.bfloat16()}
    here["x"][1, 1] = float("nan")
    before = {name: bits(tensor) for name, tensor in here.items()}
    again = noisytune_cli.perturb_(here, manifest=record)
    assert [name for name, tensor in here.items() if bits(tensor) == before[name]] == ["v", "x"]
    assert [(r.action, r.reason) for r in again.receipts] == [
        ("copy", "non-finite"),
        ("perturb", None),
        ("copy", "non-finite"),
    ]
    assert encode(read_manifest(keep(again, tmp_path / "again.json")).manifest) == encode(again)


def test_of_several_matrices_only_the_one_that_is_not_finite_does() -> None:
    options: dict[str, Any] = {"granularity": "matrix", "splits": {"c_attn": "1:/3"}}
    record = noisytune_cli.perturb_({"c_attn": torch.randn(4, 6)}, **options)
    values = torch.randn(4, 6)
    values[2, 3] = float("-inf")
    here = {"c_attn": values.clone()}
    (receipt,) = noisytune_cli.perturb_(here, manifest=record).receipts
    assert [part.reason for part in receipt.parts] == [None, "non-finite", None]
    changed = (here["c_attn"] != values).any(0)
    assert changed.tolist() == [True, True, False, False, True, True]


def test_where_nothing_is_finite_the_repetition_is_refused() -> None:
    record = noisytune_cli.perturb_({"w": torch.randn(3, 3)})
    here = {"w": torch.full((3, 3), float("inf"))}
    with pytest.raises(InputInvalid, match=r"nothing to perturb.*1 non-finite"):
        noisytune_cli.perturb_(here, manifest=record)
    assert here["w"].isinf().all()


def test_where_files_are_needed_it_is_refused_with_what_takes_it(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    path = keep(noisytune_cli.perturb_({"w": torch.randn(3, 3)}), folder / "noisytune.json")
    training = keep(read_manifest(path).manifest, tmp_path / "noisytune-training.json")
    attempts: list[Callable[[], object]] = [
        lambda: verify(str(folder)),
        lambda: verify(str(training)),
        lambda: replay(str(path), str(tmp_path / "again"), base=str(folder)),
    ]
    for attempt in attempts:
        with pytest.raises(InputInvalid, match=r"noise that was added to a model in memory.*perturb_\("):
            attempt()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["tensors"][0].update(file="x"), "source.files is empty"),
        (lambda d: d["tensors"][0].update(digest="blake3:" + "0" * 64), 'unknown key "digest"'),
        (lambda d: d["tensors"][0].update(amplitude=0.5), "amplitude is not that of lambda and std"),
        (lambda d: d["tensors"][1].update(name="v"), "two tensors of one name"),
    ],
)
def test_a_record_that_lies_is_refused(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    tensors = {"v": torch.randn(3, 3), "w": torch.randn(3, 3)}
    path = keep(noisytune_cli.perturb_(tensors), tmp_path / "record.json")
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputInvalid, match=words):
        read_manifest(path)
