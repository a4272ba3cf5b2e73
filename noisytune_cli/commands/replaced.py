"""Is the output that --overwrite replaces still what noisytune wrote?

A README that was edited, and weights that a trainer wrote over those with noise, are not ours to throw away.
The manifest is written last: where no file is younger, by its ctime too, nothing was changed. Else the output
is held against its manifest as `verify` does, which reads all of it once; a copy that was made by other means
is younger, and passes. What was removed is no loss.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from noisytune_cli.checkpoint.find import comes_from_hub
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, OutputUnsafe, unwritable
from noisytune_cli.escape import escape
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX
from noisytune_cli.output.destination import check_places_of_download

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

    Of a local SOURCE nothing is said: what is there decides what the outputs are.
    """
    if comes_from_hub(source):
        overwrite = overwrite or overwrite_changed
        outputs = check_places_of_download(outs, recipe_only=recipe_only, overwrite=overwrite)
        require_unchanged(outputs, insists=overwrite_changed)


def require_unchanged(
    outputs: Sequence[Path],
    *,
    insists: bool,
    threads: int | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> None:
    """Raise OutputUnsafe if a recorded file of an output that is to be replaced is not as recorded.

    They may be replaced but for that (`check_output`). Where the user `insists`, nothing is asked.
    """
    for output in () if insists else outputs:
        if _may_have_changed(output) and (what := _what_changed(output, threads, progress)):
            raise OutputUnsafe(
                "the output was changed since noisytune wrote it",
                path=output,
                why=what,
                next_step="Move what is to be kept elsewhere, or pass --overwrite-changed to replace it too",
            )


def _may_have_changed(output: Path) -> bool:
    """Tell whether there is a manifest, and a file that is younger as far as the clock tells."""
    try:
        mode = os.lstat(output).st_mode
        beside = output.with_name(output.name + MANIFEST_SUFFIX)
        manifest = os.lstat(output / MANIFEST if stat.S_ISDIR(mode) else beside)
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
