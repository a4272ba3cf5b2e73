"""Renames that replace nothing and can be undone, also where the file system cannot promise that itself.

Where it has no such rename (NFS, FUSE, old kernels), a name is claimed first: a file's by a link, a
directory's by an empty one. Every step of publishing leaves what undoes it, to be run backwards if a
later one fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from noisytune_cli.checkpoint.formats import _system as system
from noisytune_cli.output import staging

#: What undoes the steps of publishing, in the order of the steps.
Steps = list[Callable[[], None]]

#: What a file system answers that has no such rename (NFS, FUSE, old kernels).
_NO_SUCH_RENAME = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def undoing() -> Iterator[Steps]:
    """Yield a list for what undoes each step; where the block fails, run it backwards.

    One that fails ends it: what comes before it (an old manifest) must not lie beside what stays (new
    weights).
    """
    steps: Steps = []
    try:
        yield steps
    except BaseException:
        for step in reversed(steps):
            step()
        raise


def rename_directory(source: Path, target: Path) -> None:
    """Rename a directory; EEXIST or ENOTEMPTY where there is more than an empty one."""
    try:
        system.rename_without_replacing(str(source), str(target))
    except OSError as error:
        if error.errno not in _NO_SUCH_RENAME:
            raise
        # Making the directory claims the name; renaming over an empty directory is atomic.
        os.mkdir(target, 0o777)
        with undoing() as undo:
            undo.append(partial(os.rmdir, target))
            os.rename(source, target)


def rename_file(source: Path, target: Path) -> None:
    """Rename a file; EEXIST where the target exists."""
    try:
        system.rename_without_replacing(str(source), str(target))
    except OSError as error:
        if error.errno not in _NO_SUCH_RENAME:
            raise
        os.link(source, target)
        # One that stays goes with the staging directory.
        with contextlib.suppress(OSError):
            os.unlink(source)


def rename_back(target: Path, source: Path) -> None:
    """Undo a rename, or the half of it that was done."""
    if os.path.lexists(source):  # still there as another name of the same file: a rename would do nothing
        os.unlink(target)
    else:
        os.rename(target, source)


def rename_any(source: Path, target: Path) -> None:
    """Rename a file or a directory that way."""
    (rename_directory if source.is_dir() else rename_file)(source, target)


def swap(first: Path, second: Path) -> None:
    """Exchange two names; what the second one stood for bears the first one's afterwards."""
    try:
        system.exchange(str(first), str(second))
    except OSError as error:
        if error.errno not in _NO_SUCH_RENAME:
            raise
        aside = first.with_name(first.name + staging.ASIDE)
        with undoing() as undo:
            # A file keeps its name meanwhile; a directory cannot: the next run puts it back if we end here.
            (os.rename if second.is_dir() else os.link)(second, aside)
            undo.append(partial(os.rename, aside, second))
            os.rename(first, second)
            undo.append(partial(os.rename, second, first))
            # Somebody may have removed it: then there is nothing to keep.
            with contextlib.suppress(FileNotFoundError):
                os.rename(aside, first)
