"""Tasks: labels as class indices or numbers, and the six GLUE tasks as they are released."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from noisytune_cli.errors import InputInvalid, InputUnreadable, UsageError
from noisytune_cli.study.data.tasks import Data, Task, glue_files, glue_task, read_data

CLASSES = Task("mine", ("text",), "label", ("accuracy",))
NUMBERS = Task("mine", ("text",), "label", ("pearson",))


def read(folder: Path, task: Task, train: str, dev: str) -> Data:
    paths = folder / "train.tsv", folder / "dev.tsv"
    for path, rows in zip(paths, (train, dev), strict=True):
        path.write_text("text\tlabel\n" + "".join(f"t\t{label}\n" for label in rows.split(" ")))
    return read_data(task, paths[:1], paths[1:])


def test_label_names_are_in_order_and_make_the_class_indices(tmp_path: Path) -> None:
    data = read(tmp_path, CLASSES, "yes no maybe no", "no yes")
    assert data.label_names == ("maybe", "no", "yes")
    assert data.outputs == 3
    assert data.train.labels == (2, 1, 0, 1)
    assert data.dev.labels == (1, 2)


def test_numbers_as_labels_are_ordered_by_value(tmp_path: Path) -> None:
    assert read(tmp_path, CLASSES, "10 9 -1", "9").label_names == ("-1", "9", "10")
    # With a label that has no place among numbers all are names, whatever order a set has.
    assert read(tmp_path, CLASSES, "2 nan 10 inf", "2").label_names == ("10", "2", "inf", "nan")


def test_regression_reads_numbers(tmp_path: Path) -> None:
    data = read(tmp_path, NUMBERS, "0.5 3 1e1", "-2")
    assert (data.label_names, data.outputs) == ((), 1)
    assert data.train.labels == (0.5, 3.0, 10.0)
    assert data.dev.labels == (-2.0,)


@pytest.mark.parametrize(
    ("task", "train", "dev", "said"),
    [
        (
            CLASSES,
            "a b",
            "a c",
            'dev.tsv: line 3: column "label" has the label "c", which no row of train.tsv',
        ),
        (CLASSES, "a a", "a", 'train.tsv: column "label" has 1 different labels'),
        (CLASSES, " ".join(map(str, range(1001))), "1", 'column "label" has 1001 different labels'),
        (CLASSES, "a  b", "a", 'line 3: column "label" has no label'),
        (NUMBERS, "1 x", "1", 'train.tsv: line 3: column "label" has "x", which is no number'),
        (NUMBERS, "1 2", "nan", 'dev.tsv: line 2: column "label" has "nan", which is no number'),
    ],
)
def test_labels_that_make_no_sense_are_refused_with_their_place(
    tmp_path: Path, task: Task, train: str, dev: str, said: str
) -> None:
    with pytest.raises(InputInvalid) as caught:
        read(tmp_path, task, train, dev)
    assert said in caught.value.line()


#: Rows of train and dev, the outputs, and the share of the largest class (or the mean) in dev, as released.
RELEASED = {
    "rte": (2490, 277, 2, 146),
    "mrpc": (3668, 408, 2, 279),
    "cola": (8551, 1043, 2, 721),
    "sst2": (67349, 872, 2, 444),
    "stsb": (5749, 1500, 1, None),
    "wnli": (635, 71, 2, 40),
}


@pytest.mark.parametrize("name", RELEASED)
def test_each_glue_task_is_read_as_it_is_released(data: Path, name: str) -> None:
    train, dev, outputs, largest = RELEASED[name]
    task = glue_task(name)
    found = read_data(task, *glue_files(task, data / "glue"))
    assert (len(found.train), len(found.dev), found.outputs) == (train, dev, outputs)
    assert all(texts[0] and len(texts) == len(task.text) for texts in found.dev.texts)
    if largest is not None:
        assert max(Counter(found.dev.labels).values()) == largest
    else:
        assert min(found.dev.labels) == 0.0
        assert max(found.dev.labels) == 5.0


def test_a_glue_task_is_found_by_other_spellings_and_in_its_own_folder(tmp_path: Path) -> None:
    assert glue_task("SST-2") is glue_task("sst2")
    (tmp_path / "train.tsv").touch()
    assert glue_files(glue_task("rte"), tmp_path) == ((tmp_path / "train.tsv",), (tmp_path / "dev.tsv",))


def test_a_task_s_own_folder_comes_before_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    for path in (tmp_path / "train.tsv", tmp_path / "RTE/train.tsv"):
        path.touch()
    assert glue_files(glue_task("rte"), tmp_path)[0] == (tmp_path / "RTE/train.tsv",)


def test_an_unknown_task_and_a_folder_without_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cola, mrpc, rte, sst2, stsb, wnli"):
        glue_task("mnli")
    with pytest.raises(InputUnreadable, match=r"neither train.tsv nor RTE/train.tsv lies there"):
        glue_files(glue_task("rte"), tmp_path)
