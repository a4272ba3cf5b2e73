"""The files of a job, which another process wrote: what is accepted is what is written again.

The job that they belong to is one of scope global, of two strengths: its steps, its sums and its receipts are
those of a share of two files.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3
from checkpoints import save_sharded, weights

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands.finish import _prepare, _receipts
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.work import _stds, request_of, work
from noisytune_cli.errors import InputInvalid, OutputUnsafe
from noisytune_cli.manifest.job import Job, digest_of, job_pieces, read_job
from noisytune_cli.manifest.share import ShareSteps, read_steps, read_sums, steps_bytes, sums_bytes
from noisytune_cli.manifest.write import encode
from noisytune_cli.output.job_folder import JobFolder, _require_named
from noisytune_cli.output.jobs.folder import FolderStorage
from noisytune_cli.records import Manifest, NoiseSpec, Plan

#: Where the job's model and outputs are said to lie.
_ROOT = "/f"

#: How a property has `content` at a path: written there, or as if.
Place = Callable[[Path, bytes], AbstractContextManager[None]]


@contextmanager
def written(path: Path, content: bytes) -> Iterator[None]:
    """Have `content` at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    yield


@dataclass(frozen=True)
class Made:
    """A job that is done but not finished: the bytes of its files, and its first output's plan."""

    job: Job
    plan: Plan
    files: dict[str, bytes]


@functools.cache
def made() -> Made:
    """Make a job, and return it."""
    with tempfile.TemporaryDirectory() as scratch:
        tensors = ("embed.weight", "F32"), ("layers.0.attn.weight", "BF16"), ("lm_head.weight", "F32")
        shards = [{name: weights(dtype, 6, 4, seed=7)} for name, dtype in tensors]
        save_sharded(Path(scratch, "base"), shards[0] | shards[1], shards[2])
        Path(scratch, "base", "config.json").write_text('{"model_type": "gpt2", "tie_word_embeddings": true}')
        noise = NoiseSpec(scope="global", rules=(("*attn*", 0.3),))
        out = f"{scratch}/out-{{lambda}}"
        wanted = combine(out, lam="0.1,0.2", seed="0", default=0.15)
        folder = plan_job(Request(f"{scratch}/base", noise), out, wanted, recipe_only=True).folder
        work(out, threads=1)
        with request_of(folder.job).open(headers_only=True) as source:
            plan = _prepare(folder, source).plans[0]
        named = "plan", "steps", "sums", "receipt"
        places = "plan.json", folder.steps(0), folder.sums(0), folder.receipt(0, 0)
        files = {name: Path(folder.path, at).read_bytes() for name, at in zip(named, places, strict=True)}
        files["plan"] = files["plan"].replace(os.fsencode(scratch), os.fsencode(_ROOT))
        return Made(folder.job, plan, files)


def _folder(folder: Path, job: Job, digest: str = "0" * 64) -> JobFolder:
    return JobFolder(job, digest, FolderStorage(folder))


def plan(content: bytes, folder: Path, place: Place = written) -> None:
    """A plan: it is written again as it means, and writes to no other place than it is asked to."""
    path = folder / "plan.json"
    with place(path, content):
        job, digest = read_job(path)
    assert digest == blake3(content).hexdigest()
    try:
        _require_named(_folder(folder, job, digest), f"{_ROOT}/out-{{lambda}}")
    except OutputUnsafe as error:
        raise InputInvalid("another's", why=error.line(), next_step="None") from error
    assert all(os.path.normpath(output.path).startswith(f"{_ROOT}/out-") for output in job.outputs)
    again = b"".join(job_pieces(job))
    with place(path, again):
        assert read_job(path) == (job, blake3(again).hexdigest())


def steps(content: bytes, folder: Path, place: Place = written) -> None:
    """The steps of a share, of which the plan has the digest: they are written again as they mean."""
    path, job = folder / "steps.json", made().job

    def read(content: bytes) -> ShareSteps:
        with place(path, content):
            return read_steps(path, job, replace(job.shares[0], steps=digest_of(content)))

    found = read(content)
    assert read(steps_bytes(found, job.strengths)) == found


def sums(content: bytes, folder: Path, place: Place = written) -> None:
    """The sums of a share: they are written again as they mean, and add up to a std."""
    job = _folder(folder, made().job)
    path = folder / job.sums(0)

    def read(content: bytes) -> tuple[bytes, Mapping[float, float]]:
        _stds.cache_clear()
        with place(path, content):
            return sums_bytes(read_sums(path, job.job)), _stds(job)

    again, stds = read(content)
    assert all(std >= 0 for std in stds.values())
    assert read(again) == (again, stds)


def receipt(content: bytes, folder: Path, place: Place = written) -> None:
    """The receipt of a share: of just the tensors and steps of the plan, and written again as it means."""
    intact = made()
    job = _folder(folder, intact.job)
    path = folder / job.receipt(0, 0)
    with place(path, content):
        found = _receipts(job, 0, intact.plan)
    planned = [(step.tensor.name, step.tensor.dtype, step.tensor.shape) for step in intact.plan.steps]
    assert [(r.step.tensor.name, r.step.tensor.dtype, r.step.tensor.shape) for r in found] == planned
    made_of = Manifest("noisytune", intact.job.version, intact.job.source, intact.job.outputs[0].noise, found)
    with place(path, encode(made_of)):
        assert _receipts(job, 0, intact.plan) == found
