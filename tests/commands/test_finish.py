"""A finish that is stopped, overtaken or given again publishes what the job makes, once."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save
from jobs import SHARDS, change_a_byte, contents, in_shares, job_path, plan, request, sharded_source, single

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands import distribute
from noisytune_cli.commands import finish as finish_module
from noisytune_cli.commands.finish import finish
from noisytune_cli.commands.perturb import Perturbed, perturb_each
from noisytune_cli.commands.plan import PlannedJob, plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.work import work
from noisytune_cli.errors import InputUnreadable, OutputUnsafe, Stopped
from noisytune_cli.output.job_folder import JobFolder
from noisytune_cli.output.jobs import folder as folder_module
from noisytune_cli.output.jobs.folder import FolderStorage
from noisytune_cli.records import NoiseSpec


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return sharded_source(tmp_path)


def test_finish_names_the_missing_shares(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    with pytest.raises(InputUnreadable, match="no job"):
        finish(out)
    plan(request(source, {}), out, {})
    work(out, (2, 4))
    with pytest.raises(InputUnreadable, match="3 of 4 are not done: 1, 3, 4"):
        finish(out)
    assert not Path(out).exists()
    work(out)
    finish(out)
    (again,) = finish(out)
    assert again.skipped


@pytest.mark.parametrize("step", ["_receipts", "_published_by", "_publish"])
@pytest.mark.parametrize("recipe_only", [False, True])
def test_a_finish_that_another_overtakes(
    step: str, recipe_only: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/job-{{seed}}"
    plan(request(source, {}), out, {"seed": "0,1"}, recipe_only=recipe_only)
    work(out)
    theirs = getattr(finish_module, step)

    def overtaken(*arguments: object, **options: object) -> object:
        monkeypatch.undo()
        finish(out)
        return theirs(*arguments, **options)

    monkeypatch.setattr(finish_module, step, overtaken)
    made = finish(out)
    assert [(one.output.name, one.skipped) for one in made] == [("job-0", True), ("job-1", True)]
    assert not job_path(out).exists()


def test_a_recipe_that_is_finished_already(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job.json"
    plan(request(source, {}), out, {}, recipe_only=True)
    work(out)
    (first,) = finish(out)
    (again,) = finish(out)
    assert again.skipped
    assert again.manifest == first.manifest


def test_a_recipe_is_not_taken_for_a_finished_output(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    single(request(source, {}), f"{out}/", {}, recipe_only=True)
    (found,) = finish(str(out))
    assert (found.recipe, found.output) == (True, out / "noisytune.json")


def test_what_a_killed_finish_left_of_a_job(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    work(out)

    def killed(path: Path, **_: object) -> None:
        # It got as far as the first file that it met.
        next(path.rglob("steps/1.json")).unlink()

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        (made,) = finish(out)
    expected = contents(made.output)
    shutil.rmtree(out)
    plan(request(source, {}), out, {})
    work(out)
    finish(out)
    assert contents(made.output) == expected
    assert not job_path(out).exists()


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("again", ["finish", "plan"])
def test_a_removal_that_is_stopped_goes_on(
    again: str, at: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, left, rename = f"{tmp_path}/job", at, os.rename
    plan(request(source, {}), out, {})
    work(out)

    def stopped(first: Path, second: Path) -> None:
        nonlocal left
        rename(first, second)
        if job_path(out) in Path(first).parents:
            left -= 1
            if not left:
                raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", stopped)
        with pytest.raises(Stopped):
            finish(out)
    weights = next(Path(out).glob("*.safetensors"))
    assert weights.stat().st_nlink == 2
    if again == "finish":
        (made,) = finish(out)
        assert made.skipped
    else:
        with pytest.raises(OutputUnsafe, match="the output exists"):
            plan(request(source, {"seed": 1}), out, {})
    assert weights.stat().st_nlink == 1
    assert not job_path(out).exists()


def test_who_comes_as_a_job_is_removed_is_told_that_there_is_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    trusted = FolderStorage.require_trusted

    def too_late(storage: FolderStorage) -> None:
        shutil.rmtree(storage.path)
        trusted(storage)

    monkeypatch.setattr(FolderStorage, "require_trusted", too_late)
    with pytest.raises(InputUnreadable, match="there is no job"):
        work(out)


@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize("change", [False, True])
def test_what_is_to_be_replaced_is_replaced(change: bool, card: bool, source: Path, tmp_path: Path) -> None:
    (expected,) = single(request(source, {}, card=card), f"{tmp_path}/single", {})
    (out,) = single(request(source, {}), f"{tmp_path}/job", {})
    if change:
        change_a_byte(out)
    plan(request(source, {}, card=card), f"{out}", {}, overwrite_changed=change, overwrite=not change)
    work(f"{out}")
    finish(f"{out}")
    assert contents(out) == contents(expected)


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_finish_that_is_stopped_when_all_but_done(
    is_file: bool, overwrite: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "one.safetensors", SHARDS[1]) if is_file else source
    (expected,) = single(request(source, {}), f"{tmp_path}/single.safetensors", {})
    out = f"{tmp_path}/job.safetensors"
    if overwrite:
        single(request(source, {"seed": 1}), out, {"seed": "1"})
    plan(request(source, {}), out, {}, overwrite=overwrite)
    work(out)
    with monkeypatch.context() as patched:
        patched.setattr(JobFolder, "remove", lambda self: None)
        (made,) = finish(out)
    if is_file and overwrite:
        made.manifest_path.unlink()
    finish(out)
    assert contents(Path(out)) == contents(expected)
    assert not job_path(out).exists()


def test_a_job_that_is_removed_while_it_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    work(out)
    theirs = finish_module._publish

    def removed(*arguments: Any) -> object:
        shutil.rmtree(job_path(out))
        return theirs(*arguments)

    monkeypatch.setattr(finish_module, "_publish", removed)
    with pytest.raises(InputUnreadable, match="there is no job"):
        finish(out)


def test_a_job_that_cannot_be_removed_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    work(out)
    monkeypatch.setattr(JobFolder, "remove", lambda self: False)
    (done,) = finish(out)
    assert f"{job_path(out).name} beside the output is left over: it could not be deleted" in done.warnings


@pytest.mark.parametrize("call", ["lstat", "listdir", "rename"])
def test_a_published_output_counts_though_the_job_cannot_be_looked_at(
    call: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, publishes = f"{tmp_path}/job", finish_module._publish
    plan(request(source, {}), out, {})
    work(out)
    works, job = getattr(os, call), job_path(out)

    def fails(path: Any, *arguments: Any, **options: Any) -> Any:
        if Path(path) in (job, job / "plan.json"):
            raise OSError(errno.EIO, "Input/output error")
        return works(path, *arguments, **options)

    def publish(*arguments: Any) -> Any:
        made = publishes(*arguments)
        monkeypatch.setattr(os, call, fails)
        return made

    monkeypatch.setattr(finish_module, "_publish", publish)
    (done,) = finish(out)
    monkeypatch.undo()
    assert f"{job.name} beside the output is left over: it could not be deleted" in done.warnings
    assert (Path(out) / "noisytune.json").is_file()


def test_an_output_of_the_same_noise_that_is_another_is_not_taken_for_the_jobs(
    source: Path, tmp_path: Path
) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    work(out)
    single(request(source, {}, card=True), f"{tmp_path}/other", {})
    (tmp_path / "other").rename(out)
    with pytest.raises(OutputUnsafe, match="exists"):
        finish(out)
    assert job_path(out).exists()


def once_before(call: Callable[..., Any], other: Callable[[], object]) -> Callable[..., Any]:
    """Return what does `other` first, the first time that it is called."""
    calls = iter([other])

    def do(*arguments: Any, **options: Any) -> Any:
        for one in calls:
            one()
        return call(*arguments, **options)

    return do


SLOW: dict[str, tuple[Any, str]] = {
    "planning": (folder_module.FolderStorage, "create"),
    "in its first share": (distribute, "begin_share"),
    "before it finishes": (distribute, "finish"),
}


@pytest.mark.parametrize("out", ["run", "run-{seed}"])
@pytest.mark.parametrize("slow", SLOW)
def test_who_is_overtaken_by_the_same_command_has_its_outputs(
    slow: str, out: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name = SLOW[slow]
    seeds = "0" if out == "run" else "0-1"
    others: list[Perturbed] = []
    call = once_before(
        getattr(place, name), lambda: others.extend(in_shares(source, f"{tmp_path}/jobs/{out}", seeds))
    )
    monkeypatch.setattr(place, name, call)
    made = in_shares(source, f"{tmp_path}/jobs/{out}", seeds)
    assert [one.output for one in made] == [one.output for one in others]
    assert not any("left over" in warning for one in (*made, *others) for warning in one.warnings)
    perturb_each(
        Request(os.fspath(source), NoiseSpec()), combine(f"{tmp_path}/single/{out}", seed=seeds, default=0.15)
    )
    assert contents(tmp_path / "jobs") == contents(tmp_path / "single")
    assert sorted(os.listdir(tmp_path / "jobs")) == sorted(os.listdir(tmp_path / "single"))


def test_what_a_job_was_to_replace_is_not_what_it_makes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/run"
    in_shares(source, out, "1")
    before = contents(Path(out))
    call = once_before(distribute.begin_share, lambda: shutil.rmtree(job_path(out)))
    monkeypatch.setattr(distribute, "begin_share", call)
    with pytest.raises(InputUnreadable, match="there is no job"):
        in_shares(source, out, "0", overwrite=True)
    assert contents(Path(out)) == before


def test_a_job_that_is_planned_while_another_is_removed_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/jobs/run-{{seed}}"
    asked = Request(os.fspath(source), NoiseSpec())
    plan_job(asked, out, combine(out, seed="0", default=0.15))
    work(out)
    planned: list[PlannedJob] = []
    other = combine(out, seed="1", default=0.15)
    remove = once_before(shutil.rmtree, lambda: planned.append(plan_job(asked, out, other)))
    with monkeypatch.context() as removing:
        removing.setattr(folder_module.shutil, "rmtree", remove)
        (done,) = finish(out)
    assert not any("left over" in warning for warning in done.warnings)
    assert planned[0].folder.is_there
    work(out)
    finish(out)
    assert sorted(os.listdir(tmp_path / "jobs")) == ["run-0", "run-1"]
