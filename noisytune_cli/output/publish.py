"""Publishing: the only place that commits output.

    stage      every file is written into a staging directory and flushed (fsync)
    seal       the manifest last, then the directories
    rename     the staging directory (or its files) into place, never replacing what we did not check
    settle     fsync the parent; if that fails the rename is undone

The staging directory is held by a descriptor, and is never made again: before the rename, its name must still
stand for it and everything written must be in it. What the rename replaces is looked at again after it.

So the output is absent or whole whenever the process or the machine stops, and exit code 0 means durable.
A failed fsync is never retried: the kernel may have dropped the pages, and a second call would succeed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType

from blake3 import blake3

from noisytune_cli.checkpoint.address import Place
from noisytune_cli.checkpoint.formats._file import output_mode
from noisytune_cli.checkpoint.layout import WEIGHTS_SUFFIXES
from noisytune_cli.errors import NOTHING_PUBLISHED, OutputUnsafe, ResourceExhausted, unreadable, unwritable
from noisytune_cli.escape import escape
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX
from noisytune_cli.output import signals, staging
from noisytune_cli.output.overwrite import Look, Seen, is_top, look, look_at
from noisytune_cli.output.renames import (
    Steps,
    rename_any,
    rename_back,
    rename_directory,
    rename_file,
    swap,
    undoing,
)
from noisytune_cli.output.staging import sync_directory
from noisytune_cli.reading import open_regular

_CHUNK = 1 << 20

#: Why a file cannot have a second name here: another file system, one without links, or too many.
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

#: Returns a descriptor of a file to be copied.
Opener = Callable[[Path], int]

#: What an old manifest is called in the staging directory, where an output may have any other name.
_OLD_MANIFEST = f"{staging.PREFIX}replaced"


class Publication:
    """Output on its way: `with Publication(...) as p`, write to `p.path(name)`, then `p.publish(manifest)`.

    Leaving the block without having published removes everything. `cleared` names the left-overs of killed
    runs that were removed on the way in, `published` tells whether the output is in its place.
    """

    def __init__(
        self,
        output: Path,
        *,
        directory: bool,
        overwrite: bool,
        recipe: bool = False,
        seen: Seen | None = None,
    ) -> None:
        """Prepare for an output that `output.check_output` has passed; nothing is touched yet.

        It is a directory, or a file with its manifest beside it; with `recipe` it is the manifest alone.
        `seen` is what was there before it was asked whether that may be replaced, which takes its time.
        """
        self.output = output
        self.cleared: tuple[str, ...] = ()
        self.published = False
        self.is_recipe = recipe
        self._directory = directory
        self._overwrite = overwrite
        self._in_place = False
        self._made_parents: list[Path] = []
        self._stage: Path | None = None
        self._lock: int | None = None
        self._old_lock: int | None = None
        self._written: set[str] = set()
        self._left: list[str] = []
        self._seen, beside = (seen or look_at(output)) if overwrite else (None, None)
        self._seen_manifest = None if directory or recipe else beside

    @property
    def shown(self) -> Place:
        """Where it goes, as the user is told."""
        return self.output

    def __enter__(self) -> Publication:
        """Make missing parents, clear dead left-overs, and make the staging directory."""
        try:
            with signals.deferred():
                signals.leave(None)
                self._make_parents()
                self._in_place = self._directory and self.output.is_dir() and not self._overwrite
                place = self.output if self._in_place else self.output.parent
                self.cleared = staging.clear_dead(place, self.output, self._left)
                if self._in_place and os.access(self.output.parent, os.W_OK):
                    # A run that makes the directory where there is no RENAME_NOREPLACE has its staging there.
                    self.cleared += staging.clear_dead(self.output.parent, self.output, self._left)
                if self._seen is None and any(name.endswith(staging.ASIDE) for name in self.cleared):
                    self._seen = look_at(self.output)[0] if self._overwrite else None  # it has its name back
                if self._in_place:
                    self._require_empty()
                self._stage, self._lock = staging.create(place, self.output)
        except BaseException:  # a signal held back until now among them: `__exit__` will not be called
            with signals.deferred():
                self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not published."""
        with signals.deferred():
            self._discard()

    def path(self, name: str) -> Path:
        """Return where to write the file `name` (relative, with `/`), its folders made."""
        assert self._stage is not None
        self._require_stage()
        try:
            for folder in reversed(PurePosixPath(name).parents[:-1]):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, 0o777, dir_fd=self._lock)
        except OSError as error:
            raise unwritable(error, self.output) from error
        self._written.add(name)
        return self._stage / name

    def place(self, name: str) -> Path:
        """Return where to write the weight file `name`; in an output that is a file it bears that's name."""
        return self.path(self._weights_name(name))

    def adopt(self, file: Path, name: str) -> None:
        """Let a whole and durable file that lies elsewhere be the weight file `name`, under both names.

        It is copied where it cannot have two, or has them already: a run that was stopped may have put it
        where this one looks whether what it is to replace has changed, and a further name is a change.
        """
        place = self.place(name)
        try:
            if is_single := os.lstat(file).st_nlink == 1:
                os.link(file, place, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise unwritable(error, self.output) from error
            is_single = False
        if not is_single:
            self.copy(file, self._weights_name(name))

    def _weights_name(self, name: str) -> str:
        return name if self._directory else self.output.name

    def copy(self, source: Path, name: str, open_file: Opener = open_regular) -> str:
        """Copy a regular file to `name`, flushed, and return its digest `blake3:HEX`."""
        return copy_file(source, name, [self], open_file)

    @contextmanager
    def create(self, name: str, mode: int = 0o666) -> Iterator[Callable[[bytes], None]]:
        """Create the file `name` from one of `mode`; yield what writes to it, and flush it at the end."""

        def write(chunk: bytes) -> None:
            view = memoryview(chunk)
            try:
                while view:
                    view = view[file.write(view) :]
            except OSError as error:
                raise unwritable(error, self.output) from error

        self.path(name)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, output_mode(mode), dir_fd=self._lock)
            with os.fdopen(fd, "wb", buffering=0) as file:
                yield write
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(error, self.output) from error

    def write(self, name: str, content: bytes) -> str:
        """Write a small file, flushed, and return its digest `blake3:HEX`."""
        return write_file(content, name, [self])

    def publish(self, manifest: bytes | Iterable[bytes]) -> Place:
        """Seal the output with its manifest and put it in place; return the manifest's path."""
        self.seal(manifest)
        return self.commit()

    def seal(self, manifest: bytes | Iterable[bytes]) -> None:
        """Complete the staging directory with the manifest, whole or in pieces."""
        with self.create(self._manifest_name) as write:
            for piece in [manifest] if isinstance(manifest, bytes) else manifest:
                write(piece)

    def commit(self) -> Place:
        """Put what was sealed in place, durably, and return the manifest's path.

        Whatever fails is undone before the error is raised.
        """
        assert self._stage is not None
        with signals.deferred():
            try:
                for folder, _, _ in os.walk(self._stage, topdown=False):
                    sync_directory(Path(folder))
                for parent in self._made_parents:
                    sync_directory(parent.parent)
                self._require_whole()
                if self.is_recipe:
                    self._publish_recipe(self._stage)
                elif not self._directory:
                    self._publish_file(self._stage, self._manifest_name)
                elif self._in_place:
                    self._fill_in_place(self._stage)
                else:
                    self._publish_directory(self._stage)
            except OSError as error:
                if error.errno in {errno.EEXIST, errno.ENOTEMPTY}:
                    raise exists(self.output) from error
                raise unwritable(error, self.output) from error
            self._made_parents.clear()
            self.published = True
            signals.leave(f"{self.output} is complete")
            self._discard()
        return (self.output if self._directory else self.output.parent) / self._manifest_name

    @property
    def _manifest_name(self) -> str:
        if self._directory:
            return MANIFEST
        return self.output.name if self.is_recipe else self.output.name + MANIFEST_SUFFIX

    @property
    def warnings(self) -> tuple[str, ...]:
        """What lies there yet because it cannot be deleted, and a name without an extension."""
        left = [
            f"{escape(name)} beside or in the output is left over: it could not be deleted"
            for name in self._left
        ]
        if not (self._directory or self.is_recipe or self.output.suffix):
            name = escape(self.output.name)
            left.append(f"{name} has no extension, by which programs tell formats: name it like its source")
        if self._directory and self.output.name.endswith(WEIGHTS_SUFFIXES):
            left.append(f"{escape(self.output.name)} is a folder, as the source is, though named like a file")
        return tuple(left)

    def _require_seen(self, path: Path, seen: Look | None) -> None:
        """Raise OutputUnsafe if what was moved to `path` is not what was there when this run began."""
        if look(path) != seen:
            raise OutputUnsafe(
                "the output has changed",
                path=self.output,
                why=f"what was to be replaced is not what it was when this run began; {NOTHING_PUBLISHED}",
                next_step="See what was added or changed there, then run again",
            )

    def _require_stage(self) -> None:
        """Raise ResourceExhausted unless the staging directory still has its name."""
        assert self._stage is not None
        assert self._lock is not None
        if not staging.is_at(self._stage, self._lock):
            raise self._lost("the folder it grew in was")

    def _require_whole(self) -> None:
        """Raise ResourceExhausted unless the staging directory has its name, and all that was written."""
        self._require_stage()
        for name in self._written:
            try:
                mode = os.stat(name, dir_fd=self._lock, follow_symlinks=False).st_mode
            except (FileNotFoundError, NotADirectoryError):
                mode = 0
            if not stat.S_ISREG(mode):
                raise self._lost(f"{name} was")

    def _require_arrived(self) -> None:
        """Raise ResourceExhausted unless what bears the output's name is the staging directory."""
        assert self._lock is not None
        if not staging.is_at(self.output, self._lock):
            raise self._lost("the folder it grew in was")

    def _lost(self, what: str) -> ResourceExhausted:
        return ResourceExhausted(
            "cannot write",
            path=self.output,
            why=f"{what} removed or replaced while this run went on; {NOTHING_PUBLISHED}",
            next_step="Find out what removes it, then run again",
        )

    def _publish_directory(self, stage: Path) -> None:
        with undoing() as undo:
            if self._seen is not None and os.path.lexists(self.output):
                # What was there before then bears the staging directory's name, and goes with it: by its
                # lock another run knows that this one lives.
                self._old_lock = staging.hold(self.output, self.output, replaced=True)
                assert self._lock is not None
                _let_others_no_more(self._lock, os.fstat(self._old_lock).st_mode)
                swap(stage, self.output)
                undo.append(partial(self._swap_back, stage))
                self._require_seen(stage, self._seen)
            else:
                rename_directory(stage, self.output)
                undo.append(partial(os.rename, self.output, stage))
            self._require_arrived()
            sync_directory(self.output.parent)

    def _swap_back(self, stage: Path) -> None:
        """Exchange the outputs again; where the old one was lost meanwhile, say what is there."""
        try:
            swap(stage, self.output)
        except OSError as error:
            assert self._lock is not None
            is_there = staging.is_at(self.output, self._lock)
            raise ResourceExhausted(
                "cannot put the old output back",
                path=self.output,
                why=f"{os.strerror(error.errno or 0)} ({stage.name}, its name meanwhile); "
                f"the new one {'is in its place' if is_there else 'was removed or replaced too'}",
                next_step="Find out what removes it; if the output is there, see with noisytune verify",
            ) from error

    def _publish_file(self, stage: Path, manifest: str) -> None:
        weights, place = self.output.name, self.output.parent
        with undoing() as undo:
            if staging.keeps(stage / manifest, place / manifest):
                # It is what a replay followed, and a kill must not cost it: one rename completes the output.
                self._put(stage / weights, undo)
                return
            if self._seen_manifest is not None and os.path.lexists(place / manifest):
                # From here until the new manifest is there the weights are whole, but unverified.
                self._move(place / manifest, stage / _OLD_MANIFEST, undo)
                self._require_seen(stage / _OLD_MANIFEST, self._seen_manifest)
            if not (self._seen is not None and os.path.lexists(self.output)):
                staging.announce_moves(stage, [weights], manifest=manifest)
            self._put(stage / weights, undo)
            self._move(stage / manifest, place / manifest, undo)

    def _publish_recipe(self, stage: Path) -> None:
        with undoing() as undo:
            self._put(stage / self.output.name, undo)

    def _fill_in_place(self, stage: Path) -> None:
        """Move everything out of the staging directory into the one it lies in, the manifest last."""
        names = [name for name in sorted(os.listdir(stage)) if name != MANIFEST]
        staging.announce_moves(stage, names, manifest=MANIFEST)
        with undoing() as undo:
            for name in names:
                rename_any(stage / name, self.output / name)
                undo.append(partial(rename_back, self.output / name, stage / name))
            sync_directory(self.output)
            self._move(stage / MANIFEST, self.output / MANIFEST, undo)

    def _put(self, staged: Path, undo: Steps) -> None:
        """Put a file in the output's place, durably; what it may replace goes with the staging directory."""
        if self._seen is not None and os.path.lexists(self.output):
            fd = os.open(staged.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._lock)
            with os.fdopen(fd, "rb") as file:
                _let_others_no_more(file.fileno(), os.lstat(self.output).st_mode)
            swap(staged, self.output)
            undo.append(partial(swap, staged, self.output))
            self._require_seen(staged, self._seen)
            sync_directory(self.output.parent)
        else:
            self._move(staged, self.output, undo)

    def _move(self, source: Path, target: Path, undo: Steps) -> None:
        """Rename a file into, or out of, the output's folder, durably."""
        rename_file(source, target)
        undo.append(partial(rename_back, target, source))
        sync_directory(self.output if self._in_place else self.output.parent)

    def _require_empty(self) -> None:
        try:
            if os.listdir(self.output):
                raise exists(self.output)
        except OSError as error:
            raise unwritable(error, self.output) from error

    def _make_parents(self) -> None:
        missing = []
        parent = self.output.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for folder in reversed(missing):
            try:
                os.mkdir(folder, 0o777)
            except FileExistsError:
                continue
            except OSError as error:
                raise unwritable(error, folder) from error
            self._made_parents.append(folder)

    def _empty_replaced(self, stage: Path) -> None:
        """Empty the old output, which bears the staging directory's name, unless it is another by now."""
        seen, old = self._seen, self._old_lock
        if seen is not None and old is not None and look(stage) == seen and is_top(seen, old):
            _empty(old)

    def _discard(self) -> None:
        """Remove the staging directory and the parents made for it, as far as that goes.

        By descriptors, and then the empty name: what bears it by now may be somebody else's.
        """
        if self._stage is not None and self._lock is not None:
            with contextlib.suppress(OSError):
                if not staging.is_at(self.output, self._lock):
                    _empty(self._lock)
                elif self.published and self._directory:
                    self._empty_replaced(self._stage)
            with contextlib.suppress(OSError):
                os.rmdir(self._stage)
            if self.published and os.path.lexists(self._stage):
                self._left.append(self._stage.name)
            self._stage = None
        for lock in (self._old_lock, self._lock):
            if lock is not None:
                with contextlib.suppress(OSError):  # the lock is released all the same
                    os.close(lock)
        self._old_lock = self._lock = None
        for folder in reversed(self._made_parents):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        self._made_parents.clear()


