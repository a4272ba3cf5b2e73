"""What a job refuses: sources that changed, receipts that are none, plans and places that are not its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chunked import save_chunked
from jobs import change_a_byte, contents, job_path, plan, request, sharded_source, single, work_and_finish

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands.average import average
from noisytune_cli.commands.finish import finish
from noisytune_cli.commands.perturb import plan_perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.status import status
from noisytune_cli.commands.work import work
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, OutputUnsafe
from noisytune_cli.version import __version__


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return sharded_source(tmp_path)


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


VERBS = {
    "plan": lambda asked, out: plan(asked, out, {}),
    "work": lambda _, out: work(out),
    "finish": lambda _, out: finish(out),
    "status": lambda _, out: status(out),
}


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
