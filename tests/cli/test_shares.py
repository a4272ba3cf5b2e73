"""Which shares a process does, as it is told or as its scheduler says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from checkpoints import save, weights
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.cli.parse import read_bytes
from noisytune_cli.cli.shares import read_share
from noisytune_cli.errors import UsageError


def slurm(number: int, first: int = 0, step: int = 1, size: int = 4) -> dict[str, str]:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    return dict(zip(names, map(str, (number, first, step, size)), strict=True))


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, (1, 1)),
        ("3/64", {}, (3, 64)),
        ("64/64", {}, (64, 64)),
        ("env", slurm(0), (1, 4)),
        ("env", slurm(13, 1, 4, 4), (4, 4)),
        # An array's tasks may be started by srun, which says what it starts.
        ("env", slurm(2) | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 4)),
        ("env", {"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, (6, 8)),
        ("env", {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "3"}, (1, 3)),
        ("env", {"AWS_BATCH_JOB_ARRAY_INDEX": "9", "AWS_BATCH_JOB_ARRAY_SIZE": "10"}, (10, 10)),
    ],
)
def test_a_share(text: str | None, environment: Mapping[str, str], expected: tuple[int, int]) -> None:
    assert read_share(text, environment) == expected


@pytest.mark.parametrize(
    ("text", "environment", "why"),
    [
        ("0/4", {}, "not K/N"),
        ("5/4", {}, "not K/N"),
        ("1", {}, "not K/N"),
        ("1/4/", {}, "not K/N"),
        ("-1/4", {}, "not K/N"),
        ("env", {}, "no variable"),
        ("env", {"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETIONS is not set"),
        ("env", {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "3"}, "none of the 3 numbers"),
        ("env", {"JOB_COMPLETION_INDEX": "x", "JOB_COMPLETIONS": "3"}, "is x"),
        ("env", slurm(2, 0, 4, 4), "none of the 4 numbers"),
        ("env", slurm(0, 0, 0, 4), "is 0"),
    ],
)
def test_what_is_no_share(text: str, environment: Mapping[str, str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        read_share(text, environment)


def test_what_changed_says_where_the_job_is_named(tmp_path: Path) -> None:
    runner, source = CliRunner(), save(tmp_path / "in.safetensors", {"w": weights("F32", 9)})
    out = str(tmp_path / "out.safetensors")
    runner.invoke(app, ["plan", str(source), "-o", out])
    (job,) = tmp_path.glob(".noisytune-job-*")
    assert f"\njob: {job}\n" in runner.invoke(app, ["status", out]).stdout
    os.utime(source, ns=(0, 0))
    assert "the job's folder (noisytune status names it)" in runner.invoke(app, ["work", out]).stderr


def test_bytes() -> None:
    found = [read_bytes("--share-bytes", text, 7) for text in (None, "1", "64k", "3M", "2GiB", "1tb")]
    assert found == [7, 1, 64 << 10, 3 << 20, 2 << 30, 1 << 40]
    for text in ("0", "1.5G", "G", "-1", "1P"):
        with pytest.raises(UsageError, match="no number of bytes"):
            read_bytes("--share-bytes", text, 7)
