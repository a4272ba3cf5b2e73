"""Where a job can lie, each against the contract of `output/jobs`: a folder, and a bucket."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, weights
from object_store import ObjectStore

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.errors import InputUnreadable, OutputUnsafe
from noisytune_cli.manifest.job import job_pieces
from noisytune_cli.manifest.read import read_manifest
from noisytune_cli.output.job_folder import JobFolder, open_folder, open_job
from noisytune_cli.output.jobs import PLAN, JobStorage
from noisytune_cli.records import NoiseSpec


@pytest.fixture(params=["folder", "bucket"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return f"{tmp_path}/out"
    store: ObjectStore = request.getfixturevalue("store")
    return f"{store.url}/out"


def plan(out: str, tmp_path: Path, seed: int = 0) -> JobFolder:
    source = tmp_path / "in/model.safetensors"
    if not source.exists():
        save(source, {"w": weights("F32", 8)})
        (source.parent / "config.json").write_text("{}")
    wanted = combine(out, seed=str(seed), default=0.15)
    return plan_job(Request(os.fspath(source.parent), NoiseSpec(seed=seed)), out, wanted).folder


@pytest.fixture
def job(out: str, tmp_path: Path) -> JobFolder:
    return plan(out, tmp_path)


def test_what_is_put_is_there_whole(job: JobFolder) -> None:
    storage, name = job.storage, job.receipt(0, 0)
    assert (storage.size(name), storage.names(f"{job.own}/receipts")) == (None, frozenset())
    for _ in range(2):
        storage.put([b"one, ", b"two"], name)
        assert (storage.size(name), storage.names(f"{job.own}/receipts")) == (8, {"1-1.json"})
        with storage.reading(name) as path:
            assert path.read_bytes() == b"one, two"
    with storage.reading_output(job.output(0)) as found:
        assert found is None


def test_what_is_missing_is_named_by_where_it_would_lie(job: JobFolder) -> None:
    with (
        pytest.raises(InputUnreadable, match=r"receipts/1-1\.json") as failed,
        job.storage.reading(job.receipt(0, 0)) as path,
    ):
        read_manifest(path)
    assert (failed.value.path or "").startswith(os.fspath(job.path))


def test_weights_are_kept(job: JobFolder) -> None:
    with job.storage.growing(job.own, 0) as scratch:
        made = scratch / "0"
        made.write_bytes(b"weights")
        assert job.kept(0, "model.safetensors") is None
        job.keep(made, 0, "model.safetensors")
        assert job.kept(0, "model.safetensors") == 7
        assert not made.exists()
    assert not scratch.exists()


def test_the_same_plan_is_the_same_job(job: JobFolder, out: str, tmp_path: Path) -> None:
    assert plan(out, tmp_path) == job == open_job(out) == open_folder(job.path)
    content = b"".join(job_pieces(job.job))
    with job.storage.reading(PLAN) as path:
        assert path.read_bytes() == content
    with pytest.raises(OutputUnsafe, match="another job is there"):
        plan(out, tmp_path, seed=1)


def test_a_job_that_is_gone_takes_nothing(job: JobFolder, out: str) -> None:
    with job.storage.growing(job.own, 0) as scratch:
        (scratch / "0").write_bytes(b"weights")
        assert job.remove()
        with pytest.raises(InputUnreadable, match="there is no job"):
            job.storage.put([b"late"], job.receipt(0, 0))
        with pytest.raises(InputUnreadable, match="there is no job"):
            job.keep(scratch / "0", 0, "model.safetensors")
    assert job.storage.names(f"{job.own}/receipts") == frozenset()
    assert job.kept(0, "model.safetensors") is None
    assert not job.is_there
    with pytest.raises(InputUnreadable, match="there is no job"):
        open_job(out)


def test_a_job_that_is_just_being_planned_stays(
    job: JobFolder, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = type(job.storage).create

    def after_removal(storage: JobStorage, *draft: Any) -> Any:
        job.storage.clear(job.output(0), job.claim)
        assert job.remove()
        return create(storage, *draft)

    monkeypatch.setattr(type(job.storage), "create", after_removal)
    other = plan(out, tmp_path, seed=1)
    assert open_job(out) == other
    assert other.storage.names(f"{other.own}/steps") == {"1.json"}
    assert other.remove()
    assert not other.is_there


def test_another_job_in_its_place_stays_as_it_is(job: JobFolder, out: str, tmp_path: Path) -> None:
    with job.storage.growing(job.own, 0) as scratch:
        (scratch / "0").write_bytes(b"weights")
        job.storage.clear(job.output(0), job.claim)
        assert job.remove()
        other = plan(out, tmp_path, seed=1)
        assert (job.is_there, other.is_there) == (False, True)
        with pytest.raises(InputUnreadable, match="there is no job"):
            job.storage.put([b"late"], job.receipt(0, 0))
        with pytest.raises(InputUnreadable, match="there is no job"):
            job.keep(scratch / "0", 0, "model.safetensors")
    assert job.remove()  # by a finish that was slow
    assert job.storage.names(f"{job.own}/receipts") == frozenset()
    assert open_job(out) == other
    assert other.is_there
    assert other.storage.names(f"{other.own}/steps") == {"1.json"}
    assert other.kept(0, "model.safetensors") is None
