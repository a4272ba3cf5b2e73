"""plan: a run of `perturb` written down as a job, whose shares any number of processes can do.

Everything is decided here, once: ties by equal bytes, buffers, what is left out. A share needs nothing of the
others then, since the noise is a function of seed, name and index. The plan is deterministic, so whoever
plans the same job joins it.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from noisytune_cli.checkpoint.address import is_address
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.find import comes_from_hub
from noisytune_cli.checkpoint.layout import METADATA
from noisytune_cli.commands.perturb import Prepared, check_outputs, outs_of, prepare
from noisytune_cli.commands.replaced import check_before_download, refuse_planned
from noisytune_cli.commands.request import SHARE_BYTES, Request
from noisytune_cli.commands.work import stamp_of
from noisytune_cli.commands.write import record_source
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.escape import is_text
from noisytune_cli.manifest.job import Beside, Job, JobOutput, Share
from noisytune_cli.manifest.share import ShareSteps, steps_bytes
from noisytune_cli.output.destination import find_place
from noisytune_cli.output.job_folder import (
    JobFolder,
    create_job,
    is_planned,
    job_path,
    open_finished,
)
from noisytune_cli.records import Combination
from noisytune_cli.version import __version__


@dataclass(frozen=True)
class PlannedJob:
    """A job that is there: whether it was before (`joined`), and what the user should know."""

    folder: JobFolder
    joined: bool
    warnings: tuple[str, ...]


def plan_job(
    request: Request,
    out: str,
    wanted: Sequence[Combination],
    *,
    recipe_only: bool = False,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    share_bytes: int = SHARE_BYTES,
) -> PlannedJob:
    """Write the job of what `perturb_each` would do, or join the same one.

    `out` is how the user names the outputs, with placeholders where there are several; `work` and `finish`
    find the job by it. Raises what `perturb_each` does before it reads weights, OutputUnsafe for another job
    there, InputInvalid for weights that are no plain files.
    """
    begins = not is_planned(out)
    if begins:
        with contextlib.suppress(InputInvalid):  # another version's, which stays in nobody's way
            if (finished := open_finished(out)) is not None:
                finished.remove()
        check_before_download(
            request.source,
            outs_of(wanted),
            recipe_only=recipe_only,
            overwrite=overwrite,
            overwrite_changed=overwrite_changed,
        )
    # What decides is a few values of each tensor: no worker needs the weights here.
    with request.open(few_values=is_address(request.source)) as source:
        _refuse_folders(source)
        prepared = prepare(request, source, wanted)
        if begins:  # else it is asked when the outputs are published
            outputs = check_outputs(
                prepared,
                outs_of(wanted),
                recipe_only=recipe_only,
                overwrite=overwrite,
                overwrite_changed=overwrite_changed,
                in_shares=True,
            )
            refuse_planned(outputs, own=job_path(out))
        prepared = prepared.settled()
        paths = [find_place(one, source, prepared.files, recipe_only=recipe_only) for one in outs_of(wanted)]

        at_hub = comes_from_hub(request.source)

        def make(shares: tuple[Share, ...]) -> Job:
            return Job(
                version=__version__,
                source=record_source(source),
                asked=request.source if source.remote is not None else _spelled(_absolute(request.source)),
                is_file=source.single_file,
                weights=request.weights,
                components=request.components,
                commit=source.revision if at_hub else None,
                again=request.again,
                follow_links=request.follow_links,
                card=request.card,
                recipe_only=recipe_only,
                overwrite=overwrite,
                overwrite_changed=overwrite_changed,
                conversion=request.conversion,
                outputs=tuple(
                    JobOutput(_spelled(path), replace(plan.noise, splits=()))
                    for path, plan in zip(paths, prepared.plans, strict=True)
                ),
                stamps=tuple(stamp_of(source, file.name, file.path) for file in source.sources),
                others=tuple(
                    Beside(name, source.seen[name].st_size, stamp_of(source, name, source.root / name))
                    for name in source.others
                ),
                left_out=source.left_out,
                ties=prepared.plans[0].ties,
                shares=shares,
            )

        folder, joined = create_job(out, _shares(prepared, share_bytes), make)
        return PlannedJob(folder, joined, prepared.warnings)


def _absolute(source: str) -> str:
    """Return the absolute path of a source, with links above `..` left for the kernel to follow."""
    path = os.path.join(os.getcwd(), os.path.expanduser(source))
    return path if ".." in path.split("/") else os.path.normpath(path)


def _refuse_folders(source: Checkpoint) -> None:
    """Raise InputInvalid for weights that lie in a folder of chunks, which are not divided."""
    for file in source.sources:
        if posixpath.basename(file.name) == METADATA:
            raise InputInvalid(
                "a job is done in weight files",
                path=file.path,
                why="it is a torch.distributed.checkpoint, whose chunks are read together",
                next_step="Use noisytune perturb, which does it in one run",
            )


def _spelled(path: str | Path) -> str:
    """Return a path as JSON can spell it; UsageError where it cannot."""
    text = os.fspath(path)
    if not is_text(text):
        raise UsageError(
            "a job needs names in UTF-8",
            path=text,
            why="its plan writes them down",
            next_step="Rename it, or use noisytune perturb",
        )
    return text


def _shares(prepared: Prepared, share_bytes: int) -> Iterator[tuple[tuple[str, ...], int, bytes]]:
    """Yield each share: its files, their bytes, and its steps."""
    source = prepared.source
    plans = {plan.noise.lam: plan for plan in prepared.plans}
    by_file: dict[str, list[int]] = {file.name: [] for file in source.sources}
    last: dict[str, int] = {}
    for index, step in enumerate(prepared.plans[0].steps):
        by_file[step.tensor.file].append(index)
        last[step.stream] = index
    groups: list[tuple[list[str], int]] = []
    for file in source.sources:
        if groups and groups[-1][1] + file.size <= share_bytes:
            groups[-1] = ([*groups[-1][0], file.name], groups[-1][1] + file.size)
        else:
            groups.append(([file.name], file.size))
    for names, nbytes in groups:
        chosen = [index for name in names for index in by_file[name]]
        steps = tuple(tuple(plan.steps[index] for index in chosen) for plan in plans.values())
        repeated = frozenset(
            step.tensor.name
            for index, step in zip(chosen, steps[0], strict=True)
            if last[step.stream] != index
        )
        yield tuple(names), nbytes, steps_bytes(ShareSteps(steps, repeated), list(plans))
