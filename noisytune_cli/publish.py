"""Publishing: the only place that commits output.

    stage      every file is written into a staging directory and flushed (fsync)
    seal       the manifest last, then the directories
    rename     the staging directory (or its files) into place, never replacing what we did not check
    settle     fsync the parent; if that fails the rename is undone

So the output is absent or whole whenever the process or the machine stops, and exit code 0 means durable.
A failed fsync is never retried: the kernel may have dropped the pages, and a second call would succeed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from noisytune_cli import signals, staging, system
from noisytune_cli.errors import NoisytuneError, OutputUnsafe, unreadable, unwritable
from noisytune_cli.layout import MANIFEST, MANIFEST_SUFFIX
from noisytune_cli.reading import open_regular

_CHUNK = 1 << 20

#: What a file system answers that has no such rename (NFS, FUSE, old kernels).
_NO_SUCH_RENAME = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class Publication:
    """Output on its way: `with Publication(...) as p`, write below `p.path(name)`, then `p.publish(manifest)`.

    Leaving the block without having published removes everything. `cleared` names the left-overs of killed
    runs that were removed on the way in.
    """

    def __init__(self, output: Path, *, directory: bool, overwrite: bool) -> None:
        """Prepare for an output that `output.check_output` has passed; nothing is touched yet."""
        self.output = output
        self.cleared: tuple[str, ...] = ()
        self._directory = directory
        self._overwrite = overwrite
        self._in_place = False
        self._made_parents: list[Path] = []
        self._stage: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> Publication:
        """Make missing parents, clear dead left-overs, and make the staging directory."""
        with signals.deferred():
            try:
                self._make_parents()
                self._in_place = self._directory and self.output.is_dir() and not self._overwrite
                place = self.output if self._in_place else self.output.parent
                self.cleared = staging.clear_dead(place, self.output)
                if self._in_place:
                    self._require_empty()
                self._stage, self._lock = staging.create(place, self.output)
            except BaseException:
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
        path = self._stage / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(error, self.output) from error
        return path

    def copy(self, source: Path, name: str) -> str:
        """Copy a regular file to `name`, flushed, and return its digest `blake3:HEX`."""
        digest = blake3()

        def chunks() -> Iterator[bytes]:
            fd = open_regular(source)
            try:
                while chunk := os.read(fd, _CHUNK):
                    digest.update(chunk)
                    yield chunk
            except OSError as error:
                raise unreadable(error, source) from error
            finally:
                os.close(fd)

        self._write(self.path(name), chunks())
        return f"blake3:{digest.hexdigest()}"

    def publish(self, manifest: bytes) -> Path:
        """Seal the staging directory with the manifest and put it in place, durably; return the manifest's path."""
        assert self._stage is not None
        name = MANIFEST if self._directory else self.output.name + MANIFEST_SUFFIX
        self._write(self.path(name), iter([manifest]))
        with signals.deferred():
            try:
                for folder, _, _ in os.walk(self._stage, topdown=False):
                    _sync_directory(Path(folder))
                for parent in self._made_parents:
                    _sync_directory(parent.parent)
                if not self._directory:
                    self._publish_file(name)
                elif self._in_place:
                    self._fill_in_place()
                else:
                    self._publish_directory()
            except OSError as error:
                if error.errno in {errno.EEXIST, errno.ENOTEMPTY}:
                    raise exists(self.output) from error
                raise unwritable(error, self.output) from error
            self._made_parents.clear()
        return (self.output if self._directory else self.output.parent) / name

    def _publish_directory(self) -> None:
        assert self._stage is not None
        if not self._overwrite or not os.path.lexists(self.output):
            _rename_directory(self._stage, self.output)
            self._settle(lambda: os.rename(self.output, self._staged()))
            self._stage = None
            return
        _swap(self._stage, self.output)
        self._settle(lambda: _swap(self._staged(), self.output))
        # What was there before now bears the staging directory's name, and goes with it.

    def _publish_file(self, manifest: str) -> None:
        assert self._stage is not None
        place, weights = self.output.parent, self._stage / self.output.name
        if not self._overwrite:
            _rename_file(weights, self.output)
            try:
                _sync_directory(place)
                _rename_file(self._stage / manifest, place / manifest)
                _sync_directory(place)
            except OSError:
                os.rename(self.output, weights)
                raise
            return
        with contextlib.suppress(FileNotFoundError):
            # From here until the new manifest is there the weights are whole, but unverified.
            os.rename(place / manifest, self._stage / "replaced")
            _sync_directory(place)
        try:
            os.rename(weights, self.output)
        except OSError:
            if (self._stage / "replaced").exists():
                os.rename(self._stage / "replaced", place / manifest)
            raise
        os.rename(self._stage / manifest, place / manifest)
        _sync_directory(place)

    def _fill_in_place(self) -> None:
        """Move everything out of the staging directory into the one it lies in, the manifest last."""
        assert self._stage is not None
        names = [name for name in sorted(os.listdir(self._stage)) if name != MANIFEST]
        moved: list[str] = []
        try:
            for name in names:
                _rename_any(self._stage / name, self.output / name)
                moved.append(name)
            _sync_directory(self.output)
            _rename_file(self._stage / MANIFEST, self.output / MANIFEST)
            moved.append(MANIFEST)
            _sync_directory(self.output)
        except OSError:
            for name in reversed(moved):
                os.rename(self.output / name, self._stage / name)
            raise

    def _settle(self, undo: Callable[[], None]) -> None:
        """Make the rename durable, or take it back."""
        try:
            _sync_directory(self.output.parent)
        except OSError:
            undo()
            raise

    def _staged(self) -> Path:
        assert self._stage is not None
        return self._stage

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

    def _write(self, path: Path, chunks: Iterator[bytes]) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with os.fdopen(fd, "wb", buffering=0) as file:
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
        except NoisytuneError:
            raise
        except OSError as error:
            raise unwritable(error, self.output) from error

    def _discard(self) -> None:
        """Remove the staging directory and the parents made for it, as far as that goes."""
        if self._stage is not None:
            shutil.rmtree(self._stage, ignore_errors=True)
            self._stage = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for folder in reversed(self._made_parents):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        self._made_parents.clear()


def exists(output: Path) -> OutputUnsafe:
    """Return the error for an output that is already there."""
    return OutputUnsafe(
        "the output exists",
        path=output,
        why="it would have to be replaced",
        next_step="Choose another with -o, or pass --overwrite to replace it",
    )


def _rename_directory(source: Path, target: Path) -> None:
    try:
        system.rename_without_replacing(str(source), str(target))
    except OSError as error:
        if error.errno not in _NO_SUCH_RENAME:
            raise
        # Making the directory claims the name; renaming over an empty directory is atomic.
        os.mkdir(target, 0o777)
        os.rename(source, target)


def _rename_file(source: Path, target: Path) -> None:
    try:
        system.rename_without_replacing(str(source), str(target))
    except OSError as error:
        if error.errno not in _NO_SUCH_RENAME:
            raise
        os.link(source, target)
        os.unlink(source)


def _rename_any(source: Path, target: Path) -> None:
    (_rename_directory if source.is_dir() else _rename_file)(source, target)


def _swap(first: Path, second: Path) -> None:
    try:
        system.exchange(str(first), str(second))
    except OSError as error:
        if error.errno not in _NO_SUCH_RENAME:
            raise
        aside = first.with_name(first.name + "-replaced")
        os.rename(second, aside)
        try:
            os.rename(first, second)
        except OSError:
            os.rename(aside, second)
            raise
        os.rename(aside, first)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
