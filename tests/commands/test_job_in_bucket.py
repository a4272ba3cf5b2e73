"""Jobs in an object store: whatever gets lost on the way, what comes out is what a single run makes."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, save_sharded, weights
from object_store import SECRET, Asked, Fault, ObjectStore, error

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands import distribute
from noisytune_cli.commands.distribute import perturb_shares
from noisytune_cli.commands.finish import finish
from noisytune_cli.commands.perturb import perturb_each
from noisytune_cli.commands.plan import PlannedJob, plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.status import status
from noisytune_cli.commands.work import work
from noisytune_cli.errors import (
    InputInvalid,
    InputUnreadable,
    Mismatch,
    NoisytuneError,
    OutputUnsafe,
    ResourceExhausted,
    UsageError,
)
from noisytune_cli.output.job_folder import job_path
from noisytune_cli.output.jobs.bucket import BucketStorage
from noisytune_cli.records import Conversion, NoiseSpec
from tests.checkpoint.test_dequantize import base

pytestmark = pytest.mark.usefixtures("temporary")

#: A shard each; the head is tied to the embeddings of another shard, by equal bytes.
SHARDS = (
    {"model.embed_tokens.weight": weights("F32", 30, 8, seed=1), "model.h.norm.weight": weights("F32", 8)},
    {"model.h.mlp.down_proj.weight": weights("BF16", 8, 24, seed=3)},
    {"lm_head.weight": weights("F32", 30, 8, seed=1)},
)

#: The objects of one output, in a folder.
NAMES = {
    *(f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)),
    *("config.json", "model.safetensors.index.json", "noisytune.json", "tokenizer.json"),
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    root = tmp_path / "base"
    save_sharded(root, *SHARDS)
    (root / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture
def there(store: ObjectStore, here: Path) -> str:
    """The same model in the store."""
    store.put_folder(here, "base")
    return f"{store.url}/base"


Given = dict[str, str]


def plan(source: str | Path, out: str, given: Given | None = None, **noise: Any) -> PlannedJob:
    recipe_only = noise.pop("recipe_only", False)
    wanted = combine(out, default=0.15, **{"seed": "0", **(given or {})})  # type: ignore[arg-type]
    asked = Request(os.fspath(source), NoiseSpec(**noise))
    return plan_job(asked, out, wanted, share_bytes=1, recipe_only=recipe_only)


def single(source: str | Path, out: str, given: Given | None = None, **noise: Any) -> dict[str, bytes]:
    """Return every file of a single run's outputs, by its path below the folder that they lie in."""
    recipe_only = noise.pop("recipe_only", False)
    wanted = combine(out, default=0.15, **{"seed": "0", **(given or {})})  # type: ignore[arg-type]
    perturb_each(Request(os.fspath(source), NoiseSpec(**noise)), wanted, recipe_only=recipe_only)
    return contents(Path(out.split("{", maxsplit=1)[0]).parent)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sent(store: ObjectStore, key: str = "jobs") -> dict[str, bytes]:
    """All that lies below a key."""
    return {name: store.get(f"{key}/{name}") for name in store.keys(f"{key}/")}


REQUESTS: dict[str, tuple[dict[str, Any], Given]] = {
    "plain": ({}, {}),
    "lists": ({}, {"lam": "0.1,0.3", "seed": "0-1"}),
    "global": ({"scope": "global"}, {"lam": "0.1,0.2"}),
}


