"""Jobs of a small sharded checkpoint: planned, worked on and finished; and the single run beside them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from checkpoints import Tensor, numbers, save_sharded, weights

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands.distribute import perturb_shares
from noisytune_cli.commands.finish import finish
from noisytune_cli.commands.perturb import Perturbed, perturb_each
from noisytune_cli.commands.plan import PlannedJob, plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.work import work
from noisytune_cli.output import job_folder
from noisytune_cli.records import Conversion, NoiseSpec

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


def sharded_source(tmp_path: Path) -> Path:
    """Write a checkpoint of four shards, with what lies beside weights."""
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
    """Return what an output is, by name: a folder's files, or a file of weights and its manifest."""
    if root.is_file():
        beside = Path(f"{root}.noisytune.json")
        return {"weights": root.read_bytes(), "manifest": beside.read_bytes()}
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


Asked = dict[str, object]


def request(source: Path, asked: Asked, conversion: Conversion | None = None, card: bool = False) -> Request:
    """Return what is asked of a source: the fields of its noise, and more."""
    return Request(os.fspath(source), NoiseSpec(**asked), conversion, card=card)  # type: ignore[arg-type]


def plan(asked: Request, out: str, given: dict[str, str], **options: object) -> PlannedJob:
    """Plan a job with a share for each file; `given` are options of the command line."""
    wanted = combine(out, default=0.15, **{"seed": "0", **given})  # type: ignore[arg-type]
    return plan_job(asked, out, wanted, share_bytes=1, **options)  # type: ignore[arg-type]


def single(asked: Request, out: str, given: dict[str, str], **options: object) -> list[Path]:
    """Return the outputs of the single run of what `plan` plans."""
    wanted = combine(out, default=0.15, **{"seed": "0", **given})  # type: ignore[arg-type]
    return [one.output for one in perturb_each(asked, wanted, **options)]  # type: ignore[arg-type]


def work_and_finish(out: str) -> None:
    """Do what is left of a job."""
    work(out)
    finish(out)


def in_shares(source: Path, out: str, seed: str = "0", *, overwrite: bool = False) -> tuple[Perturbed, ...]:
    """Return the outputs of a run in shares, from plan to end."""
    wanted = combine(out, seed=seed, default=0.15)
    asked = Request(os.fspath(source), NoiseSpec(seed=wanted[0].seed))
    return perturb_shares(asked, out, wanted, engine="local", share_bytes=1, overwrite=overwrite)


def change_a_byte(source: Path) -> None:
    """Change the last weight of the second shard."""
    path = sorted(source.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
