"""Which shares a process does: as it is told, or as the scheduler that started it says in its environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from noisytune_cli.errors import UsageError

_MOST = 10_000_000


class _Array(NamedTuple):
    """The variables of a scheduler: a task's number, that of the first, the step between two, how many.

    A first or a step that is digits is always that.
    """

    name: str
    number: str
    first: str
    step: str
    size: str


_ARRAYS = (
    _Array(
        "a Slurm array",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_STEP",
        "SLURM_ARRAY_TASK_COUNT",
    ),
    _Array("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", "0", "1", "AWS_BATCH_JOB_ARRAY_SIZE"),
    _Array("a Kubernetes indexed job", "JOB_COMPLETION_INDEX", "0", "1", "JOB_COMPLETIONS"),
    # What srun starts at once.
    _Array("Slurm tasks", "SLURM_PROCID", "0", "1", "SLURM_NTASKS"),
)


def read_share(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (k, n): every n-th share from the k-th on, counted from 1; (1, 1) are all.

    Raises UsageError for what is no share, and where `env` finds no scheduler.
    """
    if text is None:
        return 1, 1
    if text == "env":
        return _from_environment(environment)
    found = re.fullmatch(r"([0-9]{1,8})/([0-9]{1,8})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) <= _MOST:
        raise UsageError(
            f"--share {text}",
            why="it is not K/N with K from 1 to N",
            next_step="Write for example --share 3/64, or --share env",
        )
    return int(found[1]), int(found[2])


def _from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    for array in _ARRAYS:
        if array.number not in environment:
            continue
        number, first, step, size = (
            _number(name, array, environment) for name in (array.number, array.first, array.step, array.size)
        )
        place, rest = divmod(number - first, step)
        if rest or not 0 <= place < size:
            raise UsageError(
                "--share env",
                why=f"{array.number} is {number}, which is none of the {size} numbers of {array.name}",
                next_step="Give --share K/N",
            )
        return place + 1, size
    raise UsageError(
        "--share env",
        why="no variable of Slurm, Kubernetes or AWS Batch is set",
        next_step="Give --share K/N, or run it as a task of one of these",
    )


def _number(name: str, array: _Array, environment: Mapping[str, str]) -> int:
    text = name if name.isdigit() else environment.get(name)
    lowest = 1 if name in (array.step, array.size) else 0
    if text is None or not re.fullmatch("[0-9]{1,8}", text) or int(text) < lowest:
        raise UsageError(
            "--share env",
            why=f"{name} is {'not set' if text is None else text[:40]}, and {array.name} needs it",
            next_step=f"Set {name} to a number, or give --share K/N",
        )
    return int(text)
