"""Engines: where the shares of a job are done; one file each, behind one contract.

An engine module's name is the name a user types. It offers

    started(address, threads) -> context manager of a Run      start or join it, and leave it as it was

A `Run` takes a function, tasks for it and a progress to report to, and yields (number of the task, answer) in
the order in which they end. Tasks and answers are plain data (`dict` of text and numbers), the function is
one of a module that is there on every machine. What ends without an answer (a process was killed, a machine
lost) is answered `{"died": why}`; whether it is tried again is not the engine's to say. A task says by
`nbytes` how much it reports. The function may answer with another, which does the rest and has the answer:
that mostly waits, for a device or a store, so the next task may be begun before it is called.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from noisytune_cli.errors import NoisytuneError, ResourceExhausted, UsageError, from_plain

Task = dict[str, Any]
Answer = dict[str, Any]
Report = Callable[[int], None]
Later = Callable[[], Answer]
Call = Callable[[Task, Report], Answer | Later]
Run = Callable[[Call, Sequence[Task], Report], Iterator[tuple[int, Answer]]]
#: Of the address, None for none, and the threads that each task may use, None for the engine to say.
Start = Callable[[str | None, int | None], AbstractContextManager[Run]]

#: The exit codes of errors that may be gone the next time, and how often a task is tried for them.
PASSING, _TRIES = (6, 7), 3


def names() -> tuple[str, ...]:
    """Return the engines that there are: the modules of this package."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def check(engine: str, address: str | None = None) -> None:
    """Raise UsageError for a name that no engine has, and for an address where nothing can be joined."""
    if engine not in names():
        raise UsageError(
            f"--engine={engine}",
            why="there is no such engine",
            next_step=f"Use one of: {', '.join(names())}",
        )
    if address is not None and engine != "ray":
        raise UsageError(
            "--address", why="it is that of a cluster of Ray", next_step="Add --engine=ray, or leave it out"
        )


def load(engine: str, address: str | None = None) -> Start:
    """Return what starts an engine, or joins the one at an address; UsageError as `check` has it."""
    check(engine, address)
    started: Start = importlib.import_module(f"noisytune_cli.commands.engines.{engine}").started
    return started


def complete(run: Run, call: Call, tasks: Sequence[Task], report: Report) -> list[Answer]:
    """Do all tasks, each up to three times where what failed may pass; return their answers in order.

    The first error that will not pass is raised.
    """
    answers: dict[int, Answer] = {}
    left = list(range(len(tasks)))
    for attempt in range(1, _TRIES + 1):
        again: dict[int, NoisytuneError] = {}
        for place, answer in run(call, [tasks[number] for number in left], report):
            error = _error_of(answer)
            if error is None:
                answers[left[place]] = answer
            elif error.exit_code in PASSING and attempt < _TRIES:
                again[left[place]] = error
            else:
                raise error
        left = sorted(again)
        if not left:
            break
    return [answers[number] for number in range(len(tasks))]


def _error_of(answer: Answer) -> NoisytuneError | None:
    if "died" in answer:
        return ResourceExhausted(
            "a share ended without a word",
            why=str(answer["died"]),
            next_step="Find out what ends its process, then give the same command again: it goes on",
        )
    return from_plain(answer["error"]) if answer.get("error") else None