def _empty(folder: int) -> None:
    """Remove what an open directory holds, wherever that is, as far as that goes."""
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)


def _let_others_no_more(fd: int, old: int) -> None:
    """Take from an open file or directory what the mode of what it replaces keeps from others, durably."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & ~(old | stat.S_IRWXU):
        os.fchmod(fd, mode & (old | stat.S_IRWXU))
        os.fsync(fd)


def copy_file(
    source: Path, name: str, publications: Sequence[Publication], open_file: Opener = open_regular
) -> str:
    """Copy a regular file to `name` in each publication, flushed, and return its digest `blake3:HEX`.

    It is read once, also where there is no publication.
    """
    digest = blake3()
    fd = open_file(source)
    try:
        mode = os.fstat(fd).st_mode
        with ExitStack() as created:
            writers = [created.enter_context(publication.create(name, mode)) for publication in publications]
            while chunk := _read(fd, source):
                digest.update(chunk)
                for write in writers:
                    write(chunk)
    finally:
        os.close(fd)
    return f"blake3:{digest.hexdigest()}"


def write_file(content: bytes, name: str, publications: Sequence[Publication], mode: int = 0o666) -> str:
    """Write a small file to `name` in each publication, flushed, and return its digest `blake3:HEX`."""
    for publication in publications:
        with publication.create(name, mode) as write:
            write(content)
    return f"blake3:{blake3(content).hexdigest()}"


def _read(fd: int, source: Path) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except OSError as error:
        raise unreadable(error, source) from error


def _left_beside(output: Path) -> str:
    """Say what a killed run may have left beside an output that it had completed."""
    try:
        left = [name for name in os.listdir(output.parent) if name.startswith(staging.prefix_for(output))]
    except OSError:
        return ""
    return f", and another run has, or has left, {left[0]} beside it" if left else ""


def exists(output: Path) -> OutputUnsafe:
    """Return the error for an output that is already there."""
    return OutputUnsafe(
        "the output exists",
        path=output,
        why=f"it would have to be replaced{_left_beside(output)}",
        next_step="Choose another with -o, or pass --overwrite to replace it",
    )
