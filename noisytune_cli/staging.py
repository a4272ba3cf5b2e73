"""The staging directory: where output grows until it is whole.

It is a hidden sibling of the output (or lies in it, where the output is an existing empty directory), so
publishing is a rename on one file system. Its name tells which output it belongs to, and it is locked
(flock) while its run lives: a later run to the same output that can take the lock knows it for dead,
removes it and says so; one that cannot, refuses to start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from pathlib import Path

from noisytune_cli.errors import OutputUnsafe, unwritable

#: What every staging directory's name begins with.
PREFIX = ".noisytune-"

_IN_USE = {errno.EWOULDBLOCK, errno.EACCES}


def prefix_for(output: Path) -> str:
    """Return what the names of all staging directories for an output begin with."""
    return f"{PREFIX}{hashlib.blake2b(os.fsencode(output.name), digest_size=6).hexdigest()}-"


def create(place: Path, output: Path) -> tuple[Path, int]:
    """Make and lock a staging directory in `place`; return it and the descriptor that holds the lock."""
    while True:
        path = place / (prefix_for(output) + secrets.token_hex(4))
        try:
            os.mkdir(path, 0o777)
        except FileExistsError:
            continue
        except OSError as error:
            raise unwritable(error, place) from error
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # taken for dead between the two calls; nothing was in it
        except OSError as error:
            with contextlib.suppress(OSError):
                os.rmdir(path)
            raise unwritable(error, place) from error
        if _lock(fd) and _is(path, fd):
            return path, fd
        os.close(fd)  # another run is just removing it


def clear_dead(place: Path, output: Path) -> tuple[str, ...]:
    """Remove what killed runs to this output left in `place`, and return the names.

    Raises OutputUnsafe where one of them is alive.
    """
    prefix = prefix_for(output)
    try:
        names = sorted(name for name in os.listdir(place) if name.startswith(prefix))
    except OSError as error:
        raise unwritable(error, place) from error
    for name in names:
        _remove_dead(place / name, output)
    return tuple(names)


def _remove_dead(path: Path, output: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise unwritable(error, path) from error
    try:
        if not _lock(fd):
            raise OutputUnsafe(
                "the output is in use",
                path=output,
                why=f"another run is writing it (in {path.name})",
                next_step="Wait for that run to end, or choose another output with -o",
            )
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise unwritable(error, path) from error
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Take the lock of a directory; False where its owner lives."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IN_USE:
            return False
        # A file system without locks: our own directory is safe by its random name, and another's is
        # taken for alive, which loses nothing.
        return error.errno in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS} and not os.listdir(fd)
    return True


def _is(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False
