"""The engine of this process: share after share, with all threads on each, and nothing to start.

What is left of a share when the threads are done with it, the next does not wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from noisytune_cli.commands.engines import Answer, Call, Later, Report, Run, Task
from noisytune_cli.engine.behind import some_behind


@contextmanager
def started(address: str | None, threads: int | None) -> Iterator[Run]:
    """Start nothing."""
    yield _run


def _run(call: Call, tasks: Sequence[Task], report: Report) -> Iterator[tuple[int, Answer]]:
    def begun() -> Iterator[Later]:
        for task in tasks:
            answer = call(task, report)
            yield answer if callable(answer) else partial(dict, answer)

    yield from enumerate(some_behind(begun()))
