"""The staging directory: where output grows until it is whole.

It is a hidden sibling of the output (or lies in it, where the output is an existing empty directory), so
publishing is a rename on one file system. Its name tells which output it belongs to, and it is locked
(flock) while its run lives: a later run to the same output that can take the lock knows it for dead,
removes it and says so; one that cannot, refuses to start. A lock is a directory's, not a name's: an old
output, which bears such a name until it is removed, is locked before it gets it.

A lock says nothing across hosts and mounts, and a name nothing of who gave it. So the name also tells the
host, its boot and the mount, and what is not certainly of this user, host and mount is named and left alone.

What is moved out of a staging directory one by one (into a directory that was there, or a file before
its manifest) is announced in it first, so that a later run knows what a killed one had moved, and removes
that too. It knows them by inode, size and times: one that was changed since, or may be another's, is kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from noisytune_cli.errors import NoisytuneError, OutputUnsafe, unwritable
from noisytune_cli.reading import Document, JsonFault, JsonLimits

#: What every staging directory's name begins with.
PREFIX = ".noisytune-"

#: What the name of a job's folder begins with.
JOB_PREFIX = f"{PREFIX}job-"

#: What follows a staging directory's name in that of an old output which is just being replaced.
ASIDE = "-replaced"

#: In a staging directory: the names about to be moved out of it.
_MOVES = f"{PREFIX}moves"

#: What such an announcement may have at most: bytes, and files.
_MOST_BYTES, _MOST_MOVED = 4 << 20, 30_000

#: How much later than its directory's time a file's may be that was renamed out of it, in nanoseconds.
_SAME_RENAME = 20_000_000

#: What follows an output's prefix in a staging directory's name: host, boot, mount, and what is random.
_TAGS = re.compile(rf"([0-9a-f]{{8}})([0-9a-f]{{8}})([0-9a-f]{{8}})-[0-9a-f]{{8}}(?:{ASIDE})?")

#: Where Linux tells this machine, and this run of its kernel.
_HOST, _BOOT = Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")

_IN_USE = {errno.EWOULDBLOCK, errno.EACCES}
_UNDELETABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTEMPTY}
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
        path, fd = place / os.urandom(8).hex(), None  # not there
        try:
            path = place / f"{prefix_for(output)}{''.join(_tags(place))}-{os.urandom(4).hex()}"
            os.mkdir(path, 0o777)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # Empty, or somebody else's has just taken the name.
            if _lock(fd) and is_at(path, fd) and not os.listdir(fd):
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


def hold(path: Path, output: Path, *, replaced: bool = False) -> int:
    """Open and lock a directory of this output; return the descriptor that holds the lock.

    It is a staging directory, or the old output that is to be `replaced`. Raises OutputUnsafe where another
    run has it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # By the time it is locked, another run may have put its own output in the old one's place.
        if not _lock(fd, replaced=replaced) or (replaced and not is_at(path, fd)):
            raise OutputUnsafe(
                "the output is in use",
                path=output,
                why=f"another run is {'replacing' if replaced else 'writing'} it (in {path.name})",
                next_step="Wait for that run to end, or choose another output with -o",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def announce_moves(stage: Path, names: Sequence[str], *, manifest: str) -> None:
    """Write down, durably, what will be moved from `stage` into the directory it lies in, before `manifest`.

    Every file comes with what a move keeps of it: what somebody else puts there later is not ours.
    """
    moved = []
    for name in _files(stage, names):
        status = os.lstat(stage / name)
        times = {"mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns}
        moved.append({"name": name, "inode": status.st_ino, "size": status.st_size, **times})
    with open(stage / _MOVES, "x", encoding="ascii") as file:
        json.dump({"manifest": manifest, "names": names, "moved": moved}, file)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(stage)


def _files(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield the files among `names` in a folder, and those in the folders among them."""
    for name in names:
        if stat.S_ISDIR(os.lstat(folder / name).st_mode):
            yield from _files(folder, [f"{name}/{inner}" for inner in sorted(os.listdir(folder / name))])
        else:
            yield name


def remains(place: Path, output: Path) -> set[str]:
    """Return the names in `place` that are there only because a run to this output goes on or was killed."""
    names = {name for name in os.listdir(place) if name.startswith(prefix_for(output))}
    stages = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # its run has just ended
            if _whose(place / name) is None:
                stages.add(name)
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


def clear_dead(place: Path, output: Path, left: list[str] | None = None) -> tuple[str, ...]:
    """Remove what killed runs to this output left in `place`, and return the names.

    Raises OutputUnsafe where one of them is alive, or may be another user's, host's or mount's. What cannot
    be deleted is added to `left`, where that is given.
    """
    prefix = prefix_for(output)
    try:
        names = sorted(name for name in os.listdir(place) if name.startswith(prefix))
    except OSError as error:
        raise unwritable(error, place) from error
    cleared = []
    for name in names:
        try:
            whose = _whose(place / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise unwritable(error, place / name) from error
        if whose is not None:
            raise OutputUnsafe(
                "the output may be in use",
                path=output,
                why=f"{name} beside or in it {whose}",
                next_step="Remove that if no run writes there, or choose another output with -o",
            )
        if name.endswith(ASIDE) and not os.path.lexists(output):
            _put_back(place / name, output)
        elif not _remove_dead(place / name, output, keep=left is not None):
            assert left is not None
            left.append(name)
            continue
        cleared.append(name)
    return tuple(cleared)


def clear_certainly_dead(place: Path, output: Path) -> None:
    """Remove what runs to this output left in `place` that are dead for certain; the others may go on."""
    prefix = prefix_for(output)
    for name in os.listdir(place):
        if name.startswith(prefix):
            with contextlib.suppress(OSError, NoisytuneError):
                if _whose(place / name) is None:
                    _remove_dead(place / name, output, keep=True)


def _tags(place: Path) -> tuple[str, str, str]:
    """Return what stands for this host, this run of its kernel, and the mount that `place` is on."""
    told = (_text(_HOST) + os.fsencode(platform.node()), _text(_BOOT), b"%d" % os.stat(place).st_dev)
    host, boot, mount = (hashlib.blake2b(text, digest_size=4).hexdigest() for text in told)
    return host, boot, mount


def _text(path: Path) -> bytes:
    """Return a small file of the system's; nothing where there is none.

    That it cannot be closed loses nothing: a tag that changed would make a run's own left-over another's.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def _whose(path: Path) -> str | None:
    """Say why a left-over may be another's than this user's, host's and mount's; None where it cannot.

    Who shares a group's folder is trusted; in one that anybody may write, names of others can be moved.
    """
    status, folder = os.lstat(path), os.stat(path.parent)
    found = _TAGS.fullmatch(path.name, len(prefix_for(path)))
    if found is None or not (stat.S_ISDIR(status.st_mode) or path.name.endswith(ASIDE)):
        return "is none that this noisytune makes"
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        return "may have been put there by anybody"
    host, boot, mount = _tags(path.parent)
    if found[2] != boot:
        # Of this host: its processes ended with that boot.
        return None if found[1] == host else "was made on another host, or before this one was renamed"
    return None if found[3] == mount else "was made through another mount"


def _put_back(path: Path, output: Path) -> None:
    """Give an old output its name back: its replacement never got there."""
    try:
        fd = hold(path, output)
        try:
            os.rename(path, output)
            sync_directory(output.parent)
        finally:
            os.close(fd)
    except OSError as error:
        raise unwritable(error, output) from error


def _remove_dead(path: Path, output: Path, *, keep: bool) -> bool:
    """Remove a left-over; return False where it cannot be deleted and may be kept."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):  # an old file, set aside
            os.unlink(path)
            return True
        fd = hold(path, output)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise unwritable(error, path) from error
    try:
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
        if keep and error.errno in _UNDELETABLE:
            return False
        raise unwritable(error, path) from error
    finally:
        os.close(fd)
    return True


def _moved(stage: Path) -> list[str]:
    """Return the names that an unfinished run had moved out of `stage`, and that nobody changed since."""
    try:
        fd = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return []  # an old file, set aside
    try:
        manifest, names, files = _announced(fd)
        os.stat(manifest, dir_fd=fd, follow_symlinks=False)
        latest = os.fstat(fd).st_mtime_ns + _SAME_RENAME
    except (OSError, JsonFault):
        # Nothing is moved before the announcement is whole, and the manifest last: then all is complete.
        return []
    finally:
        os.close(fd)
    return [name for name in names if _is_ours(stage, name, files, latest)]


def _announced(fd: int) -> tuple[str, list[str], dict[str, tuple[int, ...]]]:
    """Read what a staging directory announces, as a stranger's: the manifest, the names, each file's status.

    Raises OSError or JsonFault.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(_MOVES, flags, dir_fd=fd), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_size > _MOST_BYTES:
            raise JsonFault("it is no small file of this user")
        document = Document(file.read(_MOST_BYTES), JsonLimits())
    document.member("manifest")
    manifest = _path(document.value())
    document.member("names")
    names = [_path(name) for name in document.entries(_MOST_MOVED)]
    document.member("moved")
    files = {}
    for entry in document.entries(_MOST_MOVED):
        if not isinstance(entry, dict) or list(entry) != ["name", "inode", "size", "mtime", "ctime"]:
            raise JsonFault("it has an entry that is no file's")
        values = tuple(entry.values())[1:]
        if not all(type(value) is int for value in values):
            raise JsonFault("it has a status that is no number")
        files[_path(entry["name"])] = values
    document.end()
    if any("/" in name for name in (manifest, *names)):
        raise JsonFault("it has a name that is a path")
    return manifest, names, files


def _path(name: object) -> str:
    """Return a relative path that leads nowhere else."""
    if not isinstance(name, str) or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise JsonFault("it has a name that is none")
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise JsonFault("it has a name that no file has") from error
    return name


def _is_ours(stage: Path, name: str, files: Mapping[str, tuple[int, ...]], latest: int) -> bool:
    """Tell whether what stands at `name` is what a move out of `stage` makes, finished or not.

    A rename changes a file's ctime, and its old directory's times with it; a later change is another's.
    """
    target = stage.parent / name
    try:
        status = os.lstat(target)
        if stat.S_ISDIR(status.st_mode):
            # Without RENAME_NOREPLACE a directory's name is claimed first, by an empty one.
            inner = [f"{name}/{entry}" for entry in os.listdir(target)]
            return all(_is_ours(stage, entry, files, latest) for entry in inner)
        *kept, changed = files.get(name, (0, 0, 0, 0))
        if [status.st_ino, status.st_size, status.st_mtime_ns] != kept:
            return False
        return changed <= status.st_ctime_ns <= latest or _is_same(stage / name, status)
    except OSError:
        return False


def _is_same(path: Path, status: os.stat_result) -> bool:
    """Tell whether `path` is another name of the file: a rename by link and unlink was not finished."""
    try:
        return os.path.samestat(os.lstat(path), status)
    except FileNotFoundError:
        return False


def _lock(fd: int, *, replaced: bool = False) -> bool:
    """Take the lock of a directory; False where its owner lives, OSError where nobody can tell."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IN_USE:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        # A file system without locks: our own directory is safe by its random name, and another's is
        # taken for alive, which loses nothing. So is the old output where this run moves it.
        return replaced or not os.listdir(fd)
    return True


def is_at(path: Path, fd: int) -> bool:
    """Tell whether a path is, itself, what was opened as `fd`."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False
