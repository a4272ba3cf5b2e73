"""The folder of a job: what processes that do its shares leave for one another, until the output is whole.

It is a hidden sibling of the output, found from the output's name alone.

    plan.json          what is to be done; made once and for all, or found to be the same
    DIGEST/            all that belongs to the plan of this digest, and to no other
        steps/N.json       what is to be done to the tensors of share N
        sums/N.json        with scope global: what its values add to the std of all
        scratch/           what is being written
        files/K/NAME       a whole weight file of output K
        receipts/N-K.json  what share N is in output K, written after its files are durable

Every file appears whole and durable, by a rename; the same share done twice gives the same bytes, so whose
rename is the last makes no difference. Nothing here is part of an output: finishing gives the weight files a
second name there, and removes the folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from noisytune_cli.errors import InputUnreadable, OutputUnsafe, UsageError, unwritable
from noisytune_cli.escape import escape
from noisytune_cli.manifest.job import Job, Share, digest_of, job_pieces, read_job
from noisytune_cli.output import staging
from noisytune_cli.output.destination import resolve_folder
from noisytune_cli.output.renames import rename_directory, rename_file
from noisytune_cli.output.staging import sync_directory
from noisytune_cli.reading import is_there, open_regular

_PLAN = "plan.json"

#: Hexadecimal digits of a plan's digest that name its folder.
_DIGITS = 32

#: What stands for a value in an output's name, and how a value may be written there.
_PLACEHOLDER, _VALUE = re.compile(r"\{(?:lambda|noise-std|sigma|seed)\}"), r"\.?[\w+-][\w.+-]*"


def job_path(out: str) -> Path:
    """Return where the job of an output lies that is named `out`, with its placeholders where it has any.

    Raises UsageError for an address in an object store.
    """
    path = resolve_folder(out)
    if not isinstance(path, Path):
        raise in_store(path)
    plain = 0
    while plain < len(path.parts) and not _PLACEHOLDER.search(path.parts[plain]):
        plain += 1
    plain = min(plain, len(path.parts) - 1)
    name = os.fsencode(os.path.join(*path.parts[plain:]))
    digest = hashlib.blake2b(name, digest_size=6).hexdigest()
    return Path(*path.parts[:plain]) / f"{staging.PREFIX}job-{digest}"


def in_store(address: str) -> UsageError:
    """Return the error for a job that would read from an object store, or write to one."""
    return UsageError(
        "a job is done on files",
        path=address,
        why="what its processes leave for one another lies in a folder that all of them see",
        next_step="Copy to and from the object store, or use noisytune perturb, which does",
    )


@dataclass(frozen=True)
class JobFolder:
    """The folder of a job that is planned; shares and outputs are numbered from 1 in its names."""

    path: Path
    job: Job
    digest: str

    def _named(self, *names: str) -> Path:
        return self.path.joinpath(self.digest[:_DIGITS], *names)

    def steps(self, share: int) -> Path:
        """Return where the steps of a share are."""
        return self._named("steps", f"{share + 1}.json")

    def sums(self, share: int) -> Path:
        """Return where the sums of a share are to be."""
        return self._named("sums", f"{share + 1}.json")

    def receipt(self, share: int, output: int) -> Path:
        """Return where the manifest of a share in an output is to be."""
        return self._named("receipts", f"{share + 1}-{output + 1}.json")

    def file(self, output: int, name: str) -> Path:
        """Return where a weight file of an output is to be."""
        return self._named("files", str(output + 1), name)

    def has_sums(self, share: int) -> bool:
        """Tell whether the sums of a share are there, or none are needed."""
        return not self.job.has_sums or is_there(self.sums(share))

    def is_done(self, share: int) -> bool:
        """Tell whether all receipts of a share are there."""
        return all(is_there(self.receipt(share, output)) for output in range(len(self.job.outputs)))

    @property
    def is_there(self) -> bool:
        """Tell whether the job is not finished, or removed, yet."""
        return is_there(self.path / _PLAN)

    @property
    def lacking_sums(self) -> list[int]:
        """The shares whose sums are still to come."""
        return [share for share in range(len(self.job.shares)) if not self.has_sums(share)]

    @property
    def left(self) -> list[int]:
        """The shares that are still to be done."""
        return [share for share in range(len(self.job.shares)) if not self.is_done(share)]

    def put(self, content: Iterable[bytes], path: Path) -> None:
        """Make a file of the job from its bytes, whole and durable, in the place of an earlier one."""
        with self._writing():
            temporary = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
            _make(path.parent, self._named())
            try:
                _write(temporary, content)
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            sync_directory(path.parent)

    def move(self, made: Path, path: Path) -> None:
        """Give a file that was made in `scratch`, and is durable, its place."""
        with self._writing():
            _make(path.parent, self._named())
            os.replace(made, path)
            sync_directory(path.parent)

    @contextmanager
    def scratch(self, share: int) -> Iterator[Path]:
        """Make a folder for what is being written; it goes in the end, and with it what killed runs left."""
        place, share_name = self._named("scratch"), Path(f"share {share + 1}")
        with self._writing():
            _make(place, self._named())
        staging.clear_certainly_dead(place, share_name)
        path, lock = staging.create(place, share_name)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.close(lock)

    def remove(self) -> bool:
        """Remove the job, the plan first; return whether nothing is left of it.

        What lies under the plan's digest goes in one step: the next plan must not find a part of it.
        """
        with contextlib.suppress(OSError):
            os.unlink(self.path / _PLAN)
        with contextlib.suppress(OSError):
            os.rename(self._named(), self.path / f".done-{os.urandom(4).hex()}")
        shutil.rmtree(self.path, ignore_errors=True)
        return not is_there(self.path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what fails into the error that the user sees: a job that is gone is finished."""
        try:
            yield
        except OSError as error:
            if not self.is_there:
                raise no_job(self.path) from error
            raise unwritable(error, self.path) from error


