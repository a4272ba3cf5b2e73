"""What output takes of the system: bytes and files on its file system, and descriptors.

Asked before any weight is read, so that what cannot be finished is not begun.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

from noisytune_cli.checkpoint.address import Address, Place
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.errors import ResourceExhausted, unwritable
from noisytune_cli.output.convert import OutputFile
from noisytune_cli.records import Plan

#: Descriptors that are open beside those of the weight files.
_BESIDE = 64

#: Room for the manifest in the check for space: a fixed part, that of each tensor, and of each part of one.
_MANIFEST_BYTES, _MANIFEST_BYTES_A_TENSOR, _MANIFEST_BYTES_A_PART = 4096, 1024, 512


def check_space(outputs: Sequence[Place], nbytes: int, files: int) -> None:
    """Raise ResourceExhausted unless `nbytes` in `files` new files fit where each of `outputs` will be.

    What goes to one file system is added up.
    """
    for on_one in _by_device(outputs).values():
        _check_space_of(on_one, nbytes * len(on_one), files * len(on_one))


def check_space_to_fetch(folder: Path, fetched: int, outputs: Sequence[Place], nbytes: int) -> None:
    """Raise ResourceExhausted unless `nbytes` fit for each output once `fetched` bytes are in `folder`."""
    found = _by_device(outputs)
    shared = next(iter(_by_device([folder])))
    for device, on_one in found.items():
        beside = fetched if device == shared else 0
        _check_space_of(on_one, nbytes * len(on_one) + beside, len(on_one), with_source=beside > 0)


def _by_device(outputs: Sequence[Place]) -> dict[int, list[Place]]:
    """Return outputs by the file system that they will be on."""
    together: dict[int, list[Place]] = {}
    for output in outputs:
        try:
            together.setdefault(os.stat(_nearest(output)).st_dev, []).append(output)
        except OSError as error:
            raise unwritable(error, output) from error
    return together


def check_descriptors(files: int) -> None:
    """Make sure that so many files can be open at once, raising the soft limit where it has to be."""
    count = _BESIDE + files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or count <= soft:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ResourceExhausted(
            "too many open files",
            why=f"{count:,} are needed at once, and the limit is {hard:,}; nothing was written",
            next_step="Ask for less at once (shorter lists), or raise the limit (ulimit -Hn)",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _nearest(output: Place) -> Path:
    """Return the output, or the nearest folder above it that there is; where it is staged for a store."""
    if isinstance(output, Address):
        from tempfile import gettempdir

        return Path(gettempdir())
    return next(p for p in (output, *output.parents) if p.is_dir())


def free_bytes(output: Place) -> int:
    """Return how many bytes are free where an output will be."""
    try:
        status = os.statvfs(_nearest(output))
    except OSError as error:
        raise unwritable(error, output) from error
    return status.f_bavail * status.f_frsize


def _check_space_of(outputs: Sequence[Place], nbytes: int, files: int, *, with_source: bool = False) -> None:
    """Raise ResourceExhausted unless all that `outputs`, on one file system, need in all is free there.

    That is `with_source` where what is still to be fetched will lie there too.
    """
    try:
        status = os.statvfs(_nearest(outputs[0]))
    except OSError as error:
        raise unwritable(error, outputs[0]) from error
    free = status.f_bavail * status.f_frsize
    beside = [f"{len(outputs) - 1} more outputs"] if len(outputs) > 1 else []
    beside += ["the source, which is fetched to the same disk,"] if with_source else []
    needs = f"with {' and '.join(beside)} it needs" if beside else "it needs"
    if nbytes > free:
        why = f"{needs} {nbytes:,} bytes and {free:,} are free"
    elif status.f_files and files > status.f_favail:
        why = f"{needs} {files:,} files and {status.f_favail:,} more can be made"
    else:
        return
    next_step = "Free space or choose another place with -o, then run again"
    if isinstance(outputs[0], Address):
        why = f"before it is sent, {why}"
        next_step = "Free space, or set TMPDIR to a folder that has it, then run again"
    raise ResourceExhausted(
        "not enough space", path=outputs[0], why=f"{why}; nothing was written", next_step=next_step
    )


def check_room(
    source: Checkpoint,
    files: Sequence[OutputFile],
    plan: Plan,
    outputs: Sequence[Place],
    *,
    recipe_only: bool,
) -> None:
    """Raise ResourceExhausted unless there is room for all outputs, and to open their files at once."""
    held = len(source.weight_files)
    written = 0 if recipe_only else len(files) or held
    if recipe_only:
        check_space(outputs, manifest_bytes(plan), 1)
    else:
        check_space(outputs, needed_bytes(source, plan, files), written + len(source.others) + 1)
    check_descriptors(held + len(outputs) * (written + 1))


def needed_bytes(source: Checkpoint, plan: Plan, files: Sequence[OutputFile] = ()) -> int:
    """Return how many bytes an output of this source takes, its manifest included (an estimate)."""
    return copied_bytes(source, files) + manifest_bytes(plan)


def copied_bytes(source: Checkpoint, files: Sequence[OutputFile] = ()) -> int:
    """Return how many bytes the weights and the other files of an output of this source take."""
    weights = sum(file.size for file in files or source.sources)
    return weights + sum(source.seen[name].st_size for name in source.others)


def manifest_bytes(plan: Plan) -> int:
    """Return how many bytes the manifest of a plan takes (an estimate)."""
    parts = sum(len(step.parts) for step in plan.steps)
    return _MANIFEST_BYTES + _MANIFEST_BYTES_A_TENSOR * len(plan.steps) + _MANIFEST_BYTES_A_PART * parts