@pytest.mark.parametrize(("name", "from_bucket"), [("plain", True), ("lists", True), ("global", False)])
def test_a_job_is_the_single_run(
    name: str, from_bucket: bool, store: ObjectStore, here: Path, there: str, tmp_path: Path
) -> None:
    noise, given = REQUESTS[name]
    source = there if from_bucket else here
    tail = "-{lambda}-{seed}" if "seed" in given else "-{lambda}" if given else ""
    expected = single(source, f"{tmp_path}/single/run{tail}", given, **noise)
    out = f"{store.url}/jobs/run{tail}"
    planned = plan(source, out, given, **noise)
    assert plan(source, out, given, **noise).joined
    assert len(planned.folder.job.shares) == len(SHARDS)
    for _ in range(2 if "scope" in noise else 1):
        for share in (3, 2, 1):
            assert len(status(out).left) == share or "scope" in noise
            work(out, (share, 3))
    made = finish(out)
    assert sent(store) == expected
    assert [str(one.output) for one in made] == [one.path for one in planned.folder.job.outputs]
    assert all(one.skipped for one in finish(out)) if not tail else True
    assert store.uploads() == []


def test_an_engine_from_a_bucket_to_a_folder(store: ObjectStore, there: str, tmp_path: Path) -> None:
    expected = single(there, f"{tmp_path}/single/run")
    for out in (f"{tmp_path}/jobs/run", f"{store.url}/jobs/run"):
        wanted = combine(out, seed="0", default=0.15)
        perturb_shares(Request(there, NoiseSpec()), out, wanted, engine="local", share_bytes=1)
    assert contents(tmp_path / "jobs") == sent(store) == expected


