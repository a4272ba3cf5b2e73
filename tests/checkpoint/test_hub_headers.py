"""Plans of a checkpoint on a hub are made from headers, which are asked for by range."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, Repository, fetch, safetensors
from huggingface_hub import get_session

from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.commands.compare import Comparison, compare
from noisytune_cli.commands.inspect import Inspection, inspect
from noisytune_cli.commands.perturb import Planned, Request, perturb, plan_perturb
from noisytune_cli.errors import HubError, InputInvalid, OutputUnsafe
from noisytune_cli.records import Conversion, NoiseSpec

COUNT = 200_000

FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"u": "x-00001-of-00002.safetensors", "w": "x-00002-of-00002.safetensors"}}
    ).encode(),
    "x-00001-of-00002.safetensors": safetensors(u=[float(n) for n in range(COUNT)]),
    "x-00002-of-00002.safetensors": safetensors(w=[float(-n) for n in range(COUNT)]),
    "consolidated.safetensors": safetensors(u=[0.0] * COUNT, w=[0.0] * COUNT),
    "head/model.safetensors": safetensors(c=[0.0] * COUNT),
}
WEIGHTS = [name for name in FILES if name.endswith(".safetensors")]


@pytest.fixture
def large(hub: Hub, temporary: Path) -> Hub:
    """The hub, with a model of some megabytes."""
    hub.repositories["large"] = Repository(dict(FILES))
    return hub


def plan(**options: object) -> Planned:
    return plan_perturb(replace(Request("large", NoiseSpec()), **options))  # type: ignore[arg-type]


def look() -> Inspection:
    return inspect("large", headers_only=True)


def hold() -> Comparison:
    return compare("large", "large", headers_only=True)


def cached(hub: Hub, tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.suffix == ".safetensors"}


@pytest.mark.parametrize("ask", [plan, look, hold])
def test_the_plan_is_that_of_the_weights_and_they_stay_there(ask: object, large: Hub, tmp_path: Path) -> None:
    assert callable(ask)
    found = ask()
    assert large.sent_bytes < 2 * (64 << 10) * len(WEIGHTS) + 10_000
    assert {r.range for r in large.requests if r.method == "GET" and r.path.endswith(".safetensors")} == {
        "bytes=0-65535"
    }
    assert cached(large, tmp_path) == set()
    fetch("large")
    before = large.sent_bytes
    again = ask()
    assert large.sent_bytes - before < 10_000  # all is in the cache, and taken from there
    assert replace(again, **({"free": found.free} if isinstance(found, Planned) else {})) == found


def test_of_a_conversion_and_of_single_weights_too(large: Hub) -> None:
    found = [plan(conversion=Conversion(dtype="BF16")), plan(weights="consolidated.safetensors")]
    assert large.sent_bytes < 1_000_000
    fetch("large")
    (large_cached,) = [plan(conversion=Conversion(dtype="BF16"))]
    assert (large_cached.plans, large_cached.nbytes) == (found[0].plans, found[0].nbytes)
    assert [step.tensor.name for step in found[1].plan.steps] == ["u", "w"]


def test_a_long_header_takes_a_second_part(large: Hub, tmp_path: Path) -> None:
    names = {f"layer.{n}.weight": [1.0, 2.0] for n in range(3000)}
    large.repositories["long"] = Repository({"model.safetensors": safetensors(**names)})
    found = plan_perturb(Request("long", NoiseSpec()))
    assert [step.tensor.name for step in found.plan.steps] == list(names)
    ranges = [r.range for r in large.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert ranges[0] == "bytes=0-65535"
    assert len(ranges) == 2
    assert cached(large, tmp_path) == set()


def test_no_value_is_read_of_a_header(large: Hub) -> None:
    with open_checkpoint("large", headers_only=True) as checkpoint:
        source = checkpoint.sources[0]
        assert source.size == len(FILES[source.name])
        with pytest.raises(AssertionError, match="a header alone"):
            source.read(source.tensors[0], 0, memoryview(bytearray(4)))


def test_what_is_written_has_the_weights_of_the_hub(large: Hub, tmp_path: Path) -> None:
    plan()
    made = perturb(Request("large", NoiseSpec()), str(tmp_path / "out")).manifest
    assert [receipt.action for receipt in made.receipts] == ["perturb", "perturb"]


@pytest.mark.parametrize("fault", ["200 to a range", "short", "short part", "another size", "500", "reset"])
def test_a_hub_that_sends_another_part_is_refused(fault: str, large: Hub, tmp_path: Path) -> None:
    large.faults[WEIGHTS[0]] = fault
    with pytest.raises(HubError) as caught:
        plan()
    assert caught.value.exit_code == 7
    assert "\n" not in caught.value.line()
    assert cached(large, tmp_path) == set()


def test_a_whole_body_is_not_read(large: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    response: Any
    response = type(get_session().build_request("GET", large.endpoint)).__module__.partition(".")[0]
    response = sys.modules[response].Response
    original = response.iter_bytes

    def counting(self: Any, *args: Any, **options: Any) -> Iterator[bytes]:
        for data in original(self, *args, **options):
            read.append(len(data))
            yield data

    monkeypatch.setattr(response, "iter_bytes", counting)
    large.faults[WEIGHTS[0]] = "200 to a range"
    with pytest.raises(HubError, match="another part"):
        plan()
    assert sum(read) < COUNT


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (struct.pack("<Q", 1 << 40), "its header has 1,099,511,627,776 bytes"),
        (struct.pack("<Q", 6) + b"[1, 2]", "does not begin with a brace"),
        (struct.pack("<Q", 1 << 20) + b"{", "but the whole file has"),
        (b"", "it is empty"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_place_in_the_cache(
    start: bytes, words: str, large: Hub, tmp_path: Path
) -> None:
    large.repositories["odd"] = Repository({"model.safetensors": start and start + b" " * 100_000})
    with pytest.raises(InputInvalid, match=words) as caught:
        plan_perturb(Request("odd", NoiseSpec()))
    assert caught.value.path is not None
    assert caught.value.path.startswith(os.fspath(tmp_path / "cache"))
    assert large.sent_bytes < 200_000


def test_of_a_private_one_with_the_token(large: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    large.repositories["large"].token = "secret"
    with pytest.raises(HubError):
        plan()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert len(plan().plan.steps) == 2


def test_pickles_are_fetched_whole(large: Hub) -> None:
    large.repositories["pickled"] = Repository({"pytorch_model.bin": b"no pickle"})
    with pytest.raises(InputInvalid):
        plan_perturb(Request("pickled", NoiseSpec()))
    assert large.fetched() == ["pytorch_model.bin"]


def test_nothing_is_fetched_for_an_output_that_stays(large: Hub, tmp_path: Path) -> None:
    request, out = Request("large", NoiseSpec()), str(tmp_path / "out")
    perturb(request, out, skip_existing=True)
    shutil.rmtree(tmp_path / "cache")
    before = large.sent_bytes
    assert perturb(request, out, skip_existing=True).skipped
    assert large.sent_bytes - before < 2 * (64 << 10) * len(WEIGHTS) + 10_000
    assert cached(large, tmp_path) == set()
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(OutputUnsafe, match="exists"):
        perturb(request, out, skip_existing=True)
