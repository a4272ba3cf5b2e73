"""perturb by shares: plan, shares on an engine, finish; the same command again goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from noisytune_cli.checkpoint.address import as_place
from noisytune_cli.commands.engines import Answer, Later, Report, Task, complete, load
from noisytune_cli.commands.finish import finish, published_all
from noisytune_cli.commands.perturb import Perturbed
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.request import SHARE_BYTES, Request
from noisytune_cli.commands.work import add_up_share, begin_share
from noisytune_cli.engine.threads import Progress, default_threads
from noisytune_cli.engine.walk import Walk
from noisytune_cli.errors import NoisytuneError, exhausted, to_plain
from noisytune_cli.noise.devices import open_device
from noisytune_cli.output.job_folder import open_folder
from noisytune_cli.records import Combination


def perturb_shares(
    request: Request,
    out: str,
    wanted: Sequence[Combination],
    *,
    engine: str,
    address: str | None = None,
    share_bytes: int = SHARE_BYTES,
    recipe_only: bool = False,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    direct: bool | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> tuple[Perturbed, ...]:
    """Write what `perturb_each` would, its shares done by an engine; raises what these do."""
    start = load(engine, address)
    planned = plan_job(
        request,
        out,
        wanted,
        recipe_only=recipe_only,
        overwrite=overwrite,
        overwrite_changed=overwrite_changed,
        share_bytes=share_bytes,
    )
    folder = planned.folder
    job = folder.job
    to_sum, left = folder.lacking_sums, folder.left
    common = {"job": os.fspath(folder.path), "device": device, "mmap": request.mmap, "direct": direct}
    if threads is not None:
        common["threads"] = threads

    def tasks(shares: Sequence[int], times: int, *, sums: bool) -> list[dict[str, Any]]:
        return [
            {**common, "share": share, "sums": sums, "nbytes": job.shares[share].nbytes * times}
            for share in shares
        ]

    first, second = tasks(to_sum, 1, sums=True), tasks(left, len(job.outputs), sums=False)
    warnings = list(planned.warnings)
    try:
        if first or second:
            with (
                start(address, threads) as run,
                progress(sum(task["nbytes"] for task in (*first, *second))) as report,
            ):
                complete(run, do_task, first, report)
                for answer in complete(run, do_task, second, report):
                    warnings += answer["warnings"]
        made = finish(out, threads=threads, progress=progress)
    except NoisytuneError as error:
        if folder.is_there:
            raise
        made = published_all(folder, error)  # another, which was given the same, has done and finished it
    return tuple(replace(one, warnings=tuple(dict.fromkeys((*warnings, *one.warnings)))) for one in made)


def do_task(task: Task, report: Report) -> Answer | Later:
    """Do one share, wherever this is called: plain data in and out, with what failed as data too."""
    try:
        leave = _begin(task, report)
    except _EXPECTED as error:
        return _failed(error)

    def rest() -> Answer:
        try:
            return {"error": None, "warnings": list(leave())}
        except _EXPECTED as error:
            return _failed(error)

    return rest


_EXPECTED = (NoisytuneError, MemoryError, OSError)


def _failed(error: NoisytuneError | MemoryError | OSError) -> Answer:
    return {"error": to_plain(error if isinstance(error, NoisytuneError) else exhausted(error))}


def _begin(task: Task, report: Report) -> Callable[[], tuple[str, ...]]:
    """Begin a share unless it is done; return what does the rest, and returns what is to be told."""
    place, share = task["job"], task["share"]
    folder = open_folder(as_place(place))
    device, threads = open_device(task["device"]), task.get("threads") or default_threads()
    walk = Walk(device, threads, progress=report, direct=task["direct"])
    if not task["sums"] and not folder.is_done(share):
        return begin_share(folder, share, walk, mmap=task["mmap"])
    if task["sums"] and not folder.has_sums(share):
        add_up_share(folder, share, walk, mmap=task["mmap"])
    return tuple