def no_job(path: Path) -> InputUnreadable:
    """Return the error for a job that is not there."""
    return InputUnreadable(
        "there is no job",
        path=path,
        why="it was finished, was removed, or was never planned",
        next_step="Name OUT as noisytune plan was given it, or plan the job first",
    )


def open_job(out: str) -> JobFolder:
    """Open the job of an output that is named `out`.

    Raises InputUnreadable where there is none, InputInvalid for one that is malformed or another version's,
    OutputUnsafe for one that may be a stranger's, or writes to what `out` does not name.
    """
    folder = open_folder(job_path(out))
    _require_named(folder, out)
    return folder


def open_folder(path: Path) -> JobFolder:
    """Open the job whose folder is at `path`, as `open_job` does, of whatever outputs."""
    if not is_there(path / _PLAN):
        raise no_job(path)
    _require_trusted(path)
    return JobFolder(path, *read_job(path / _PLAN))


def _require_trusted(path: Path) -> None:
    """Raise OutputUnsafe for the folder of a job that anybody may have put there.

    Its plan says what is read, and its receipts what was done. Who shares a group's folder is trusted.
    """
    status, above = os.lstat(path), os.stat(path.parent)
    if not stat.S_ISDIR(status.st_mode):
        why = "it is a link or a file where the folder of a job should be"
    elif status.st_uid != os.geteuid() and above.st_mode & stat.S_IWOTH:
        why = "it belongs to another user, in a folder that anybody may write to"
    else:
        return
    raise OutputUnsafe(
        "the job may be a stranger's",
        path=path,
        why=why,
        next_step="Choose another output with -o, in a folder that is yours",
    )


def _require_named(folder: JobFolder, out: str) -> None:
    """Raise OutputUnsafe unless every output of a job is what `out` names, or lies in that folder."""
    words = re.split(f"({_PLACEHOLDER.pattern})", os.fspath(resolve_folder(out)))
    pattern = "".join(
        f"(?:{_VALUE}|{re.escape(word)})" if number % 2 else re.escape(word)
        for number, word in enumerate(words)
    )
    for output in folder.job.outputs:
        path = Path(os.path.normpath(output.path))
        if not any(re.fullmatch(pattern, os.fspath(place)) for place in (path, path.parent)):
            raise OutputUnsafe(
                "the job is another output's",
                path=folder.path,
                why=f"it writes to {escape(output.path)}, which is not what {escape(out)} names",
                next_step="Remove the job's folder and plan again, with no links where OUT has placeholders",
            )


def is_planned(out: str) -> bool:
    """Tell whether there is a job for an output of this name."""
    return is_there(job_path(out) / _PLAN)


def create_job(
    out: str, shares: Iterable[tuple[tuple[str, ...], int, bytes]], make: Callable[[tuple[Share, ...]], Job]
) -> tuple[JobFolder, bool]:
    """Make the job that `make` returns of its shares, unless it is there; return it and whether it was.

    Of each share the files, their bytes and its steps are given. Raises OutputUnsafe for another job there.
    """
    path = job_path(out)
    draft = path / f".plan-{os.urandom(4).hex()}"
    plan = draft.with_suffix(".json")
    try:
        _make(path)
        _require_trusted(path)
        try:
            _make(draft / "steps")
            made = []
            for number, (files, nbytes, steps) in enumerate(shares, 1):
                _write(draft / "steps" / f"{number}.json", [steps])
                made.append(Share(files, nbytes, digest_of(steps)))
            sync_directory(draft / "steps")
            sync_directory(draft)
            job = make(tuple(made))
            content = b"".join(job_pieces(job))
            folder = JobFolder(path, job, digest_of(content).removeprefix("blake3:"))
            _require_named(folder, out)
            if not is_there(path / _PLAN):
                _write(plan, [content])
                _claim(draft, folder.steps(0).parents[1], rename_directory)
                if _claim(plan, path / _PLAN, rename_file):
                    return folder, False
            with open(open_regular(path / _PLAN), "rb") as file:
                found = file.read(len(content) + 1)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.unlink(plan)
            with contextlib.suppress(OSError):
                os.rmdir(path)  # unless there is a job in it
    except OSError as error:
        raise unwritable(error, path) from error
    if found != content:
        raise OutputUnsafe(
            "another job is there",
            path=path,
            why="its plan is not this one: the source, the options or the version differ",
            next_step="Finish that one, or remove its folder, then plan again",
        )
    return folder, True


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


def _write(path: Path, content: Iterable[bytes]) -> None:
    """Write a new file, and flush it."""
    with open(path, "xb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
