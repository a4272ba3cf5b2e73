"""The folder of a job: what processes that do its shares leave for one another, until the output is whole.

It is found from the output's name alone: a hidden sibling of an output that is here, and below one in an
object store (`output/jobs` says how either is written).

    plan.json          what is to be done; made once and for all, or found to be the same
    finished.json      what that is called from when the output is whole until the job is removed
    DIGEST/            all that belongs to the plan of this digest, and to no other
        steps/N.json       what is to be done to the tensors of share N
        sums/N.json        with scope global: what its values add to the std of all
        scratch/           what is being written
        files/K/NAME       a whole weight file of output K; in an object store it is in the output already
        receipts/N-K.json  what share N is in output K, written after its files are durable

The same share done twice gives the same bytes, so whose are the last makes no difference. Nothing here is
part of an output.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from noisytune_cli.checkpoint.address import UNFINISHED, Address, Place, as_place, is_address
from noisytune_cli.errors import InputUnreadable, NoisytuneError, OutputUnsafe, UsageError
from noisytune_cli.escape import escape
from noisytune_cli.manifest.job import Job, Share, digest_of, job_pieces, read_job
from noisytune_cli.output import staging
from noisytune_cli.output.destination import resolve_folder
from noisytune_cli.output.jobs import FINISHED, PLAN, JobStorage, claim_of, no_job
from noisytune_cli.output.jobs.folder import FolderStorage
from noisytune_cli.output.publish import Publication

#: Hexadecimal digits of a plan's digest that name its folder.
_DIGITS = 32

#: What stands for a value in an output's name, and how a value may be written there.
_PLACEHOLDER, _VALUE = re.compile(r"\{(?:lambda|noise-std|sigma|seed)\}"), r"\.?[\w+-][\w.+-]*"


def job_path(out: str) -> Place:
    """Return where the job of an output lies that is named `out`, with its placeholders where it has any.

    Raises UsageError for a bucket's name with a placeholder.
    """
    path = resolve_folder(out)
    parts = path.parts if isinstance(path, Path) else tuple(path.split("/"))
    plain = 0
    while plain < len(parts) and not _PLACEHOLDER.search(parts[plain]):
        plain += 1
    if isinstance(path, Address):
        if plain == len(parts):
            return path / UNFINISHED
        if plain < len(path.store.split("/")):
            raise UsageError(
                "a job has one bucket",
                path=path,
                why="a placeholder in its name would make it several",
                next_step="Put the placeholder into the key",
            )
        return path.above(len(parts) - plain) / UNFINISHED / f"job-{_name_of(parts[plain:])}"
    plain = min(plain, len(parts) - 1)
    return Path(*parts[:plain]) / f"{staging.JOB_PREFIX}{_name_of(parts[plain:])}"


def _name_of(parts: tuple[str, ...]) -> str:
    return hashlib.blake2b(os.fsencode(os.path.join(*parts)), digest_size=6).hexdigest()


@dataclass(frozen=True)
class JobFolder:
    """The folder of a job that is planned; shares and outputs are numbered from 1 in its names."""

    job: Job
    digest: str
    storage: JobStorage = field(compare=False)

    @property
    def path(self) -> Place:
        """Where it is."""
        return self.storage.path

    @property
    def own(self) -> str:
        """The name of what belongs to its plan."""
        return self.digest[:_DIGITS]

    @property
    def claim(self) -> bytes:
        """What its outputs are claimed with in an object store."""
        return claim_of(self.own)

    def steps(self, share: int) -> str:
        """Return the name of the steps of a share."""
        return f"{self.own}/steps/{share + 1}.json"

    def sums(self, share: int) -> str:
        """Return the name of what is to be the sums of a share."""
        return f"{self.own}/sums/{share + 1}.json"

    def receipt(self, share: int, output: int) -> str:
        """Return the name of what is to be the manifest of a share in an output."""
        return f"{self.own}/receipts/{share + 1}-{output + 1}.json"

    def output(self, output: int) -> Place:
        """Return where an output goes."""
        return as_place(self.job.outputs[output].path)

    def keep(self, made: Path, output: int, name: str) -> None:
        """Take a weight file of an output that is whole and durable in the scratch folder of a share."""
        self.storage.keep(made, *self._weights(output, name))

    def kept(self, output: int, name: str) -> int | None:
        """Return how long a weight file of an output is, None where there is none yet."""
        return self.storage.kept(*self._weights(output, name))

    def adopt(self, publication: Publication, output: int, name: str, size: int) -> None:
        """Let a weight file of an output, which has to be of this size, be its publication's."""
        in_job, _ = self._weights(output, name)
        self.storage.adopt(publication, name, in_job, size)

    def _weights(self, output: int, name: str) -> tuple[str, Place]:
        """Return what a weight file of an output is called in the job, and where it is to be in the end."""
        place = self.output(output)
        return f"{self.own}/files/{output + 1}/{name}", place if self.job.is_file else place / name

    def has_sums(self, share: int) -> bool:
        """Tell whether the sums of a share are there, or none are needed."""
        return not self.job.has_sums or self.storage.size(self.sums(share)) is not None

    def is_done(self, share: int) -> bool:
        """Tell whether all receipts of a share are there."""
        outputs = range(len(self.job.outputs))
        return all(self.storage.size(self.receipt(share, output)) is not None for output in outputs)

    @property
    def is_there(self) -> bool:
        """Tell whether the job is not finished, or removed, yet; True where that cannot be told."""
        try:
            return self.storage.stands(self.own)
        except NoisytuneError:
            return True

    @property
    def lacking_sums(self) -> list[int]:
        """The shares whose sums are still to come."""
        if not self.job.has_sums:
            return []
        there = self.storage.names(f"{self.own}/sums")
        return [share for share in range(len(self.job.shares)) if f"{share + 1}.json" not in there]

    @property
    def left(self) -> list[int]:
        """The shares that are still to be done."""
        there = self.storage.names(f"{self.own}/receipts")
        outputs = range(1, len(self.job.outputs) + 1)
        return [
            share
            for share in range(len(self.job.shares))
            if not all(f"{share + 1}-{output}.json" in there for output in outputs)
        ]

    def remove(self) -> bool:
        """Remove the job, the plan first; return whether nothing is left of it."""
        return self.storage.remove(self.own, job_pieces(self.job))


