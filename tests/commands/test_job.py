"""Jobs: shares done in any order, by anybody, more than once, make what a single run makes, byte for byte."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from checkpoints import numbers, save, weights
from jobs import SHARDS, Asked, contents, job_path, plan, request, sharded_source, single, work_and_finish

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands import work as work_module
from noisytune_cli.commands.finish import finish
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.work import work
from noisytune_cli.errors import InputUnreadable, OutputUnsafe
from noisytune_cli.manifest.share import read_sums
from noisytune_cli.records import Conversion, NoiseSpec


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return sharded_source(tmp_path)


REQUESTS: dict[str, tuple[Asked, dict[str, str]]] = {
    "plain": ({}, {}),
    "lists": ({}, {"lam": "0,0.1,0.3", "seed": "0-2"}),
    "sigma": ({"scope": "absolute", "distribution": "gaussian"}, {"sigma": "0.01,-0.01"}),
    "global": ({"scope": "global"}, {"lam": "0.1,0.2"}),
    "global gaussian": ({"scope": "global", "distribution": "gaussian", "exclude": ("*embed*",)}, {}),
    "shrink": ({"kept": 0.5, "scope": "global"}, {}),
    "rules": ({"rules": (("*mlp*", 0.4), ("*norm*", 0.0)), "exclude": ("*layers.1*",)}, {"lam": "0.1,0.2"}),
}


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
