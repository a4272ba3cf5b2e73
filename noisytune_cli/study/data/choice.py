"""From options to a task and its files: a GLUE task by name, or files and columns that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from noisytune_cli.errors import UsageError
from noisytune_cli.study.data.tasks import Task, glue_files, glue_task
from noisytune_cli.study.training import metrics


def choose_task(
    *,
    task: str | None,
    data: str | None,
    train: str | None,
    dev: str | None,
    text: Sequence[str],
    label: str | None,
    chosen: Sequence[str],
) -> tuple[Task, Path, Path]:
    """Return the task with its train and dev file; `chosen` are metrics in place of its own.

    UsageError where the options contradict each other or are not enough.
    """
    _check_metrics(chosen)
    if task is not None:
        if train or dev or text or label:
            raise UsageError(
                f"--task {task} with --train, --dev, --text or --label",
                why="the task's files and columns are known",
                next_step="Give --task and --data, or the files and columns",
            )
        known, files, held = choose_glue("--task", task, data)
        return (replace(known, metrics=tuple(chosen)) if chosen else known), files, held
    if not (train and dev and text and label):
        raise UsageError(
            "no task",
            why="neither a task's name nor its files and columns are given",
            next_step="Give --task NAME --data DIR, or --train, --dev, --text and --label",
        )
    if len(text) > 2:
        raise UsageError(
            f"--text {','.join(text)}",
            why="a row is one text or a pair",
            next_step="Name one column or two",
        )
    own = Task(Path(train).stem, tuple(text), label, tuple(chosen) or ("accuracy",))
    return own, Path(train), Path(dev)


def choose_glue(option: str, name: str, data: str | None) -> tuple[Task, Path, Path]:
    """Return a GLUE task by name, with its train and dev file in the folder of --data."""
    task = glue_task(name)
    if data is None:
        raise UsageError(
            f"{option} {name} without --data",
            why="nothing is downloaded",
            next_step="Name the folder of the GLUE tasks with --data",
        )
    return task, *glue_files(task, Path(data))


def _check_metrics(chosen: Sequence[str]) -> None:
    known = (*metrics.CLASSIFICATION, *metrics.REGRESSION)
    for name in chosen:
        if name not in known:
            raise UsageError(
                f"--metric {name}", why="there is no such metric", next_step=f"Use one of: {', '.join(known)}"
            )
    if len({name in metrics.REGRESSION for name in chosen}) > 1:
        raise UsageError(
            f"--metric {','.join(chosen)}",
            why="some are of classes and some of numbers",
            next_step=f"Give either some of {', '.join(metrics.CLASSIFICATION)}, "
            f"or some of {', '.join(metrics.REGRESSION)}",
        )
