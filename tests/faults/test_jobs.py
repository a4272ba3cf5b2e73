"""Jobs that are killed, lost and done twice: the same command again ends in what a single run makes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_sharded, weights
from namespaces import in_namespace

from noisytune_cli.checkpoint.formats import _system
from noisytune_cli.cli.parse import combine
from noisytune_cli.commands.finish import finish
from noisytune_cli.commands.perturb import perturb
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.work import work
from noisytune_cli.output import job_folder
from noisytune_cli.records import NoiseSpec

#: Seconds that a process may take, on a machine that does other things.
_PATIENCE = 120.0

_SHARES = 4


def job_path(out: str) -> Path:
    """Return the folder of a job that is here."""
    place = job_folder.job_path(out)
    assert isinstance(place, Path)
    return place


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model") / "base"
    # Large enough that a worker can be met at work.
    save_sharded(root, *({f"layers.{i}.weight": weights("F32", 1000, 400, seed=i)} for i in range(_SHARES)))
    (root / "config.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, bytes]:
    return tree(perturb(Request(os.fspath(model), NoiseSpec()), f"{model.parent}/single").output)


@pytest.fixture
def out(model: Path, tmp_path: Path) -> str:
    out = f"{tmp_path}/job"
    plan(model, out)
    return out


def plan(model: Path, out: str, *, overwrite: bool = False) -> None:
    wanted = combine(out, seed="0", default=0.15)
    plan_job(Request(os.fspath(model), NoiseSpec()), out, wanted, share_bytes=1, overwrite=overwrite)


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "noisytune_cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, told = process.communicate(timeout=_PATIENCE)
    return process.returncode, told


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + _PATIENCE
    while not condition() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.001)


def files_below(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.rglob(pattern)) if folder.exists() else []
    except FileNotFoundError:  # a folder that another process has just renamed
        return []


def test_a_worker_killed_twice(out: str, expected: dict[str, bytes]) -> None:
    for _ in range(2):
        worker = start("work", out, "-q", "--threads", "1")
        wait_for(lambda: files_below(job_path(out), "scratch/*/1-0"), worker)
        worker.kill()
        assert end(worker)[0] in (-signal.SIGKILL, 0)
    assert end(start("work", out))[0] == 0
    assert files_below(job_path(out), "scratch/*/*") == []
    (done,) = finish(out)
    assert tree(done.output) == expected
    assert not job_path(out).exists()


def test_the_driver_killed_and_the_same_command_again(
    model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = f"{tmp_path}/job"
    command = ("perturb", os.fspath(model), "-o", out, "--engine", "local", "--share-bytes", "1", "-q")
    for count in (1, 2):
        driver = start(*command)
        wait_for(lambda count=count: len(files_below(job_path(out), "receipts/*.json")) >= count, driver)
        driver.kill()
        end(driver)
    receipts = {path.name: path.stat().st_ino for path in files_below(job_path(out), "receipts/*.json")}
    driver = start(*command)
    assert end(driver) == (0, "")
    assert receipts or Path(out).exists()
    assert tree(Path(out)) == expected


def slurm(task: int) -> dict[str, str]:
    """Return what Slurm sets in a task of an array 10-25:5."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    return dict(zip(names, map(str, (10 + 5 * task, 10, 5, _SHARES)), strict=True))


def test_an_array_with_a_lost_task(out: str, expected: dict[str, bytes]) -> None:
    tasks = [start("work", out, "--share", "env", **slurm(task)) for task in range(_SHARES) if task != 2]
    assert [end(task)[0] for task in tasks] == [0, 0, 0]
    code, told = end(start("finish", out))
    assert code == 4
    assert "1 of 4 are not done: 3." in told
    assert end(start("work", out, "--share", "env", **slurm(2)))[0] == 0
    assert end(start("finish", out))[0] == 0
    assert tree(Path(out)) == expected


