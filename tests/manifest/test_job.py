"""A job's files, read as a stranger's: what they say is what was written, and anything else is one error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import numbers, save_sharded, weights

from noisytune_cli.checkpoint.address import Address
from noisytune_cli.cli.parse import combine
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.work import _stds, work
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.manifest.job import Job, job_pieces, read_job
from noisytune_cli.manifest.share import ShareSums, read_steps, read_sums, steps_bytes, sums_bytes
from noisytune_cli.noise.std import nearest_sqrt, new_exact_sums
from noisytune_cli.output.job_folder import JobFolder
from noisytune_cli.records import NoiseSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    root = tmp_path_factory.mktemp("job")
    shards = (
        {
            "model.embed_tokens.weight": weights("F32", 30, 8),
            "model.h.attn.c_attn.weight": weights("F32", 8, 24),
        },
        {"lm_head.weight": weights("F32", 30, 8), "position_ids": numbers("I64", 0, 1)},
    )
    save_sharded(root / "base", *shards)
    (root / "base" / "config.json").write_text('{"model_type": "gpt2", "tie_word_embeddings": true}')
    noise = NoiseSpec(scope="global", granularity="matrix", rules=(("*c_attn*", 0.3),))
    out = f"{root}/out-{{lambda}}"
    wanted = combine(out, lam="0.1,0.2", seed="0", default=0.15)
    planned = plan_job(Request(str(root / "base"), noise), out, wanted, share_bytes=1).folder
    work(out)
    return planned


def here(folder: JobFolder, name: str) -> Path:
    assert isinstance(folder.path, Path)
    return folder.path / name


def read_plan(folder: JobFolder, path: Path) -> Job:
    return read_job(path)[0]


READERS: dict[str, tuple[Callable[[JobFolder], Path], Callable[[JobFolder, Path], Any]]] = {
    "plan": (lambda folder: folder.path / "plan.json", read_plan),
    "steps": (
        lambda folder: here(folder, folder.steps(0)),
        lambda folder, path: read_steps(path, folder.job, folder.job.shares[0]),
    ),
    "sums": (lambda folder: here(folder, folder.sums(0)), lambda folder, path: read_sums(path, folder.job)),
}


def test_what_is_written_is_what_is_read(folder: JobFolder) -> None:
    job = read_plan(folder, folder.path / "plan.json")
    assert job == folder.job
    assert b"".join(job_pieces(job)) == (folder.path / "plan.json").read_bytes()
    for number, share in enumerate(job.shares):
        found = read_steps(here(folder, folder.steps(number)), job, share)
        assert steps_bytes(found, job.strengths) == here(folder, folder.steps(number)).read_bytes()
    sums = read_sums(here(folder, folder.sums(0)), job)
    assert sums_bytes(sums) == here(folder, folder.sums(0)).read_bytes()
    exact = np.zeros_like(sums[0].exact)
    exact[3] = [-5, 1, 2**63 - 1, 0, -(2**62), 5, 6, 7]
    again = folder.path / "again.json"
    again.write_bytes(sums_bytes([ShareSums(9, exact)] * 2))
    assert [(one.elements, one.exact.tolist()) for one in read_sums(again, job)] == [(9, exact.tolist())] * 2


def test_sums_that_no_values_have_are_refused(folder: JobFolder, tmp_path: Path) -> None:
    exact = new_exact_sums()
    exact[1075, 0] = 1  # as if there were values, and no squares of them
    path = tmp_path / "sums.json"
    path.write_bytes(sums_bytes([ShareSums(2, exact)] * 2))
    with pytest.raises(InputInvalid, match="has sums that no values have"):
        read_sums(path, folder.job)


def test_sums_of_shares_are_added_exactly(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = new_exact_sums()
    exact[1000, 2] = 2**63 - 1  # of squares: twice that does not fit into 64 bits
    sums = (ShareSums(8, exact),) * 2
    monkeypatch.setattr("noisytune_cli.commands.work.read_sums", lambda path, job: sums)
    _stds.cache_clear()
    squares = 2 * (2**63 - 1) << 81 + 2 * 1000
    expected = nearest_sqrt(Fraction(squares) / Fraction(2) ** (2 * 1075), 16 - 1)
    assert _stds(folder) == dict.fromkeys(folder.job.strengths, expected)
    _stds.cache_clear()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))


def with_leaf(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(document))
    place = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return copy


@pytest.mark.parametrize("kind", READERS)
def test_whatever_stands_there_is_read_or_refused(kind: str, folder: JobFolder, tmp_path: Path) -> None:
    place, read = READERS[kind]
    content = place(folder).read_bytes()
    document = json.loads(content)
    choose = random.Random(kind)
    changed = tmp_path / "changed.json"
    refused = 0
    wrong = (None, True, -1, 0.5, 1e400, 2**70, "", "../x", "\0", "\ud800", [], {}, [[]], [None], {"a": 1})
    paths = [path for path in leaves(document) if path]
    for path in choose.sample(paths, min(len(paths), 120)):
        for value in choose.sample(wrong, 3):
            text = json.dumps(with_leaf(document, path, value), ensure_ascii=True)
            changed.write_text(text)
            refused += is_refused(read, folder, changed)
    for _ in range(200):
        cut = bytearray(content)
        for _ in range(choose.randint(1, 3)):
            at = choose.randrange(len(cut))
            cut[at : at + choose.randint(0, 3)] = choose.randbytes(choose.randint(0, 3))
        changed.write_bytes(cut)
        refused += is_refused(read, folder, changed)
    assert refused > 300


def is_refused(read: Callable[[JobFolder, Path], Any], folder: JobFolder, path: Path) -> bool:
    """Read a file: InputInvalid that names it, or it is read; anything else fails the test."""
    refusal = None
    try:
        read(folder, path)
    except InputInvalid as error:
        refusal = error
    assert refusal is None or (refusal.path, refusal.what) == (str(path), "cannot use the job")
    return refusal is not None


def test_an_output_is_a_path_or_an_address(folder: JobFolder, tmp_path: Path) -> None:
    document = json.loads((folder.path / "plan.json").read_text())
    changed = tmp_path / "changed.json"
    good = ["s3://b", "gs://b/a key/é%20#+&.x", "az://b/..x/y.."]
    bad = [
        "s3://",
        "s3:///x",
        "s3://b/../x",
        "s3://b/x/.",
        "s3://b//x",
        "s3://b/x?y",
        "s3://u:p@b/x",
        "s3://b/\t",
    ]
    for path in (*good, *bad):
        changed.write_text(json.dumps(with_leaf(document, ("outputs", 0, "path"), path)))
        assert is_refused(read_plan, folder, changed) == (path in bad), path
    for path in good:
        assert Address(path) == path
    for path in bad:
        with pytest.raises(UsageError):
            Address(path)
