"""status: what of a job is done, and what is left."""

from __future__ import annotations

from dataclasses import dataclass

from noisytune_cli.output.job_folder import JobFolder, open_job


@dataclass(frozen=True)
class Status:
    """A job, and the numbers of its shares, from 1, that are still to be summed up and to be done."""

    folder: JobFolder
    lacking_sums: tuple[int, ...]
    left: tuple[int, ...]

    @property
    def shares(self) -> int:
        """How many shares there are."""
        return len(self.folder.job.shares)

    @property
    def done_bytes(self) -> int:
        """Bytes of the source in the shares that are done."""
        return sum(share.nbytes for n, share in enumerate(self.folder.job.shares, 1) if n not in self.left)

    @property
    def nbytes(self) -> int:
        """Bytes of the source in all shares."""
        return sum(share.nbytes for share in self.folder.job.shares)


def status(out: str) -> Status:
    """Tell how far the job of `out` is; raises InputUnreadable where there is none."""
    folder = open_job(out)
    return Status(
        folder,
        tuple(number + 1 for number in folder.lacking_sums),
        tuple(number + 1 for number in folder.left),
    )
