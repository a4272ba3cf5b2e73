"""What is at an output's place: what is asked for already, or something that --overwrite may replace?

A README that was edited, and weights that a trainer wrote over those with noise, are not ours to throw away.
The manifest is written last: where no file is younger, by its ctime too, nothing was changed. Else the output
is held against its manifest as `verify` does, which reads all of it once; a copy that was made by other means
is younger, and passes. What was removed is no loss.

With --skip-existing an output stays that a run would make again: its manifest records the same noise on the
same source, whose files are not younger, and the output is as the manifest records it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from noisytune_cli.checkpoint.address import Address, Place, is_address
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.find import comes_from_hub
from noisytune_cli.commands.write import record_source
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, OutputUnsafe, UsageError, unwritable
from noisytune_cli.escape import escape
from noisytune_cli.manifest.write import MANIFEST, manifest_beside
from noisytune_cli.output.destination import check_places_of_download
from noisytune_cli.output.overwrite import Seen, check_folder_replaceable, contents, look_at
from noisytune_cli.output.staging import JOB_PREFIX
from noisytune_cli.reading import is_there
from noisytune_cli.records import Conversion, Manifest, Plan, Receipt
from noisytune_cli.version import __version__

if TYPE_CHECKING:
    from noisytune_cli.manifest.read import RecordedManifest

#: Nanoseconds that a file may have been written to after the manifest without being younger: the clock of a
#: file system moves with the kernel's tick.
_TICK = 10_000_000


def check_before_download(
    source: str,
    outs: Sequence[str],
    *,
    recipe_only: bool = False,
    overwrite: bool = False,
    overwrite_changed: bool = False,
) -> None:
    """Raise what stands against the outputs of a hub's model, before the hub is asked for anything.

    Of one in an object store too, which is asked whether it is a file. Of a local SOURCE nothing is said:
    what is there decides what the outputs are.
    """
    is_file = False
    if is_address(source):
        from noisytune_cli.checkpoint.bucket import is_object  # what is here should not wait for it

        is_file = is_object(source)
    elif not comes_from_hub(source):
        return
    overwrite = overwrite or overwrite_changed
    outputs = check_places_of_download(outs, is_file=is_file, recipe_only=recipe_only, overwrite=overwrite)
    require_unchanged(outputs, insists=overwrite_changed)


def find_made(
    output: Place,
    source: Checkpoint,
    plan: Plan,
    conversion: Conversion | None,
    *,
    with_card: bool,
    recipe_only: bool,
    threads: int | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> RecordedManifest | None:
    """Return the manifest of what is at `output`, if that is what a run would make there; else None."""
    from noisytune_cli.manifest.read import read_manifest

    if isinstance(output, Address):
        raise UsageError(
            "--skip-existing cannot be used",
            path=output,
            why="what is in an object store would have to be fetched to tell whether it is the same",
            next_step="Leave it out: an output that exists is refused, one that is not complete is completed",
        )
    # os.path's, since that of Path raises for a name that is too long for a file.
    in_folder = os.path.isdir(output) and not recipe_only
    path = output / MANIFEST if in_folder else output if recipe_only else manifest_beside(output)
    if not is_there(path):
        return None
    try:
        recorded = read_manifest(path)
    except InputInvalid:
        return None
    manifest = recorded.manifest
    found = (manifest.tool_version, manifest.source, manifest.noise, manifest.conversion)
    if found != (__version__, record_source(source), plan.noise, conversion):
        return None
    if not recorded.is_original:  # this run would write other bytes, and `verify` refuses these
        return None
    if bool(manifest.rewritten) != with_card:
        return None
    if not _is_of(manifest.receipts, plan) or not _knows(manifest, source.others):
        return None
    if not recipe_only and (not is_there(output) or _lacks(output, recorded)):
        return None
    written = path.stat().st_mtime_ns
    # A commit on the hub never changes, and what was fetched from a store is of now.
    files = [] if source.revision is not None or source.remote is not None else _files_read(source)
    if any(file.stat().st_mtime_ns > written for file in files):
        return None
    # Another file that was moved to its place, copied with its times, or is reached by another link or in
    # another folder of that name, is no younger by its mtime.
    ways = (*(file.stat() for file in files), *_ways_to(files, source.root, output))
    is_sure = source.revision is not None or (bool(files) and all(one.st_ctime_ns <= written for one in ways))
    if not is_sure and not _gives(source, recorded, threads, progress):
        return None
    if not recipe_only and _may_have_changed(output) and _what_changed(output, threads, progress):
        return None
    return recorded


def _is_of(receipts: Sequence[Receipt], plan: Plan) -> bool:
    """Tell whether a plan, made from headers, decides as recorded, but for what values decided then."""
    recorded = {receipt.step.tensor.name: receipt for receipt in receipts}
    for step in plan.steps:
        receipt = recorded.get(step.tensor.name)
        if receipt is None or (step.reason is not None and receipt.reason != step.reason):
            return False
        if step.reason is None and receipt.reason == "buffer" and receipt.step.told_by != "values":
            return False
        # The noise that a manifest records does not say how tensors were divided.
        is_copy = step.action == "copy" or receipt.reason in ("buffer", "excluded")
        if not is_copy and receipt.step.parts != step.parts:
            return False
    return len(recorded) == len(plan.steps)


def _knows(manifest: Manifest, others: Sequence[str]) -> bool:
    """Tell whether the run that wrote a manifest saw these files beside the weights, and took no others."""
    taken = {name for name, _ in manifest.copied}
    taken.update(name for _, name, _ in (*manifest.followed, *manifest.rewritten) if name is not None)
    return taken.issubset(others) and taken.union(name for name, _ in manifest.left_out).issuperset(others)


def _files_read(source: Checkpoint) -> list[Path]:
    """Return every file that a run would read."""
    return [source.root / name for name in (*source.weight_files, *source.others)]


def _ways_to(files: Sequence[Path], root: Path, output: Path) -> Iterator[os.stat_result]:
    """Yield the status of what leads to files below `root` and may be another by now: folders, and links.

    A folder that the output lies in too changed when that was put there, and says nothing.
    """
    above = {(one.st_dev, one.st_ino) for one in map(os.stat, output.parents)}
    folders = {root} if files else set()
    folders.update(folder for file in files for folder in (file.parent, Path(os.path.realpath(file)).parent))
    for status in map(os.stat, folders):
        if (status.st_dev, status.st_ino) not in above:
            yield status
    seen, pending = set[Path](), [Path(os.path.abspath(file)) for file in files]
    while pending:
        path = pending.pop()
        for place in (path, *path.parents):
            if place in seen:
                break
            seen.add(place)
            if place.is_symlink():
                yield os.lstat(place)
                pending.append(place.parent / os.readlink(place))


def _gives(source: Checkpoint, recorded: RecordedManifest, threads: int | None, progress: Progress) -> bool:
    """Tell whether a source, read as a whole, is the base of what a manifest records."""
    from noisytune_cli.commands.verify import compare_base, compare_copy  # nearly every source is as it was

    if compare_base(recorded.manifest, source, threads=threads, progress=progress):
        return False
    copied = recorded.manifest.copied
    return not any(compare_copy(source.root / name, name, digest) for name, digest in copied)


def _lacks(output: Path, recorded: RecordedManifest) -> bool:
    """Tell whether a recorded file of a folder is absent."""
    names = (*(file.name for file in recorded.manifest.output_files), *recorded.manifest.others)
    return output.is_dir() and not all(is_there(output / name) for name in names)


def require_unchanged(
    outputs: Sequence[Place],
    *,
    insists: bool,
    threads: int | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> dict[Place, Seen]:
    """Raise OutputUnsafe if a recorded file of an output that is to be replaced is not as recorded.

    They may be replaced but for that (`check_output`). Where the user `insists`, nothing is asked of those.
    Return what there was before: what comes while this reads, and after, is no part of what is replaced.
    """
    here = [output for output in outputs if not isinstance(output, Address)]  # nothing there is replaced
    seen: dict[Place, Seen] = dict.fromkeys(outputs, (None, None)) | {one: look_at(one) for one in here}
    for output in here:
        if not _may_have_changed(output):
            continue
        if output.is_dir():  # added between that check and the look, which nothing would tell
            check_folder_replaceable(output, contents(output))
        if not insists and (what := _what_changed(output, threads, progress)):
            raise OutputUnsafe(
                "the output was changed since noisytune wrote it",
                path=output,
                why=what,
                next_step="Move what is to be kept elsewhere, or pass --overwrite-changed to replace it too",
            )
    return seen


def refuse_planned(outputs: Iterable[Place], own: Place | None = None) -> None:
    """Raise OutputUnsafe where a job will write to one of `outputs`, other than that whose folder is `own`.

    In an object store its claim says so. Of jobs with placeholders those are seen that lie in the folder of
    an output or in the one above.
    """
    here = [output for output in outputs if isinstance(output, Path)]
    jobs = []
    for folder in {above for output in here for above in output.parents[:2]}:
        with contextlib.suppress(OSError):  # it need not be there yet
            jobs += [folder / name for name in os.listdir(folder) if name.startswith(JOB_PREFIX)]
    if not jobs:
        return
    from noisytune_cli.output.job_folder import find_planned  # few folders have one

    if found := find_planned(here, [job for job in jobs if job != own]):
        raise OutputUnsafe(
            "a job is planned for the output",
            path=found[0],
            why=f"{escape(os.fspath(found[1]))} is its folder",
            next_step="Finish it with noisytune work and noisytune finish, remove its folder, or choose "
            "another output with -o",
        )


def _may_have_changed(output: Path) -> bool:
    """Tell whether there is a manifest, and a file that is younger as far as the clock tells."""
    try:
        mode = os.lstat(output).st_mode
        manifest = os.lstat(output / MANIFEST if stat.S_ISDIR(mode) else manifest_beside(output))
        files = _files(output) if stat.S_ISDIR(mode) else iter([os.lstat(output)])
        return any(
            file.st_mtime_ns + _TICK > manifest.st_mtime_ns or file.st_ctime_ns > manifest.st_ctime_ns
            for file in files
            if file.st_ino != manifest.st_ino
        )
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unwritable(error, output) from error


def _files(folder: Path) -> Iterator[os.stat_result]:
    for name in os.listdir(folder):
        status = os.lstat(folder / name)
        if stat.S_ISDIR(status.st_mode):
            yield from _files(folder / name)
        else:
            yield status


def _what_changed(output: Path, threads: int | None, progress: Progress) -> str | None:
    """Say what of an output is not as its manifest records it; None where all is, or nothing can be told."""
    # Nearly every output is new, or as it was, and should not wait for these to be imported.
    from noisytune_cli.commands.verify import verify
    from noisytune_cli.manifest.locate import place_of

    try:
        place = place_of(os.fspath(output))
        found = verify(os.fspath(output), threads=threads, progress=progress).mismatches
    except InputInvalid:  # no manifest that says anything: `check_output` has let that pass
        return None
    except (InputUnreadable, Mismatch) as error:
        return error.why
    changed = [one for one in found if os.path.lexists(place.path(one.file))]
    if not changed:
        return None
    names = sorted({one.file for one in changed})
    more = f", and so are {len(names) - 1:,} more files" if len(names) > 1 else ""
    first = next(one for one in changed if one.file == names[0])
    return f"{escape(first.file)} is not as its manifest records it ({first.what}){more}"