def test_a_real_slurm_that_loses_a_task_and_its_node(
    model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    if not os.environ.get("NOISYTUNE_SLURM"):
        pytest.skip("starts a cluster, whose moments are its own: NOISYTUNE_SLURM=1")
    if not all(Path(f"/usr/sbin/{daemon}").exists() for daemon in ("slurmctld", "slurmd", "munged")):
        pytest.skip("Slurm is not here (Debian: slurm-wlm, munge)")
    if os.geteuid():
        pytest.skip("slurmd needs root")
    (tmp_path / "slurm").mkdir()
    script = Path(__file__).parents[1] / "inputs" / "slurm_cluster.py"
    places = (os.fspath(tmp_path / "slurm"), os.fspath(model), f"{tmp_path}/job")
    done = json.loads(in_namespace([sys.executable, str(script), *places]))
    code, told = done["first"]
    # The fourth task was lost for good; of the others Slurm says what begins again, and when.
    assert code == 4
    assert re.search(r"of 4 are not done: (\d, )*4\.", told)
    assert set(done["began"]) <= {1, 2, 3}
    assert tree(tmp_path / "job") == expected


def test_four_workers_on_all_shares_at_once(out: str, expected: dict[str, bytes]) -> None:
    workers = [start("work", out) for _ in range(4)]
    assert [end(worker)[0] for worker in workers] == [0] * 4
    finish(out)
    assert tree(Path(out)) == expected


def test_a_worker_that_is_late_finds_the_job_finished(out: str) -> None:
    work(out)
    finish(out)
    code, told = end(start("work", out))
    assert code == 4
    assert "there is no job" in told


def calls_of(run: Callable[[], object], at: int) -> int | None:
    """Run in a process of its own that is killed before its `at`-th call that changes a disk.

    Return its exit code, or None where it was killed.
    """
    child = os.fork()
    if not child:
        left = at
        try:

            def counted(function: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **options)

                return call

            for name in ("link", "rename", "replace", "mkdir", "rmdir", "unlink", "fsync", "open"):
                setattr(os, name, counted(getattr(os, name)))
            for name in ("rename_without_replacing", "exchange"):
                setattr(_system, name, counted(getattr(_system, name)))
            run()
            os._exit(0)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small") / "base"
    save_sharded(root, {"a": weights("F32", 30, 8, seed=1)}, {"b": weights("BF16", 30, 8, seed=2)})
    (root / "config.json").write_text("{}")
    return root


@pytest.mark.parametrize(
    ("verb", "there"),
    [(plan, ""), (work, ""), (finish, ""), (finish, "an empty folder"), (finish, "an old output")],
)
def test_killed_at_every_step(verb: Callable[..., object], there: str, small: Path, tmp_path: Path) -> None:
    overwrite = there == "an old output"
    expected = tree(perturb(Request(os.fspath(small), NoiseSpec()), f"{tmp_path}/single").output)
    at, killed = 1, 0
    while True:
        place = tmp_path / str(at)
        place.mkdir()
        out = f"{place}/out"
        if overwrite:
            perturb(Request(os.fspath(small), NoiseSpec(seed=1)), out)
        elif there:
            Path(out).mkdir()
        if verb is not plan:
            plan(small, out, overwrite=overwrite)
        if verb is finish:
            work(out)
        run = partial(verb, small, out) if verb is plan else partial(verb, out)
        code = calls_of(run, at)
        if code is not None:
            assert code == 0
            break
        killed += 1
        # As who was called to it would: the same commands again.
        if not Path(out, "noisytune.json").exists() or job_path(out).joinpath("plan.json").exists():
            plan(small, out, overwrite=overwrite)
            work(out)
        finish(out)
        assert tree(Path(out)) == expected, at
        # An empty folder at most: files of the job would be second names of the output's, and keep its room.
        left = [path.name for path in place.rglob("*") if "out" not in path.relative_to(place).parts]
        assert not [name for name in left if verb is plan or not name.startswith(".noisytune-job-")], at
        shutil.rmtree(place)
        at += 1
    assert killed > 15


def test_a_node_of_ray_is_killed(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    pytest.importorskip("ray")
    program = Path(__file__).parent.parent / "inputs" / "ray_cluster.py"
    out = f"{tmp_path}/job"
    found = json.loads(in_namespace([sys.executable, os.fspath(program), os.fspath(model), out]))
    assert found["code"] == 0
    assert 0 < found["receipts"] < _SHARES
    assert json.loads(found["stdout"])["output"] == out
    assert tree(Path(out)) == expected


def test_shares_on_ray_of_a_model_in_a_store(model: Path, expected: dict[str, bytes]) -> None:
    for package in ("ray", "obstore", "moto"):
        pytest.importorskip(package)
    program = Path(__file__).parent.parent / "inputs" / "ray_on_store.py"
    found = json.loads(in_namespace([sys.executable, os.fspath(program), os.fspath(model)]))
    assert found["codes"] == [0, 0]
    assert found["same"]
    assert set(found["names"]) == expected.keys()
    assert json.loads(found["stdout"])["output"].endswith("/job")
