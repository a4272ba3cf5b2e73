"""Committing several outputs: all are staged and sealed before the first, then each is put in place in turn.

Where one fails, or a signal comes, those before it stay, for they are complete; those after it leave nothing;
and the error, or what is told of the signal, says which is which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from noisytune_cli.checkpoint.address import Address, Place
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import NOTHING_PUBLISHED, NoisytuneError, Stopped
from noisytune_cli.output import signals
from noisytune_cli.output.overwrite import Seen
from noisytune_cli.output.publish import Publication

#: Characters of a list of names that an error line has room for.
_ROOM = 160


def publication_at(
    output: Place,
    *,
    directory: bool,
    overwrite: bool,
    recipe: bool = False,
    seen: Seen | None = None,
    progress: Progress,
    job_claim: bytes | None = None,
) -> Publication:
    """Return the publication of an output that goes here, or into an object store.

    `seen` is what was there when it was asked whether that may be replaced (`require_unchanged`).
    `progress` shows what is sent there; `job_claim` is what a job has claimed the place with.
    """
    if isinstance(output, Address):
        from noisytune_cli.output.remote import RemotePublication  # most outputs are here

        return RemotePublication(
            output, directory=directory, recipe=recipe, progress=progress, job_claim=job_claim
        )
    return Publication(output, directory=directory, overwrite=overwrite, recipe=recipe, seen=seen)


@contextmanager
def all_staged(publications: Sequence[Publication]) -> Iterator[None]:
    """Enter all publications, and leave them together: a signal cannot come between two of them."""
    with ExitStack() as staged:
        with signals.deferred():
            for publication in publications:
                staged.enter_context(publication)
        try:
            yield
        finally:
            with signals.deferred():
                staged.close()


def commit_all(publications: Sequence[Publication]) -> list[Place]:
    """Commit sealed outputs in their order; return the paths of their manifests."""
    try:
        paths = [publication.commit() for publication in publications]
        signals.leave(_which(publications))
        return paths
    except Stopped as stopped:
        if any(publication.published for publication in publications):
            stopped.left = _which(publications)
        raise
    except NoisytuneError as error:
        if not any(publication.published for publication in publications):
            raise
        raise type(error)(
            error.what,
            path=error.path,
            why=f"{error.why.removesuffix(NOTHING_PUBLISHED).removesuffix('; ')}; {_which(publications)}",
            next_step=f"{error.next_step} for those that are not",
        ) from error


def _which(publications: Sequence[Publication]) -> str:
    done = [publication.shown for publication in publications if publication.published]
    rest = [publication.shown for publication in publications if not publication.published]
    told = f"{_named(done)} published"
    return f"{told}, {_named(rest)} not" if rest else told


def _named(outputs: Sequence[Place]) -> str:
    """Name the outputs; of many, which come in a known order, the first and the last."""
    verb = "is" if len(outputs) == 1 else "are"
    names = [output.name for output in outputs]
    if len({output.parent for output in outputs}) > 1:
        names = [str(output) for output in outputs]
    text = ", ".join(names)
    if len(text) > _ROOM:
        text = f"{names[0]} … {names[-1]} ({len(names)})"
    return f"{text} {verb}"
