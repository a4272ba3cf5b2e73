"""The staging directory: where output grows until it is whole.

It is a hidden sibling of the output (or lies in it, where the output is an existing empty directory), so
publishing is a rename on one file system. Its name tells which output it belongs to, and it is locked
(flock) while its run lives: a later run to the same output that can take the lock knows it for dead,
removes it and says so; one that cannot, refuses to start.

What is moved out of a staging directory one by one (into a directory that was there, or a file before
its manifest) is announced in it first, so that a later run knows what a killed one had moved, and removes
that too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from noisytune_cli.errors import OutputUnsafe, unwritable

#: What every staging directory's name begins with.
PREFIX = ".noisytune-"

#: What follows a staging directory's name in that of an old output which is just being replaced.
ASIDE = "-replaced"

#: In a staging directory: the names about to be moved out of it.
_MOVES = f"{PREFIX}moves"

_IN_USE = {errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}

#: How often to try another name before giving up.
_ATTEMPTS = 100


def prefix_for(output: Path) -> str:
    """Return what the names of all staging directories for an output begin with."""
    return f"{PREFIX}{hashlib.blake2b(os.fsencode(output.name), digest_size=6).hexdigest()}-"


def create(place: Path, output: Path) -> tuple[Path, int]:
    """Make and lock a staging directory in `place`; return it and the descriptor that holds the lock.

    A name may be taken, or taken for dead by another run before it is locked; then another is tried, a few
    times.
    """
    for _ in range(_ATTEMPTS):
        path = place / (prefix_for(output) + secrets.token_hex(4))
        fd = None
        try:
            os.mkdir(path, 0o777)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _lock(fd) and _is(path, fd):
                return path, fd
            _drop(path, fd)  # another run is just removing it
        except (FileExistsError, FileNotFoundError):
            _drop(None, fd)
        except OSError as error:
            _drop(path, fd)
            raise unwritable(error, place) from error
    raise OutputUnsafe(
        "the output is in use",
        path=output,
        why=f"another run removed or locked each of {_ATTEMPTS} staging directories at once",
        next_step="Wait until no other run writes there, or choose another output with -o",
    )


def _drop(path: Path | None, fd: int | None) -> None:
    """Remove an empty directory just made, and close it, as far as that goes."""
    with contextlib.suppress(OSError):
        if path is not None:
            os.rmdir(path)
    with contextlib.suppress(OSError):
        if fd is not None:
            os.close(fd)


def announce_moves(stage: Path, names: Sequence[str], *, manifest: str) -> None:
    """Write down, durably, what will be moved from `stage` into the directory it lies in, before `manifest`.

    Names come with their inodes, which a move keeps: what somebody else puts there later is not ours.
    """
    inodes = {name: os.lstat(stage / name).st_ino for name in names}
    with open(stage / _MOVES, "x", encoding="ascii") as file:
        json.dump({"manifest": manifest, "inodes": inodes}, file)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(stage)


def remains(place: Path, output: Path) -> set[str]:
    """Return the names in `place` that are there only because a run to this output goes on or was killed."""
    stages = {name for name in os.listdir(place) if name.startswith(prefix_for(output))}
    return stages.union(*(_moved(place / stage) for stage in stages))


def sync_directory(path: Path) -> None:
    """Flush a directory: the names in it are durable then."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def keeps(staged: Path, there: Path) -> bool:
    """Tell whether `there` is a regular file of the bytes of `staged`, and flush it if so: it may stay."""
    try:
        status = os.lstat(there)
        if not stat.S_ISREG(status.st_mode) or status.st_size != staged.stat().st_size:
            return False
        content = there.read_bytes()
    except OSError:
        return False
    if content != staged.read_bytes():
        return False
    with open(there, "rb") as kept:
        os.fsync(kept.fileno())
    return True


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
        if name.endswith(ASIDE) and not os.path.lexists(output):
            _put_back(place / name, output)
        else:
            _remove_dead(place / name, output)
    return tuple(names)


def _put_back(path: Path, output: Path) -> None:
    """Give an old output its name back: its replacement never got there."""
    try:
        os.rename(path, output)
        sync_directory(output.parent)
    except OSError as error:
        raise unwritable(error, output) from error


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
        for name in _moved(path):
            moved = path.parent / name
            if moved.is_dir() and not moved.is_symlink():
                shutil.rmtree(moved)
            else:
                moved.unlink()
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise unwritable(error, path) from error
    finally:
        os.close(fd)


def _moved(stage: Path) -> list[str]:
    """Return the names that an unfinished run had moved out of `stage`."""
    try:
        moves = json.loads((stage / _MOVES).read_bytes())
        manifest, inodes = moves["manifest"], moves["inodes"].items()
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
        return []  # nothing is moved before the announcement is whole
    if not (stage / manifest).exists():
        return []  # the manifest is moved last, so the output is complete
    return [
        name
        for name, inode in inodes
        if os.path.basename(name) == name not in ("", ".", "..") and _is_from(stage.parent / name, inode)
    ]


def _is_from(target: Path, inode: int) -> bool:
    """Tell whether `target` is what a move of `inode` makes, finished or not, and nobody else's."""
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return False
    # Without RENAME_NOREPLACE a directory's name is claimed first, by an empty one.
    return status.st_ino == inode or (stat.S_ISDIR(status.st_mode) and not os.listdir(target))


def _lock(fd: int) -> bool:
    """Take the lock of a directory; False where its owner lives, OSError where nobody can tell."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IN_USE:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        # A file system without locks: our own directory is safe by its random name, and another's is
        # taken for alive, which loses nothing.
        return not os.listdir(fd)
    return True


def _is(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False
