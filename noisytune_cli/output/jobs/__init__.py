"""Where a job lies, and its weight files until they are an output: a folder, or what lies below an address.

Both keep one contract (`JobStorage`): who plans, works and finishes need not know which. `own` is what
belongs to the plan of one digest; names are relative to the job, with `/`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from noisytune_cli.checkpoint.address import Place
from noisytune_cli.errors import InputUnreadable
from noisytune_cli.manifest.job import Job
from noisytune_cli.output.publish import Publication

#: The plan, and what it is called where a job that is finished is being removed.
PLAN, FINISHED = "plan.json", "finished.json"


class JobStorage(ABC):
    """A job's files: each appears whole and durable, and may be written again with the same bytes.

    What is written where its plan is gone by then, or another's is there, raises `no_job`, and is not left
    there.
    """

    path: Place
    #: Whether what a share leaves may be kept and put by another thread: what cannot be given up is not.
    beside: bool

    @abstractmethod
    def require_trusted(self) -> None:
        """Raise OutputUnsafe for a job that anybody may have put there."""

    @abstractmethod
    def stands(self, own: str) -> bool:
        """Tell whether the plan that was opened, or made, is there still, and no other in its place."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return how long a file is, None where there is none."""

    @abstractmethod
    def names(self, folder: str) -> frozenset[str]:
        """Return the names of the files in a folder, of none where it is not there."""

    @abstractmethod
    def reading(self, name: str) -> AbstractContextManager[Path]:
        """Have a file be here to be read; errors name it by where it lies. Raises InputUnreadable."""

    @abstractmethod
    def reading_output(self, file: Place) -> AbstractContextManager[Path | None]:
        """Have a manifest of an output be here to be read; None where there is none."""

    @abstractmethod
    def put(self, content: Iterable[bytes], name: str) -> None:
        """Make a file from its bytes."""

    @abstractmethod
    def growing(self, own: str, share: int) -> AbstractContextManager[Path]:
        """Make a folder here for what a share writes; it goes in the end."""

    @abstractmethod
    def keep(self, made: Path, name: str, final: Place) -> None:
        """Take a whole and durable weight file out of what `growing` gave: to be `final` in the output.

        It is called `name` in the job, where it lies there until then.
        """

    @abstractmethod
    def kept(self, name: str, final: Place) -> int | None:
        """Return how long a weight file is that was kept, None where there is none."""

    @abstractmethod
    def adopt(self, publication: Publication, as_name: str, name: str, size: int) -> None:
        """Let a weight file that was kept, and has to be of this size, be that of a publication."""

    @abstractmethod
    def drafting(self) -> AbstractContextManager[Path]:
        """Make a folder here for the steps of a job that is being planned; it goes in the end."""

    @abstractmethod
    def create(self, draft: Path, own: str, plan: bytes, job: Job) -> Literal["made", "same", "other"]:
        """Make the job of a plan and the steps in `draft`, unless there is one: the same, or another."""

    @abstractmethod
    def clear(self, output: Place, claim: bytes) -> tuple[str, ...]:
        """Remove what a `finish` that was killed left at an output that is complete; return what it was."""

    @abstractmethod
    def remove(self, own: str, plan: Iterable[bytes]) -> bool:
        """Remove the job, so that its plan is gone first; return whether nothing is known to be left of it.

        It comes after the output is published, so it raises nothing. Another one that has come to be in its
        place by then stays, and so does one that is being planned.
        """


def own_of(name: str) -> str:
    """Return which plan's a file of a job is."""
    return name.partition("/")[0]


def claim_of(own: str) -> bytes:
    """Return what a job claims its outputs with in an object store."""
    return json.dumps({"plan": own}).encode() + b"\n"


def no_job(path: Place) -> InputUnreadable:
    """Return the error for a job that is not there."""
    return InputUnreadable(
        "there is no job",
        path=path,
        why="it was finished, was removed, or was never planned",
        next_step="Name OUT as noisytune plan was given it, or plan the job first",
    )
