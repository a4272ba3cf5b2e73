"""Folders of rows as `datasets` and the hub lay them out, and Parquet and Arrow files by pyarrow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from noisytune_cli.errors import InputInvalid, InputUnreadable, PackageMissing
from noisytune_cli.study.data.rows import TableRow
from noisytune_cli.study.data.splits import find_splits, split_files
from noisytune_cli.study.data.tables import read_table
from noisytune_cli.study.data.tasks import Task, choose_task, read_data

COLUMNS = ("text", "label")


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text,label\na,0\nb,1\n")
    return folder


@pytest.mark.parametrize(
    ("names", "train", "dev"),
    [
        (("train.csv", "dev.csv"), ["train.csv"], ["dev.csv"]),
        (("train.csv", "test.csv", "validation.csv"), ["train.csv"], ["validation.csv"]),
        (("train.csv", "test.csv"), ["train.csv"], ["test.csv"]),
        (
            (
                *("data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"),
                *("data/validation-00000-of-00001.parquet", "README.md"),
            ),
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            ["data/validation-00000-of-00001.parquet"],
        ),
        (
            ("default/train/0001.parquet", "default/train/0000.parquet", "default/test/0000.parquet"),
            ["default/train/0000.parquet", "default/train/0001.parquet"],
            ["default/test/0000.parquet"],
        ),
        (("my_train.tsv", "my_val.tsv", ".cache/train.tsv"), ["my_train.tsv"], ["my_val.tsv"]),
        (
            (
                "data/train-00000-of-00002-6b8cc6c2a0e3ab34.parquet",
                "data/train-00001-of-00002-f7c7a2f8d2b05b61.parquet",
                "data/test-00000-of-00001-0a4a6c7b22fe1c44.parquet",
            ),
            [
                "data/train-00000-of-00002-6b8cc6c2a0e3ab34.parquet",
                "data/train-00001-of-00002-f7c7a2f8d2b05b61.parquet",
            ],
            ["data/test-00000-of-00001-0a4a6c7b22fe1c44.parquet"],
        ),
    ],
)
def test_splits_are_found_by_their_names(
    tmp_path: Path, names: tuple[str, ...], train: list[str], dev: list[str]
) -> None:
    found = find_splits(lay(tmp_path, *names))
    assert found == (tuple(tmp_path / name for name in train), tuple(tmp_path / name for name in dev))


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        (("train.csv",), InputUnreadable, "cannot find the rows to score"),
        (("a.csv", "dev.csv"), InputUnreadable, "cannot find the rows to train on"),
        (("train.txt", "dev.txt"), InputUnreadable, "cannot find the rows to train on"),
        (("train.csv", "train.tsv", "dev.csv"), InputInvalid, "any of train.csv, train.tsv"),
        (
            ("train.csv", "validation_matched.csv", "validation_mismatched.csv"),
            InputInvalid,
            "any of validation_matched.csv, validation_mismatched.csv",
        ),
        (("a/train.csv", "b/train.csv", "b/dev.csv"), InputInvalid, "any of a/train.csv, b/train.csv"),
    ],
)
def test_splits_are_not_guessed(tmp_path: Path, names: tuple[str, ...], kind: Any, said: str) -> None:
    with pytest.raises(kind) as caught:
        find_splits(lay(tmp_path, *names))
    assert said in caught.value.line()
    assert "Name the files with --train and --dev" in caught.value.line()


@pytest.mark.parametrize(
    "shards",
    [
        ("train-00001-of-00002.csv",),
        ("train-00000-of-00003.csv", "train-00002-of-00003.csv"),
        # What an earlier upload left, and the file from which shards were made: rows would come twice.
        ("train-00000-of-00001.csv", "train-00000-of-00002.csv", "train-00001-of-00002.csv"),
        ("train.csv", "train-00000-of-00001.csv"),
    ],
)
def test_a_split_of_which_shards_lack_is_refused(tmp_path: Path, shards: tuple[str, ...]) -> None:
    lay(tmp_path, *shards, "dev.csv", "test-00001-of-00002.csv")
    with pytest.raises(InputInvalid, match="a split is not whole") as caught:
        find_splits(tmp_path)
    assert all(name in caught.value.line() for name in shards)
    alone = lay(tmp_path / "alone", *shards)
    with pytest.raises(InputInvalid, match="a split is not whole"):
        split_files(alone)


def test_shards_may_be_counted_from_one(tmp_path: Path) -> None:
    names = ("train-1-of-2.csv", "train-2-of-2.csv")
    assert split_files(lay(tmp_path, *names)) == tuple(tmp_path / name for name in names)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", lay(tmp_path, "file.csv") / "file.csv"):
        with pytest.raises(InputUnreadable, match="Not a directory"):
            find_splits(path)


def test_a_folder_s_task_goes_by_its_name_and_joins_shards(tmp_path: Path) -> None:
    folder = lay(tmp_path / "opinions", "train-00000-of-00002.csv", "train-00001-of-00002.csv", "dev.csv")
    chosen = {"task": None, "data": str(folder), "text": ("text",), "label": "label", "chosen": ()}
    task, train, dev = choose_task(**chosen, train=None, dev=None)  # type: ignore[arg-type]
    assert task == Task("opinions", ("text",), "label", ("accuracy",))
    data = read_data(task, train, dev)
    assert data.train.texts == (("a",), ("b",), ("a",), ("b",))
    assert data.dev.labels == (0.0, 1.0)
    (folder / "train-00001-of-00002.csv").write_text("text,label\na,0\nb\n")
    with pytest.raises(InputInvalid, match=r"train-00001-of-00002.csv: line 3: 1 columns"):
        read_data(task, train, dev)


def test_a_split_may_be_a_folder_of_its_own(tmp_path: Path) -> None:
    lay(tmp_path, "train/data-00000-of-00002.csv", "train/data-00001-of-00002.csv", "dev.csv")
    assert [path.name for path in split_files(tmp_path / "train")] == [
        "data-00000-of-00002.csv",
        "data-00001-of-00002.csv",
    ]
    lay(tmp_path, "train/more.csv")
    with pytest.raises(InputInvalid, match=r"any of data.csv, more.csv"):
        split_files(tmp_path / "train")


def test_the_files_that_state_json_names_are_those_of_the_split(tmp_path: Path) -> None:
    """So caches are not, which `datasets` lays beside them."""
    lay(tmp_path, "train/data-00000-of-00001.csv", "train/cache-0a1b.csv")
    state = {"_data_files": [{"filename": "data-00000-of-00001.csv"}]}
    (tmp_path / "train/state.json").write_text(json.dumps(state))
    assert split_files(tmp_path / "train") == (tmp_path / "train/data-00000-of-00001.csv",)


def test_without_pyarrow_the_next_step_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    with pytest.raises(PackageMissing) as caught:
        read_table(tmp_path / "train.parquet", COLUMNS)
    assert caught.value.line() == (
        f"cannot read: {tmp_path}/train.parquet: pyarrow is not installed. "
        "Install it (pip install pyarrow), or give the rows as .tsv, .csv or .jsonl."
    )


def written(path: Path, columns: dict[str, Any], kind: str) -> Path:
    """Write a table by pyarrow: Parquet in two row groups, or Arrow as a stream or a file in two batches."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(columns)
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=2)
        return path
    make = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_parquet_and_arrow_files_are_read_by_pyarrow(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    written(path, {"idx": [7, 8, 9], "label": [1, 0, 1], "text": ["a\tb", "c\nd", "é"]}, kind)
    assert read_table(path, COLUMNS) == [
        TableRow(path, 1, ("a\tb", "1")),
        TableRow(path, 2, ("c\nd", "0")),
        TableRow(path, 3, ("é", "1")),
    ]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["a", "b"]}, 'there is no column "label"; the columns are text'),
        ({"text": ["a", "b", None], "label": [1, 0, 1]}, 'row 3: column "text" is neither text nor a number'),
        ({"text": [["a"]], "label": [1]}, 'row 1: column "text" is neither text nor a number'),
        ({"text": [""][:0], "label": [1][:0]}, "it holds no rows"),
    ],
)
def test_what_a_table_lacks_is_named(tmp_path: Path, kind: str, columns: dict[str, Any], said: str) -> None:
    path = written(tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow"), columns, kind)
    with pytest.raises(InputInvalid) as caught:
        read_table(path, COLUMNS)
    assert said in caught.value.line()


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_damaged_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    whole = written(path, {"text": ["abc"] * 99, "label": [1] * 99}, kind).read_bytes()
    for damaged in (b"", whole[:9], whole[: len(whole) // 2], b"x" * 99):
        path.write_bytes(damaged)
        with pytest.raises(InputInvalid) as caught:
            read_table(path, COLUMNS)
        assert str(path) in caught.value.line()
        assert "\n" not in caught.value.line()
