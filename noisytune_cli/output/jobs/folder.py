"""A job in a folder, which all processes see; finishing gives its weight files a second name in the output.

Files appear by a rename; whose is the last makes no difference.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from noisytune_cli.checkpoint.address import Place
from noisytune_cli.errors import NoisytuneError, OutputUnsafe, unreadable, unwritable
from noisytune_cli.manifest.job import Job
from noisytune_cli.output import staging
from noisytune_cli.output.jobs import FINISHED, PLAN, JobStorage, no_job, own_of
from noisytune_cli.output.publish import Publication
from noisytune_cli.output.renames import rename_directory, rename_file
from noisytune_cli.output.staging import sync_directory
from noisytune_cli.reading import is_there, open_regular

#: What the drafts of plans are named after, and what begins the name of what is being removed.
_DRAFT, _DONE = Path("plan"), ".done-"


class FolderStorage(JobStorage):
    """A folder beside the output."""

    beside = True

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def require_trusted(self) -> None:
        # Its plan says what is read, and its receipts what was done. Who shares a group's folder is trusted.
        try:
            status, above = os.lstat(self.path), os.stat(self.path.parent)
        except FileNotFoundError as error:  # it has just been finished
            raise no_job(self.path) from error
        if not stat.S_ISDIR(status.st_mode):
            why = "it is a link or a file where the folder of a job should be"
        elif status.st_uid != os.geteuid() and above.st_mode & stat.S_IWOTH:
            why = "it belongs to another user, in a folder that anybody may write to"
        else:
            return
        raise OutputUnsafe(
            "the job may be a stranger's",
            path=self.path,
            why=why,
            next_step="Choose another output with -o, in a folder that is yours",
        )

    def stands(self, own: str) -> bool:
        return is_there(self.path / PLAN) and is_there(self.path / own)

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self.path / name, follow_symlinks=False).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise unreadable(error, self.path / name) from error

    def names(self, folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(self.path / folder))
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise unreadable(error, self.path / folder) from error

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        yield self.path / name

    @contextmanager
    def reading_output(self, file: Place) -> Iterator[Path | None]:
        yield file if isinstance(file, Path) and is_there(file) else None

    def put(self, content: Iterable[bytes], name: str) -> None:
        path = self.path / name
        with self._writing(own_of(name)):
            temporary = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
            _make(path.parent, self.path / own_of(name))
            try:
                _write(temporary, content)
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            sync_directory(path.parent)

    @contextmanager
    def growing(self, own: str, share: int) -> Iterator[Path]:
        place, share_name = self.path / own / "scratch", Path(f"share {share + 1}")
        with self._writing(own):
            _make(place, self.path / own)
        staging.clear_certainly_dead(place, share_name)  # what killed workers left
        path, lock = staging.create(place, share_name)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.close(lock)

    def keep(self, made: Path, name: str, final: Place) -> None:
        path = self.path / name
        with self._writing(own_of(name)):
            _make(path.parent, self.path / own_of(name))
            os.replace(made, path)
            sync_directory(path.parent)

    def kept(self, name: str, final: Place) -> int | None:
        return self.size(name)

    def adopt(self, publication: Publication, as_name: str, name: str, size: int) -> None:
        publication.adopt(self.path / name, as_name)

    @contextmanager
    def drafting(self) -> Iterator[Path]:
        try:
            draft, lock = self._begin_draft()
            try:
                os.mkdir(draft / "steps")
                yield draft / "steps"
            finally:
                shutil.rmtree(draft, ignore_errors=True)
                with contextlib.suppress(OSError):
                    os.close(lock)
                with contextlib.suppress(OSError):
                    os.rmdir(self.path)  # unless there is a job in it
        except OSError as error:
            raise unwritable(error, self.path) from error

    def _begin_draft(self) -> tuple[Path, int]:
        """Make a folder that is known for alive while its lock is held; return both."""
        while True:
            _make(self.path)
            self.require_trusted()
            try:
                return staging.create(self.path, _DRAFT)
            except OutputUnsafe:
                if is_there(self.path):
                    raise  # else the job that was in it has just been removed

    def create(self, draft: Path, own: str, plan: bytes, job: Job) -> Literal["made", "same", "other"]:
        for steps in draft.iterdir():  # the first brings most of the others along
            _flush(steps)
        sync_directory(draft)
        _write(draft.parent / PLAN, [plan])
        sync_directory(draft.parent)
        steps, taken = self.path / own, False
        if not is_there(self.path / PLAN):
            taken = _claim(draft.parent, steps, rename_directory)
            made = (steps if taken else draft.parent) / PLAN
            if _claim(made, self.path / PLAN, rename_file):
                if not taken:  # what lay there was of a job that was just being removed, or is there still
                    _claim(draft.parent, steps, rename_directory)
                return "made"
        with open(open_regular(self.path / PLAN), "rb") as file:
            if file.read(len(plan) + 1) == plan:
                return "same"
        if taken:  # it goes with the draft
            os.rename(steps, draft.parent)
        return "other"

    def clear(self, output: Place, claim: bytes) -> tuple[str, ...]:
        assert isinstance(output, Path)
        places = [output.parent, *([output] if output.is_dir() else [])]
        return tuple(name for place in places for name in staging.clear_dead(place, output))

    def remove(self, own: str, plan: Iterable[bytes]) -> bool:
        try:
            if is_there(self.path / PLAN) and not self.stands(own):  # another removed it, and a third planned
                return True
            # By that name who is stopped here goes on, or the weights would keep their second name for good.
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path / PLAN, self.path / FINISHED)
            # What lies under the plan's digest goes in one step: the next plan must not find a part of it.
            with contextlib.suppress(OSError):
                os.rename(self.path / own, self.path / f"{_DONE}{os.urandom(4).hex()}")
            # What else is there may be another plan's, which is just being made.
            for name in os.listdir(self.path):
                if name.startswith(_DONE):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            staging.clear_certainly_dead(self.path, _DRAFT)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / FINISHED)
            with contextlib.suppress(OSError):
                os.rmdir(self.path)
            is_anothers = (PLAN, staging.prefix_for(_DRAFT))
            return not is_there(self.path) or any(
                name.startswith(is_anothers) for name in os.listdir(self.path)
            )
        except FileNotFoundError:  # another has removed it
            return True
        except (NoisytuneError, OSError):  # it cannot be seen what is there
            return False

    @contextmanager
    def _writing(self, own: str) -> Iterator[None]:
        """Turn what fails into the error that the user sees: a job that is gone is finished."""
        try:
            yield
        except OSError as error:
            if not self.stands(own):
                raise no_job(self.path) from error
            raise unwritable(error, self.path) from error


def _claim(made: Path, place: Path, rename: Callable[[Path, Path], None]) -> bool:
    """Give what was made its place, durably; return False where something has it already."""
    try:
        rename(made, place)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
        return False
    sync_directory(place.parent)
    return True


def _make(folder: Path, within: Path | None = None) -> None:
    """Make a folder and those above it, durably, unless they are there; one that it is `within` has to be."""
    missing = []
    while folder != within and not is_there(folder):
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(one, 0o777)
        sync_directory(one.parent)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, content: Iterable[bytes]) -> None:
    """Write a new file, and flush it."""
    with open(path, "xb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
