"""The engine of this process: share after share, with all threads on each, and nothing to start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from noisytune_cli.commands.engines import Answer, Call, Report, Run, Task
from noisytune_cli.errors import UsageError


@contextmanager
def started(address: str | None, threads: int | None) -> Iterator[Run]:
    """Start nothing; UsageError for an address."""
    if address is not None:
        raise UsageError(
            "--address", why="it is that of a cluster of Ray", next_step="Add --engine ray, or leave it out"
        )
    yield _run


def _run(call: Call, tasks: Sequence[Task], report: Report) -> Iterator[tuple[int, Answer]]:
    for number, task in enumerate(tasks):
        yield number, call(task, report)
