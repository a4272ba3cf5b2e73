"""A task: which columns hold text and label, what is predicted, and how it is scored.

The six small GLUE tasks are known by name and lie in a folder each; any other task is two files and the
names of their columns. The metrics tell the kind: pearson and spearman are regression, the others
classification. Labels become class indices in the order of the label names (numbers by value, else text).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from noisytune_cli.checkpoint.find import printable
from noisytune_cli.errors import InputUnreadable, UsageError
from noisytune_cli.study.data.rows import TableRow, malformed
from noisytune_cli.study.data.splits import Files, find_splits, split_files
from noisytune_cli.study.data.tables import read_table
from noisytune_cli.study.training import metrics


@dataclass(frozen=True)
class Task:
    """What is learnt: `text` has one column, or two for a pair; `metrics[0]` is the one that counts.

    `header` names the columns of files that have no header line.
    """

    name: str
    text: tuple[str, ...]
    label: str
    metrics: tuple[str, ...]
    header: tuple[str, ...] | None = None

    @property
    def regression(self) -> bool:
        """Whether a number is predicted, not a class."""
        return self.metrics[0] in metrics.REGRESSION


@dataclass(frozen=True)
class TaskRows:
    """Rows of a task: [n] tuples of one or two texts, and [n] class indices or numbers."""

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: Sequence[int]) -> TaskRows:
        """Return the rows at `places`, in that order."""
        return TaskRows(tuple(self.texts[i] for i in places), tuple(self.labels[i] for i in places))


@dataclass(frozen=True)
class Data:
    """A task's rows; `label_names` in the order of the class indices, empty for regression."""

    task: Task
    train: TaskRows
    dev: TaskRows
    label_names: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for a row: one for each class, or one."""
        return len(self.label_names) or 1


_PAIR = ("sentence1", "sentence2")

#: GLUE (Wang et al., 2019), with the metrics it reports.
GLUE = {
    "cola": Task(
        "cola", ("sentence",), "label", ("matthews", "accuracy"), ("source", "label", "mark", "sentence")
    ),
    "mrpc": Task("mrpc", ("#1 String", "#2 String"), "Quality", ("accuracy", "f1")),
    "rte": Task("rte", _PAIR, "label", ("accuracy",)),
    "sst2": Task("sst2", ("sentence",), "label", ("accuracy",)),
    "stsb": Task("stsb", _PAIR, "score", ("pearson", "spearman")),
    "wnli": Task("wnli", _PAIR, "label", ("accuracy",)),
}
#: What the official download calls each task's folder.
_FOLDERS = {
    "cola": "CoLA",
    "mrpc": "MRPC",
    "rte": "RTE",
    "sst2": "SST-2",
    "stsb": "STS-B",
    "wnli": "WNLI",
}


def glue_task(name: str) -> Task:
    """Return a GLUE task by name (sst2, sst-2, SST-2); UsageError for another."""
    known = name.lower().replace("-", "").replace("_", "")
    if known not in GLUE:
        raise UsageError(
            f"--task {name}",
            why="there is no such task",
            next_step=f"Use one of {', '.join(GLUE)}, or give --train, --dev, --text and --label",
        )
    return GLUE[known]


def glue_files(task: Task, folder: Path) -> tuple[Files, Files]:
    """Return a GLUE task's files to train on and score: in its own folder in `folder`, or in that itself."""
    known = _FOLDERS[task.name]
    for place in (folder / known, folder / task.name, folder / task.name.upper(), folder):
        if (place / "train.tsv").is_file():
            return (place / "train.tsv",), (place / "dev.tsv",)
    raise InputUnreadable(
        "cannot find the task's data",
        path=folder,
        why=f"neither train.tsv nor {known}/train.tsv lies there",
        next_step="Name the folder of the GLUE tasks, or of this one, with --data",
    )


