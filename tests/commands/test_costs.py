"""What a file of many small tensors costs grows with their number, and not with its square, in any verb.

Counted are calls, of Python's functions and of C's, which no other process disturbs.
"""

from __future__ import annotations

import cProfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save, weights
from runs import run

from noisytune_cli.commands.average import average
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.verify import verify
from noisytune_cli.records import Conversion

FEW, MANY = 200, 400

TO = Conversion(format="safetensors")


def names(count: int) -> list[str]:
    return [f"layer.{i}.weight" for i in range(count)]


def ties(path: Path, count: int) -> None:
    torch.save(dict.fromkeys(names(count), torch.randn(8)), path)


def views(path: Path, count: int) -> None:
    torch.save(dict(zip(names(count), torch.randn(count, 2), strict=True)), path)


def storages(path: Path, count: int) -> None:
    torch.save({name: torch.randn(2) for name in names(count)}, path)


def aliases(path: Path, count: int) -> None:
    save(path, {"kept.weight": weights("F32", 8)}, dict.fromkeys(names(count), "kept.weight"))


def calls(work: Callable[[], object]) -> int:
    """Count the calls that `work` makes, in all its threads."""
    profiles: list[cProfile.Profile] = []

    def begin(*event: object) -> None:
        profiles.append(cProfile.Profile())
        profiles[-1].enable()

    threading.setprofile(begin)
    begin()
    try:
        work()
    finally:
        profiles[0].disable()
        threading.setprofile(None)  # type: ignore[arg-type]
    return sum(entry.callcount for profile in profiles for entry in profile.getstats())


@pytest.mark.parametrize("lay", [ties, views, storages, aliases])
def test_calls_grow_with_the_number_of_tensors(lay: Callable[[Path, int], None], tmp_path: Path) -> None:
    cost: dict[str, list[int]] = {}
    for count in (8, FEW, MANY):  # the first of them imports
        home = tmp_path / str(count)
        home.mkdir()
        suffix = "safetensors" if lay is aliases else "bin"
        source = home / f"in.{suffix}"
        lay(source, count)
        to = home / "to.safetensors"
        verbs: dict[str, Callable[[], object]] = {
            "inspect": lambda source=source: inspect(str(source)),
            "perturb": lambda source=source, out=home / f"out.{suffix}": run(source, out, threads=1),
            "--to": lambda source=source, to=to: run(source, to, threads=1, conversion=TO),
            "average": lambda source=source, mean=home / f"mean.{suffix}": average(
                [str(source)] * 2, str(mean), threads=1
            ),
            "verify": lambda out=home / f"out.{suffix}": verify(str(out), threads=1),
            "verify --to": lambda to=to, source=source: verify(str(to), base=str(source), threads=1),
        }
        for verb, work in verbs.items():
            cost.setdefault(verb, []).append(calls(work))
    grown = {verb: many / few for verb, (_, few, many) in cost.items()}
    assert {verb: factor for verb, factor in grown.items() if factor > 2.2} == {}
