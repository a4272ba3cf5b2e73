"""Jobs: shares done in any order, by anybody, more than once, make what a single run makes, byte for byte."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Tensor, numbers, save, save_sharded, weights
from chunked import save_chunked

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands import distribute
from noisytune_cli.commands import finish as finish_module
from noisytune_cli.commands import work as work_module
from noisytune_cli.commands.average import average
from noisytune_cli.commands.distribute import perturb_shares
from noisytune_cli.commands.finish import finish
from noisytune_cli.commands.perturb import Perturbed, perturb_each, plan_perturb
from noisytune_cli.commands.plan import PlannedJob, plan_job
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.status import status
from noisytune_cli.commands.work import work
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, OutputUnsafe
from noisytune_cli.manifest.share import read_sums
from noisytune_cli.output import job_folder
from noisytune_cli.output.job_folder import JobFolder
from noisytune_cli.output.jobs import folder as folder_module
from noisytune_cli.records import Conversion, NoiseSpec
from noisytune_cli.version import __version__

#: A shard each; the head is tied to the embeddings of another shard, by equal bytes.
SHARDS = (
    {"model.embed_tokens.weight": weights("F32", 30, 8, seed=1), "ids": Tensor("I64", np.arange(8))},
    {
        "model.layers.0.mlp.down_proj.weight": weights("BF16", 8, 24, seed=3),
        "model.layers.0.norm.weight": numbers("F32", *[1.0] * 8),
    },
    {"model.layers.0.bias": numbers("F16", 1.0, math.nan), "scale": numbers("F32", 0.5)},
    {"lm_head.weight": weights("F32", 30, 8, seed=1), "model.layers.1.w": weights("F64", 7, 5, seed=6)},
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "base"
    save_sharded(root, *SHARDS)
    (root / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    (root / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    return root


def job_path(out: str) -> Path:
    """Return the folder of a job that is here."""
    place = job_folder.job_path(out)
    assert isinstance(place, Path)
    return place


def contents(root: Path) -> dict[str, bytes]:
    if root.is_file():
        beside = Path(f"{root}.noisytune.json")
        return {"weights": root.read_bytes(), "manifest": beside.read_bytes()}
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


Asked = dict[str, object]

REQUESTS: dict[str, tuple[Asked, dict[str, str]]] = {
    "plain": ({}, {}),
    "lists": ({}, {"lam": "0,0.1,0.3", "seed": "0-2"}),
    "sigma": ({"scope": "absolute", "distribution": "gaussian"}, {"sigma": "0.01,-0.01"}),
    "global": ({"scope": "global"}, {"lam": "0.1,0.2"}),
    "global gaussian": ({"scope": "global", "distribution": "gaussian", "exclude": ("*embed*",)}, {}),
    "shrink": ({"kept": 0.5, "scope": "global"}, {}),
    "rules": ({"rules": (("*mlp*", 0.4), ("*norm*", 0.0)), "exclude": ("*layers.1*",)}, {"lam": "0.1,0.2"}),
}


def request(source: Path, asked: Asked, conversion: Conversion | None = None, card: bool = False) -> Request:
    return Request(os.fspath(source), NoiseSpec(**asked), conversion, card=card)  # type: ignore[arg-type]


def plan(asked: Request, out: str, given: dict[str, str], **options: object) -> PlannedJob:
    wanted = combine(out, default=0.15, **{"seed": "0", **given})  # type: ignore[arg-type]
    return plan_job(asked, out, wanted, share_bytes=1, **options)  # type: ignore[arg-type]


def single(asked: Request, out: str, given: dict[str, str], **options: object) -> list[Path]:
    wanted = combine(out, default=0.15, **{"seed": "0", **given})  # type: ignore[arg-type]
    return [one.output for one in perturb_each(asked, wanted, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_job_is_the_single_run(name: str, source: Path, tmp_path: Path) -> None:
    asked, given = REQUESTS[name]
    placeholders = "-{lambda}-{seed}" if "lam" in given else "-{sigma}" if "sigma" in given else ""
    expected = single(request(source, asked), f"{tmp_path}/single{placeholders}", given)
    out = f"{tmp_path}/job{placeholders}"
    planned = plan(request(source, asked), out, given)
    assert len(planned.folder.job.shares) == len(SHARDS)
    # Backwards, one by one; with scope global the first round leaves sums.
    rounds = 2 if asked.get("scope") == "global" else 1
    for _ in range(rounds):
        for share in reversed(range(1, 5)):
            work(out, (share, 4))
    made = [one.output for one in finish(out)]
    assert [contents(one) for one in made] == [contents(one) for one in expected]
    assert not job_path(out).exists()


def test_a_file_and_a_conversion_and_a_card(source: Path, tmp_path: Path) -> None:
    one = save(tmp_path / "one.safetensors", SHARDS[1], {"format": "pt"})
    for asked, suffix in [
        (request(one, {}), ".safetensors"),
        (request(source, {}, Conversion(dtype="BF16")), ""),
        (request(source, {}, card=True), ""),
    ]:
        expected = single(asked, f"{tmp_path}/single{suffix}", {})
        out = f"{tmp_path}/job{suffix}"
        plan(asked, out, {})
        work(out)
        made = [one.output for one in finish(out)]
        assert [contents(path) for path in made] == [contents(path) for path in expected]
        for path in [*made, *expected]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            Path(f"{path}.noisytune.json").unlink(missing_ok=True)


def test_what_is_shrunk_alone_may_have_one_element_or_an_infinity(tmp_path: Path) -> None:
    """A step without noise whose values decide what comes of it."""
    tensors = {
        "a.w": weights("F32", 8, 4),
        "b.one": numbers("F32", 2.0),
        "b.inf": numbers("F32", math.inf, 1.0),
    }
    source = save(tmp_path / "in.safetensors", tensors)
    asked = request(source, {"kept": 0.5, "rules": (("b.*", 0.0),)})
    (expected,) = single(asked, f"{tmp_path}/single.safetensors", {})
    out = f"{tmp_path}/job.safetensors"
    plan(asked, out, {})
    work_and_finish(out)
    assert contents(Path(out)) == contents(expected)


def test_a_recipe(source: Path, tmp_path: Path) -> None:
    (expected,) = single(request(source, {}), f"{tmp_path}/single.json", {}, recipe_only=True)
    out = f"{tmp_path}/job.json"
    plan(request(source, {}), out, {}, recipe_only=True)
    work(out)
    (made,) = finish(out)
    assert made.output.read_bytes() == expected.read_bytes()


def test_small_files_are_done_together(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    planned = plan_job(request(source, {}), out, combine(out, seed="0", default=0.15))
    assert [share.files for share in planned.folder.job.shares] == [
        tuple(sorted(f.name for f in source.glob("*.safetensors")))
    ]


def test_the_same_plan_joins_and_another_is_refused(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    assert not plan(request(source, {}), out, {}).joined
    before = contents(job_path(out))
    assert plan(request(source, {}), out, {}).joined
    assert contents(job_path(out)) == before
    with pytest.raises(OutputUnsafe, match="another job"):
        plan(request(source, {"seed": 1}), out, {"seed": "1"})
    assert contents(job_path(out)) == before


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


def change_a_byte(source: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def grow(source: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-3])


def edit_config(source: Path) -> None:
    (source / "config.json").write_text("{}")


def add_a_file(source: Path) -> None:
    (source / "vocab.txt").write_text("a")


@pytest.mark.parametrize("change", [change_a_byte, grow, edit_config, add_a_file])
def test_a_source_that_changed(change: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    work(out, (1, 4))
    change(source)
    with pytest.raises(Mismatch, match="changed since the job was planned"):
        work_and_finish(out)
    assert not Path(out).exists()


def work_and_finish(out: str) -> None:
    work(out)
    finish(out)


def test_chunks_are_refused_by_name(tmp_path: Path) -> None:
    save_chunked(tmp_path / "chunks", {("w",): torch.arange(300.0).view(30, 10)})
    with pytest.raises(InputInvalid, match=r"torch\.distributed\.checkpoint"):
        plan(request(tmp_path / "chunks", {}), f"{tmp_path}/job", {})


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


def forge_a_digest(receipts: Path) -> None:
    edit(receipts / "2-1.json", '"action": "perturb"', '"action": "copy", "reason": "constant"')


def forge_the_noise(receipts: Path) -> None:
    edit(receipts / "1-1.json", '"seed": "0"', '"seed": "1"')


def cut(receipts: Path) -> None:
    content = (receipts / "1-1.json").read_bytes()
    (receipts / "1-1.json").write_bytes(content[: len(content) // 2])


def exchange(receipts: Path) -> None:
    shutil.copy(receipts / "1-1.json", receipts / "2-1.json")


def exclude(receipts: Path) -> None:
    """Claim that the user excluded a tensor, which the plan does not."""
    edit(receipts / "4-1.json", '"stream": "model.layers.1.w"', '"stream": "another"')


def shorten(receipts: Path) -> None:
    (weights,) = (receipts.parent / "files" / "1").glob("*00001-of*")
    weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize("forge", [forge_a_digest, forge_the_noise, cut, exchange, exclude, shorten])
def test_a_receipt_that_is_none(forge: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    planned = plan(request(source, {}), out, {})
    work(out)
    forge((job_path(out) / planned.folder.receipt(0, 0)).parent)
    with pytest.raises(InputInvalid, match=r"cannot use the (receipt|manifest)"):
        finish(out)
    assert not Path(out).exists()
    assert job_path(out).exists()


def test_a_receipt_of_another_plan_counts_for_nothing(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    old = plan(request(source, {"seed": 5}), out, {"seed": "5"}).folder
    work(out)
    (old.path / "plan.json").unlink()
    plan(request(source, {}), out, {})
    with pytest.raises(InputUnreadable, match="4 of 4 are not done"):
        finish(out)


def test_another_version_is_refused(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    folder = plan(request(source, {}), out, {}).folder
    edit(folder.path / "plan.json", f'"version": "{__version__}"', '"version": "0.0.1"')
    with pytest.raises(InputInvalid, match=r"noisytune 0\.0\.1 planned it"):
        work(out)


def test_steps_that_the_plan_does_not_know(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    folder = plan(request(source, {}), out, {}).folder
    edit(job_path(out) / folder.steps(0), "0.15", "0.16")
    with pytest.raises(InputInvalid, match="cannot use the job"):
        work(out)


def test_the_output_is_only_refused_when_it_is_another(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    work(out)
    Path(out).mkdir()
    (Path(out) / "mine").write_text("x")
    with pytest.raises(OutputUnsafe, match="Move it away, and finish again"):  # it has no --overwrite
        finish(out)
    assert (Path(out) / "mine").read_text() == "x"
    shutil.rmtree(out)
    finish(out)


VERBS = {"plan": lambda asked, out: plan(asked, out, {}), "work": lambda _, out: work(out)}
VERBS |= {"finish": lambda _, out: finish(out), "status": lambda _, out: status(out)}


@pytest.mark.parametrize("verb", VERBS)
def test_a_job_that_anybody_may_have_put_there(
    verb: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    out = f"{tmp_path}/tmp/job"
    plan(request(source, {}), out, {})
    work(out)
    before = contents(job_path(out))
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(OutputUnsafe, match="belongs to another user"):
            VERBS[verb](request(source, {}), out)
    assert contents(job_path(out)) == before
    elsewhere = job_path(out).rename(tmp_path / "elsewhere")
    job_path(out).symlink_to(elsewhere)
    with pytest.raises(OutputUnsafe, match="it is a link"):
        VERBS[verb](request(source, {}), out)
    assert contents(elsewhere) == before


def test_a_job_in_a_folder_of_a_group(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o770)
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    work(out)
    finish(out)


@pytest.mark.parametrize("verb", ["work", "finish", "status"])
@pytest.mark.parametrize("place", ["victim", "job-0 1", "job-0/../victim"])
def test_a_plan_that_writes_elsewhere(verb: str, place: str, source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job-{{seed}}"
    folder = plan(request(source, {}), out, {"seed": "0"}).folder
    work(out)
    edit(folder.path / "plan.json", f'"path": "{tmp_path}/job-0"', f'"path": "{tmp_path}/{place}/x"')
    with pytest.raises(OutputUnsafe, match=r"writes to .*, which is not what"):
        VERBS[verb](request(source, {}), out)


@pytest.mark.parametrize("other", ["s3://bucket/model", "base", "~/base"])
def test_a_plan_whose_source_is_none_of_a_job(other: str, source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    folder = plan(request(source, {}), out, {}).folder
    edit(folder.path / "plan.json", f'"source": "{source}"', f'"source": "{other}"')
    with pytest.raises(InputInvalid, match=r"stamps\[0\]|is no absolute path, no address"):
        work(out)


@pytest.mark.parametrize("out", ["{1}/job", "s{seed}/job-{lambda}", "here/"])
def test_braces_and_folders_in_the_name(out: str, source: Path, tmp_path: Path) -> None:
    source = source if out != "here/" else save(tmp_path / "one.safetensors", SHARDS[1])
    plan(request(source, {}), f"{tmp_path}/{out}", {"seed": "0"})
    place = job_path(f"{tmp_path}/{out}").parent
    assert place == tmp_path / "{1}" if out == "{1}/job" else place == tmp_path
    work(f"{tmp_path}/{out}")
    (made,) = finish(f"{tmp_path}/{out}")
    assert made.output.exists()


def test_a_source_above_a_link(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "deep").mkdir()
    (tmp_path / "link").symlink_to(source / "deep")
    monkeypatch.chdir(tmp_path)
    asked = Request("link/..", NoiseSpec())
    (expected,) = single(asked, f"{tmp_path}/single", {})
    plan(asked, f"{tmp_path}/job", {})
    monkeypatch.chdir("/")
    work(f"{tmp_path}/job")
    (made,) = finish(f"{tmp_path}/job")
    assert contents(made.output) == contents(expected)


@pytest.mark.parametrize("step", ["fill", "complete", "pieces"])
@pytest.mark.parametrize("recipe_only", [False, True])
def test_a_worker_that_others_overtake(
    step: str, recipe_only: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/job"
    scope = "global" if step == "complete" else "matrix"
    plan(request(source, {"scope": scope}), out, {}, recipe_only=recipe_only)
    theirs = getattr(work_module, step)

    def overtaken(*arguments: object, **options: object) -> object:
        monkeypatch.undo()
        work(out)
        finish(out)
        return theirs(*arguments, **options)

    monkeypatch.setattr(work_module, step, overtaken)
    with pytest.raises(InputUnreadable, match="there is no job"):
        work(out)
    assert not job_path(out).exists()


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


def test_nothing_else_is_written_where_a_job_will_write(source: Path, tmp_path: Path) -> None:
    asked, out = request(source, {}), f"{tmp_path}/out-{{seed}}"
    made = single(asked, f"{tmp_path}/made", {})[0]
    plan(asked, out, {"seed": "0,1"})
    inner = f"{tmp_path}/in-{{seed}}/out"
    plan(asked, inner, {"seed": "0,1"})
    taken = [f"{tmp_path}/out-1", f"{tmp_path}/in-0/out"]

    def is_refused(one: str) -> None:
        with pytest.raises(OutputUnsafe, match="a job is planned"):
            single(asked, one, {}, skip_existing=True)
        with pytest.raises(OutputUnsafe, match="a job is planned"):
            plan_perturb(asked, combine(one, seed="0", default=0.15))
        with pytest.raises(OutputUnsafe, match=r"job is (planned|there)"):
            plan(asked, one, {})
        with pytest.raises(OutputUnsafe, match="a job is planned"):
            replay(str(made), one, base=str(source))
        with pytest.raises(OutputUnsafe, match="a job is planned"):
            average([str(source), str(source)], one)

    for one in taken:
        is_refused(one)
    plan_perturb(asked, combine(taken[0], seed="0", default=0.15), in_shares=True)
    single(asked, f"{tmp_path}/out-2", {})
    # Of a plan that cannot be read its folder's name tells.
    alone = f"{tmp_path}/alone"
    plan(asked, alone, {})
    (job_path(alone) / "plan.json").write_text("{}")
    (job_path(out) / "plan.json").write_text("{}")
    is_refused(alone)
    single(asked, taken[0], {})


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


def test_a_plan_that_never_ends(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/job"
    folder = plan(request(source, {}), out, {}).folder
    os.truncate(folder.path / "plan.json", 1 << 40)
    with pytest.raises(OutputUnsafe, match="another job"):
        plan(request(source, {}), out, {})
    (folder.path / "plan.json").unlink()
    os.mkfifo(folder.path / "plan.json")
    with pytest.raises(InputInvalid, match="it is a FIFO"):
        plan(request(source, {}), out, {})


def test_a_placeholder_that_names_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run-0").symlink_to("elsewhere")
    out = f"{tmp_path}/run-{{seed}}/out"
    with pytest.raises(OutputUnsafe, match="with no links"):
        plan(request(source, {}), out, {})
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


def test_the_sums_of_all_shares_are_read_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {"scope": "global"}), out, {})
    read = []
    monkeypatch.setattr(work_module, "read_sums", lambda path, job: read.append(path) or read_sums(path, job))
    assert work(out).waits_for == ()
    assert sorted(read) == sorted(set(read))
    assert len(read) == len(SHARDS)


def test_a_job_that_cannot_be_removed_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/job"
    plan(request(source, {}), out, {})
    work(out)
    monkeypatch.setattr(JobFolder, "remove", lambda self: False)
    (done,) = finish(out)
    assert f"{job_path(out).name} beside the output is left over: it could not be deleted" in done.warnings


@pytest.mark.parametrize("call", ["lstat", "listdir", "unlink"])
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


def in_shares(source: Path, out: str, seed: str = "0", *, overwrite: bool = False) -> tuple[Perturbed, ...]:
    wanted = combine(out, seed=seed, default=0.15)
    asked = Request(os.fspath(source), NoiseSpec(seed=wanted[0].seed))
    return perturb_shares(asked, out, wanted, engine="local", share_bytes=1, overwrite=overwrite)


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