def choose_task(
    *,
    task: str | None,
    data: str | None,
    train: str | None,
    dev: str | None,
    text: Sequence[str],
    label: str | None,
    chosen: Sequence[str],
) -> tuple[Task, Files, Files]:
    """Return the task with its files to train on and to score; `chosen` are metrics in place of its own.

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
    if bool(train) != bool(dev) or not (text and label) or not (train or data):
        raise UsageError(
            "no task",
            why="neither a task's name nor its files and columns are given",
            next_step="Give --task NAME --data DIR, or --text and --label with --train and --dev or --data",
        )
    if len(text) > 2:
        raise UsageError(
            f"--text {','.join(text)}",
            why="a row is one text or a pair",
            next_step="Name one column or two",
        )
    metrics_of_it = tuple(chosen) or ("accuracy",)
    if train and dev:
        own = Task(printable(Path(train).stem), tuple(text), label, metrics_of_it)
        return own, split_files(Path(train)), split_files(Path(dev))
    folder = Path(data or "")
    return Task(printable(folder.resolve().name), tuple(text), label, metrics_of_it), *find_splits(folder)


def choose_glue(option: str, name: str, data: str | None) -> tuple[Task, Files, Files]:
    """Return a GLUE task by name, with its files in the folder of --data."""
    task = glue_task(name)
    if data is None:
        raise UsageError(
            f"{option} {name} without --data",
            why="nothing is downloaded",
            next_step="Name the folder of the GLUE tasks with --data",
        )
    return task, *glue_files(task, Path(data))


def check_apart(option: str, name: str, files: Files, others: Mapping[str, Files]) -> None:
    """Raise UsageError where a GLUE task has the files of another; `others` are their training files by name.

    A folder that is one task's own is found for each, and RTE and WNLI call their columns alike.
    """
    for other, known in others.items():
        if other != name and known == files:
            raise UsageError(
                f"{option} {name}",
                why=f"it would be read from {files[0]}, as {other} is",
                next_step="Give the folder that the tasks' folders lie in with --data",
            )


def read_data(task: Task, train: Files, dev: Files) -> Data:
    """Read a task's files; InputInvalid, with line and column, for labels that make no sense."""
    columns = (*task.text, task.label)
    rows, dev_rows = (
        [row for path in files for row in read_table(path, columns, header=task.header)]
        for files in (train, dev)
    )
    if task.regression:
        return Data(
            task,
            _task_rows(rows, [_number(task.label, row) for row in rows]),
            _task_rows(dev_rows, [_number(task.label, row) for row in dev_rows]),
            label_names=(),
        )
    names, known = _label_names(task.label, rows), train[0].name
    index = {name: float(i) for i, name in enumerate(names)}
    for row in dev_rows:
        if row.values[-1] not in index:
            raise malformed(
                row.path,
                f'column "{task.label}" has the label "{row.values[-1]}", which no row of {known} has',
                "Correct the label, or the column's name with --label",
                row.line,
            )
    labels, dev_labels = ([index[row.values[-1]] for row in some] for some in (rows, dev_rows))
    return Data(task, _task_rows(rows, labels), _task_rows(dev_rows, dev_labels), names)


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


def _task_rows(table: Sequence[TableRow], labels: Sequence[float]) -> TaskRows:
    return TaskRows(tuple(row.values[:-1] for row in table), tuple(labels))


def _number(column: str, row: TableRow) -> float:
    try:
        value = float(row.values[-1])
        if not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        raise malformed(
            row.path,
            f'column "{column}" has "{row.values[-1]}", which is no number',
            "Correct it, or choose a classification metric with --metric",
            row.line,
        ) from None


#: More classes than any benchmark has; a column of numbers or of text given by mistake has.
_MOST_CLASSES = 1000


def _label_names(column: str, table: Sequence[TableRow]) -> tuple[str, ...]:
    names = {row.values[-1] for row in table}
    if "" in names:
        row = next(row for row in table if not row.values[-1])
        raise malformed(row.path, f'column "{column}" has no label', "Correct the line", row.line)
    if not 2 <= len(names) <= _MOST_CLASSES:
        raise malformed(
            table[0].path,
            f'column "{column}" has {len(names)} different labels',
            f"Classes are 2 to {_MOST_CLASSES}; for numbers choose --metric pearson or spearman",
        )
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return tuple(sorted(names))
    # NaN has no place among numbers: where it is a label, they are names.
    numbers = all(map(math.isfinite, values.values()))
    return tuple(sorted(names, key=lambda name: (values[name] if numbers else 0.0, name)))