def test_files_and_recipes(store: ObjectStore, tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", SHARDS[1])
    store.put("one.safetensors", (tmp_path / "one.safetensors").read_bytes())
    source = f"{store.url}/one.safetensors"
    for number, (tail, recipe_only) in enumerate([("x.safetensors", False), ("", False), ("r.json", True)]):
        single(source, f"{tmp_path}/{number}/{tail}", recipe_only=recipe_only)
        out = f"{store.url}/{number}/{tail}"
        plan(source, out, recipe_only=recipe_only)
        work(out)
        finish(out)
        assert sent(store, str(number)) == contents(tmp_path / str(number))


def test_what_is_planned_reads_a_few_values(store: ObjectStore, there: str, tmp_path: Path) -> None:
    save(tmp_path / "big.safetensors", {"w.weight": weights("F32", 700, 500)})
    store.put("big.safetensors", (tmp_path / "big.safetensors").read_bytes())
    store.asked.clear()
    plan(f"{store.url}/big.safetensors", f"{tmp_path}/out.safetensors")
    ranges = [one.headers["range"].removeprefix("bytes=") for one in store.of("GET", "big")]
    assert sum(int(end) + 1 - int(start) for start, end in (one.split("-") for one in ranges)) < 200_000


def test_scales_that_lie_in_another_file(store: ObjectStore, tmp_path: Path) -> None:
    fp8 = base(tmp_path)
    store.put_folder(fp8, "fp8")
    asked = Request(f"{store.url}/fp8", NoiseSpec(), Conversion(dequantized="BF16"))
    perturb_each(asked, combine(f"{tmp_path}/single", seed="0", default=0.15))
    out = f"{store.url}/jobs"
    plan_job(asked, out, combine(out, seed="0", default=0.15), share_bytes=1)
    work(out)
    finish(out)
    assert sent(store) == contents(tmp_path / "single")


@dataclass
class Lasting(Fault):
    """It happens to the first request that fits, and to all that follow."""

    has_begun: bool = False

    def takes(self, asked: Asked) -> bool:
        self.has_begun |= super().takes(asked)
        return self.has_begun


@dataclass
class Killed(Fault):
    """Who asks is let through until something changed in the store, and is not heard from then on."""

    store: ObjectStore | None = None
    is_dead: bool = False

    def takes(self, asked: Asked) -> bool:
        assert self.store is not None
        was_dead = self.is_dead
        if asked.method in ("PUT", "POST", "DELETE"):
            # What is created that is there is no change.
            self.is_dead |= asked.path.removeprefix(f"/{self.store.bucket}/") not in self.store.keys("")
        return was_dead


def kill_at_each_change(store: ObjectStore, step: Callable[[], object]) -> int:
    """Do a step again and again, each time until it has changed one thing; return how often."""
    for times in range(100):
        store.faults = [Killed("", "", status=403, body=error("AccessDenied"), store=store)]
        with contextlib.suppress(NoisytuneError):
            step()
        if not store.faults[0].is_dead:  # type: ignore[attr-defined]
            store.faults = []
            return times
    raise AssertionError


def test_whoever_is_killed_goes_on(store: ObjectStore, here: Path, tmp_path: Path) -> None:
    expected = single(here, f"{tmp_path}/single/run-{{seed}}", scope="global")
    out = f"{store.url}/jobs/run-{{seed}}"
    # The claim, files of steps, of which several are on their way at once, the plan.
    assert kill_at_each_change(store, lambda: plan(here, out, scope="global")) >= 3
    # Sums, weights and a receipt of each share.
    assert kill_at_each_change(store, lambda: work(out)) == 3 * 3
    # Four files; the claim, the plan, all that is the plan's and its copy are removed.
    assert kill_at_each_change(store, lambda: finish(out)) >= 8
    assert sent(store) == expected
    with pytest.raises(InputUnreadable, match="there is no job"):
        finish(out)


FAULTS: dict[str, list[Fault]] = {
    "503": [
        Fault(method, path, status=503, body=error("SlowDown"))
        for method, path in [
            ("PUT", "plan.json"),
            ("PUT", "-00001-"),
            ("GET", "receipts"),
            ("POST", "delete"),
        ]
    ],
    "reset on PUT and GET": [
        *(Fault("PUT", path, reset=True) for path in ("plan.json", "-00002-", "receipts", "noisytune.json$")),
        *(Fault("GET", path, reset=True) for path in ("plan.json", "/base/.*-00001-", "receipts/1-1")),
    ],
    "truncated ranges": [Fault("GET", path, short=9) for path in ("/base/.*-00001-", "/base/.*-00002-")],
    "lost answers": [
        Fault("PUT", path, lost=True)
        for path in (
            "publishing",
            "steps/2",
            "plan.json",
            "-00002-",
            "receipts/2",
            "config",
            "noisytune.json$",
        )
    ],
    "409": [
        Fault("PUT", path, status=409, body=error("ConditionalRequestConflict"))
        for path in ("plan.json", "receipts/1", "noisytune.json$")
    ],
    "lost answer to Complete": [Fault("POST", "uploadId", lost=True)],
    "NoSuchUpload": [
        Fault("POST", "uploadId", lost=True),
        Fault("POST", "uploadId", status=404, body=error("NoSuchUpload")),
    ],
    "200 with an error": [Fault("POST", "uploadId", status=200, body=error("InternalError"))],
    "a part that was damaged": [Fault("PUT", "partNumber=1", damages=True)],
}


@pytest.fixture(scope="module")
def expected_of_large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A model whose second shard takes two parts, and what a single run makes of it."""
    root = tmp_path_factory.mktemp("large")
    save_sharded(root / "base", {"a.weight": weights("F32", 8, 8)}, {"b.weight": weights("F32", 1100, 1200)})
    (root / "base/config.json").write_text("{}")
    return root / "base", single(root / "base", f"{root}/single/run")


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_leaves_no_trace(
    name: str,
    store: ObjectStore,
    expected_of_large: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for room in ("checkpoint.store", "output.sending"):
        monkeypatch.setattr(f"noisytune_cli.{room}.PIECE", 5 << 20)
    source, expected = expected_of_large
    store.put_folder(source, "base")
    store.faults = [replace(fault) for fault in FAULTS[name]]
    out = f"{store.url}/jobs/run"
    plan(f"{store.url}/base", out)
    work(out)
    finish(out)
    assert [fault for fault in store.faults if fault.times] == []
    found = sent(store)
    manifest = json.loads(found["run/noisytune.json"])
    assert manifest["source"]["id"] == f"{store.url}/base"
    manifest["source"]["id"] = "base"
    assert json.loads(expected["run/noisytune.json"]) == manifest
    assert {**found, "run/noisytune.json": b""} == {**expected, "run/noisytune.json": b""}
    assert store.uploads() == []


REFUSED: dict[str, tuple[Fault, int]] = {
    "expired credentials": (Fault("PUT", "receipts", status=400, body=error("ExpiredToken")), 6),
    "expired credentials of the source": (Fault("GET", "/base/", status=400, body=error("ExpiredToken")), 4),
    "a store that is full": (Fault("PUT", "-00002-", status=507, body=error("XMinioStorageFull")), 6),
    "a source that is gone": (Fault("GET", "/base/.*-00002-", status=404, body=error("NoSuchKey")), 4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_pass_is_one_line(name: str, store: ObjectStore, there: str, tmp_path: Path) -> None:
    fault, code = REFUSED[name]
    out = f"{store.url}/jobs/run"
    plan(there, out)
    store.faults = [replace(fault, times=99)]
    with pytest.raises(NoisytuneError) as failed:
        work(out)
    assert failed.value.exit_code == code
    assert SECRET not in failed.value.line()
    assert "noisytune-" not in failed.value.line()  # no folder of this run's
    store.faults = []
    work(out)
    finish(out)
    assert sent(store) == single(there, f"{tmp_path}/single/run")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json"])
def test_a_source_that_changed(name: str, store: ObjectStore, there: str) -> None:
    out = f"{store.url}/jobs/run"
    plan(there, out)
    content = store.get(f"base/{name}")
    store.put(f"base/{name}", content[:-1] + b" ")
    with pytest.raises(Mismatch, match=rf"changed since the job was planned: s3://.*/base/{name}"):
        work_and_finish(out)
    assert "run/noisytune.json" not in sent(store)


def work_and_finish(out: str) -> None:
    work(out)
    finish(out)


def forge(store: ObjectStore, name: str, change: Callable[[bytes], bytes]) -> None:
    (key,) = (key for key in store.keys("") if key.endswith(name))
    store.put(key, change(store.get(key)))


RECEIPTS: dict[str, Callable[[ObjectStore], None]] = {
    "forged": lambda store: forge(store, "receipts/1-1.json", lambda text: text.replace(b'"0"', b'"1"', 1)),
    "truncated": lambda store: forge(store, "receipts/1-1.json", lambda text: text[: len(text) // 2]),
    "another share's": lambda store: forge(
        store,
        "receipts/1-1.json",
        lambda text: store.get(next(key for key in store.keys("") if key.endswith("receipts/2-1.json"))),
    ),
    "of weights that are shorter": lambda store: forge(
        store, "jobs/run/model-00002-of-00003.safetensors", lambda content: content[:-1]
    ),
}


@pytest.mark.parametrize("name", RECEIPTS)
def test_a_receipt_that_is_none(name: str, store: ObjectStore, here: Path) -> None:
    out = f"{store.url}/jobs/run"
    plan(here, out)
    work(out)
    RECEIPTS[name](store)
    with pytest.raises(InputInvalid, match=r"cannot use the (receipt|manifest): s3://") as failed:
        finish(out)
    assert "receipts/" in failed.value.line()
    assert "run/noisytune.json" not in sent(store)


def test_a_stale_receipt_counts_for_nothing(store: ObjectStore, here: Path, tmp_path: Path) -> None:
    out = f"{store.url}/jobs/run"
    old = plan(here, out, seed=5, given={"seed": "5"}).folder
    work(out)
    stale = {key: store.get(key) for key in store.keys("") if old.own in key}
    assert old.remove()
    for key in store.keys("jobs/"):
        store.delete(f"jobs/{key}")
    for key, content in stale.items():
        store.put(key, content)
    with pytest.raises(OutputUnsafe, match="is there"):  # what nobody claims is somebody's
        plan(here, out)


def test_two_workers_on_all_shares(store: ObjectStore, here: Path, tmp_path: Path) -> None:
    out = f"{store.url}/jobs/run"
    plan(here, out)
    # The other one comes between every step of this.
    store.faults = [Fault("PUT", "-of-00003", before=lambda: work(out)), Fault("PUT", "receipts", lost=True)]
    assert work(out).done <= 3
    finish(out)
    assert sent(store) == single(here, f"{tmp_path}/single/run")


def test_a_worker_that_others_overtake_leaves_nothing(store: ObjectStore, here: Path, tmp_path: Path) -> None:
    out = f"{store.url}/jobs/run"

    def overtake() -> None:
        work(out)
        finish(out)

    for path in ("-00001-of-00003", "receipts/1-1"):
        plan(here, out)
        store.faults = [Fault("PUT", path, before=overtake)]
        with pytest.raises(InputUnreadable, match="there is no job"):
            work(out)
        assert store.keys("jobs/run/") == NAMES
        for name in NAMES:
            store.delete(f"jobs/run/{name}")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model whose second shard is sent in three parts of 5 MiB."""
    root = tmp_path / "large"
    save_sharded(root, {"a.weight": weights("F32", 8, 8)}, {"b.weight": weights("F32", 1100, 2400)})
    (root / "config.json").write_text("{}")
    return root


@pytest.mark.parametrize("asks", ["uploads", "uploadId="])
def test_a_worker_of_a_job_that_was_given_up(
    asks: str, store: ObjectStore, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("checkpoint.store", "output.sending"):
        monkeypatch.setattr(f"noisytune_cli.{room}.PIECE", 5 << 20)
    out = f"{store.url}/jobs/run"
    plan(large, out)

    def do_another() -> None:
        for key in store.keys("jobs/"):
            store.delete(f"jobs/{key}")
        plan(large, out, {"seed": "1"}, seed=1)
        work_and_finish(out)

    store.faults = [Fault("POST", rf"-00002-.*\?{asks}", before=do_another)]
    with pytest.raises(NoisytuneError) as failed:
        work(out, (2, 2))
    assert store.faults[0].times == 0
    assert store.uploads() == []
    expected = single(large, f"{tmp_path}/single/run", {"seed": "1"}, seed=1)
    if asks == "uploads":
        assert isinstance(failed.value, InputUnreadable)
        assert sent(store) == expected
    else:  # all is there but for the answer: that it is too late is all that can be said
        assert isinstance(failed.value, OutputUnsafe)
        assert "came too late: s3://" in failed.value.line()
        assert "model-00002-of-00002.safetensors" in failed.value.line()


def test_a_job_spares_what_is_anothers_beside_it(store: ObjectStore, tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", SHARDS[1])
    out = f"{store.url}/jobs/"
    plan(tmp_path / "one.safetensors", out)
    work(out)
    # A run to the same folder, and a job of what lies in it.
    others = {".noisytune/two.safetensors.publishing", ".noisytune/job-1/plan.json"}
    for name in others:
        store.put(f"jobs/{name}", b"another's")
    finish(out)
    assert store.keys("jobs/") == {"one.safetensors", "one.safetensors.noisytune.json", *others}


def test_who_plans_the_same_at_once_joins(store: ObjectStore, here: Path, tmp_path: Path) -> None:
    out = f"{store.url}/jobs/run"

    def be_quicker() -> None:
        plan(here, out)
        work(out, (1, 3))

    # The claim is there, and what lies beside it is listed next.
    overtaken = Fault("GET", "list-type=2", before=be_quicker, times=0)
    store.faults = [Fault("PUT", "publishing", before=lambda: setattr(overtaken, "times", 1)), overtaken]
    assert plan(here, out).joined
    assert overtaken.times == 0
    with pytest.raises(OutputUnsafe, match="the output is claimed"):
        perturb_each(Request(str(here), NoiseSpec(seed=1)), combine(out, seed="1", default=0.15))
    work_and_finish(out)
    assert sent(store) == single(here, f"{tmp_path}/single/run")


def claimed(store: ObjectStore) -> set[str]:
    """Return the seeds of the runs whose places are claimed."""
    return set(re.findall(r"run-(\d)/\.noisytune/publishing", " ".join(store.keys("jobs/"))))


def test_who_is_refused_claims_nothing(store: ObjectStore, here: Path) -> None:
    store.put("jobs/run-1/.noisytune/publishing", b"another's")
    with pytest.raises(OutputUnsafe, match=r"the output is claimed: .*/run-1"):
        plan(here, f"{store.url}/jobs/run-{{seed}}", {"seed": "0-1"})
    assert claimed(store) == {"1"}


def test_who_comes_when_all_is_done_claims_nothing(
    store: ObjectStore, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{store.url}/jobs/run"
    create = BucketStorage.create

    def slowly(storage: BucketStorage, *draft: Any) -> Any:
        monkeypatch.setattr(BucketStorage, "create", create)
        plan(here, out)
        work_and_finish(out)
        return create(storage, *draft)

    monkeypatch.setattr(BucketStorage, "create", slowly)
    with pytest.raises(OutputUnsafe, match="the output exists"):
        plan(here, out)
    assert sent(store) == single(here, f"{tmp_path}/single/run")


def test_who_is_overtaken_by_the_same_command_has_its_output(
    store: ObjectStore, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begin = f"{store.url}/jobs/run", distribute.begin_share

    def in_shares() -> str:
        wanted = combine(out, seed="0", default=0.15)
        (made,) = perturb_shares(Request(str(here), NoiseSpec()), out, wanted, engine="local", share_bytes=1)
        return str(made.output)

    def slowly(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(distribute, "begin_share", begin)
        in_shares()
        return begin(*arguments, **options)

    monkeypatch.setattr(distribute, "begin_share", slowly)
    assert in_shares() == out
    assert sent(store) == single(here, f"{tmp_path}/single/run")


def test_who_joined_a_plan_keeps_the_claims_of_who_failed(
    store: ObjectStore, here: Path, tmp_path: Path
) -> None:
    out, seeds = f"{store.url}/jobs/run-{{seed}}", {"seed": "0-1"}
    expected = single(here, f"{tmp_path}/single/run-{{seed}}", seeds)

    def join() -> None:
        with pytest.raises(NoisytuneError):
            plan(here, out, seeds)

    # Of the second one all comes there but the steps that are asked for.
    refused = {"status": 403, "body": error("AccessDenied")}
    store.faults = [
        Fault("PUT", "run-1/.*publishing", before=join, **refused),  # type: ignore[arg-type]
        Fault("PUT", "steps/1.json", **refused),  # type: ignore[arg-type]
    ]
    with pytest.raises(ResourceExhausted, match="the same command goes on"):
        plan(here, out, seeds)
    assert claimed(store) == {"0", "1"}
    assert any("/steps/" in key for key in store.keys("jobs/"))
    plan(here, out, seeds)
    work(out)
    finish(out)
    assert sent(store) == expected


def test_finish_needs_no_claim(store: ObjectStore, here: Path, tmp_path: Path) -> None:
    out = f"{store.url}/jobs/run"
    plan(here, out)
    work(out)
    store.delete("jobs/run/.noisytune/publishing")  # another finish has come so far
    finish(out)
    assert sent(store) == single(here, f"{tmp_path}/single/run")


@pytest.mark.parametrize(("path", "step"), [("receipts/", work), ("/config.json", finish)])
def test_what_failed_is_told_where_no_more_can_be_asked(
    path: str, step: Callable[[str], object], store: ObjectStore, here: Path
) -> None:
    out = f"{store.url}/jobs/run"
    plan(here, out)
    if step is finish:
        work(out)
    store.faults = [Lasting("PUT", path, status=403, body=error("ExpiredToken"))]
    with pytest.raises(ResourceExhausted, match="ExpiredToken"):
        step(out)


def test_a_file_without_its_manifest_is_no_source(store: ObjectStore, tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", SHARDS[1])
    out = f"{store.url}/jobs/x.safetensors"
    plan(tmp_path / "one.safetensors", out)
    work(out)
    assert "x.safetensors" in store.keys("jobs/")
    with pytest.raises(InputInvalid, match="is writing it"):
        perturb_each(Request(out, NoiseSpec()), combine(f"{tmp_path}/y", seed="0", default=0.15))
    finish(out)
    with pytest.raises(InputInvalid, match="noise"):
        perturb_each(Request(out, NoiseSpec()), combine(f"{tmp_path}/y", seed="0", default=0.15))


def test_one_place_has_one_job(store: ObjectStore, here: Path, tmp_path: Path) -> None:
    out = f"{store.url}/jobs/run"
    plan(here, out)
    before = sent(store)
    with pytest.raises(OutputUnsafe, match="another job is there"):
        plan(here, out, {"seed": "1"}, seed=1)
    with pytest.raises(OutputUnsafe, match="the output is claimed"):
        perturb_each(Request(str(here), NoiseSpec()), combine(out, seed="0", default=0.15))
    assert sent(store) == before
    # Two jobs whose names differ, and whose outputs do not.
    plan(here, f"{store.url}/jobs/{{seed}}-0")
    before = sent(store)
    with pytest.raises(OutputUnsafe, match="the output is claimed"):
        plan(here, f"{store.url}/jobs/0-{{seed}}", {"seed": "0"}, exclude=("*norm*",))
    assert sent(store) == before


def test_what_is_no_place_for_a_job(store: ObjectStore, here: Path, there: str) -> None:
    with pytest.raises(UsageError, match="a job has one bucket"):
        job_path("s3://bucket-{seed}/run")
    store.put("jobs/run/mine.txt", b"mine")
    with pytest.raises(OutputUnsafe, match=r"mine\.txt"):
        plan(here, f"{store.url}/jobs/run")
    with pytest.raises(OutputUnsafe, match="lies in the input"):
        plan(there, f"{there}/run")
    assert sent(store) == {"run/mine.txt": b"mine"}
    with pytest.raises(InputUnreadable, match="there is no job"):
        work(f"{store.url}/jobs/run")


def test_weights_that_change_while_they_are_published(store: ObjectStore, here: Path) -> None:
    out = f"{store.url}/jobs/run"
    plan(here, out)
    work(out)
    key = "jobs/run/model-00003-of-00003.safetensors"

    def truncate() -> None:
        store.put(key, store.get(key)[:-1])

    # The receipts were read by then.
    store.faults = [Fault("HEAD", "run/noisytune.json$", before=truncate)]
    with pytest.raises(OutputUnsafe, match="model-00003-of-00003"):
        finish(out)
    assert "run/noisytune.json" not in sent(store)


def test_what_is_done_is_told_by_one_listing(store: ObjectStore, here: Path) -> None:
    out = f"{store.url}/jobs/run-{{seed}}"
    plan(here, out, {"seed": "0-3"})
    work(out)
    store.asked.clear()
    assert work(out).done == 0
    assert len(store.asked) < 3 * 4  # fewer than there are receipts


def test_finish_names_the_missing_shares(store: ObjectStore, here: Path) -> None:
    out = f"{store.url}/jobs/run"
    plan(here, out)
    work(out, (2, 3))
    with pytest.raises(InputUnreadable, match="2 of 3 are not done: 1, 3"):
        finish(out)


def test_no_secret_is_written(store: ObjectStore, there: str) -> None:
    out = f"{store.url}/jobs/run"
    plan(there, out)
    work(out)
    written = list(sent(store).values())
    finish(out)
    assert not any(SECRET.encode() in content for content in [*written, *sent(store).values()])