def open_job(out: str) -> JobFolder:
    """Open the job of an output that is named `out`.

    Raises InputUnreadable where there is none, InputInvalid for one that is malformed or another version's,
    OutputUnsafe for one that may be a stranger's, or writes to what `out` does not name.
    """
    folder = open_folder(job_path(out))
    _require_named(folder, out)
    return folder


def open_folder(path: Place) -> JobFolder:
    """Open the job whose folder is at `path`, as `open_job` does, of whatever outputs."""
    storage = storage_at(path)
    if storage.size(PLAN) is None:
        raise no_job(path)
    return _open(storage, PLAN)


def open_finished(out: str) -> JobFolder | None:
    """Open the job of an output that was finished but for its removal, if there is one."""
    storage = storage_at(job_path(out))
    if storage.size(FINISHED) is None or storage.size(PLAN) is not None:
        return None
    try:
        folder = _open(storage, FINISHED)
    except InputUnreadable:
        if storage.size(FINISHED) is not None:
            raise
        return None  # who finished it has just removed it
    _require_named(folder, out)
    return folder


def _open(storage: JobStorage, name: str) -> JobFolder:
    storage.require_trusted()
    with storage.reading(name) as path:
        return JobFolder(*read_job(path), storage)


def _require_named(folder: JobFolder, out: str) -> None:
    """Raise OutputUnsafe unless every output of a job is what `out` names, or lies in that folder."""
    words = re.split(f"({_PLACEHOLDER.pattern})", os.fspath(resolve_folder(out)))
    pattern = "".join(
        f"(?:{_VALUE}|{re.escape(word)})" if number % 2 else re.escape(word)
        for number, word in enumerate(words)
    )
    for output in folder.job.outputs:
        text = output.path
        path = Address(text) if is_address(text) else Path(os.path.normpath(text))
        if not any(re.fullmatch(pattern, os.fspath(place)) for place in (path, path.parent)):
            raise OutputUnsafe(
                "the job is another output's",
                path=folder.path,
                why=f"it writes to {escape(text)}, which is not what {escape(out)} names",
                next_step="Remove the job's folder and plan again, with no links where OUT has placeholders",
            )


def storage_at(path: Place) -> JobStorage:
    """Return the storage of the job that lies, or will lie, at a place."""
    if isinstance(path, Address):
        from noisytune_cli.output.jobs.bucket import BucketStorage  # most jobs are here

        return BucketStorage(path)
    return FolderStorage(path)


def is_planned(out: str) -> bool:
    """Tell whether there is a job for an output of this name."""
    return storage_at(job_path(out)).size(PLAN) is not None


def find_planned(outputs: Iterable[Path], folders: Iterable[Path]) -> tuple[Path, Path] | None:
    """Return an output that a job in one of `folders` will write to, and that folder; None where none will.

    Of one whose plan cannot be read its name tells.
    """
    named = {job_path(os.fspath(output)): output for output in outputs}
    for folder in folders:
        with contextlib.suppress(NoisytuneError):  # another user's, or one that nobody can finish
            if storage_at(folder).size(PLAN) is None:
                continue
            if folder in named:
                return named[folder], folder
            written = {Path(one.path) for one in open_folder(folder).job.outputs}
            if found := next((output for output in named.values() if output in written), None):
                return found, folder
    return None


def create_job(
    out: str, shares: Iterable[tuple[tuple[str, ...], int, bytes]], make: Callable[[tuple[Share, ...]], Job]
) -> tuple[JobFolder, bool]:
    """Make the job that `make` returns of its shares, unless it is there; return it and whether it was.

    Of each share the files, their bytes and its steps are given. Raises OutputUnsafe for another job there.
    """
    storage = storage_at(job_path(out))
    with storage.drafting() as draft:
        made = []
        for number, (files, nbytes, steps) in enumerate(shares, 1):
            (draft / f"{number}.json").write_bytes(steps)
            made.append(Share(files, nbytes, digest_of(steps)))
        job = make(tuple(made))
        plan = b"".join(job_pieces(job))
        folder = JobFolder(job, digest_of(plan).removeprefix("blake3:"), storage)
        _require_named(folder, out)
        there = storage.create(draft, folder.own, plan, job)
    if there == "other":
        raise OutputUnsafe(
            "another job is there",
            path=folder.path,
            why="its plan is not this one: the source, the options or the version differ",
            next_step="Finish that one, or remove its folder, then plan again",
        )
    return folder, there == "same"
