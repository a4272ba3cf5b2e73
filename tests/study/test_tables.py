"""Rows from TSV, CSV and JSONL, and the line and column that every complaint names."""

from __future__ import annotations

from pathlib import Path

import pytest

from noisytune_cli.errors import InputInvalid, InputUnreadable
from noisytune_cli.study.data.rows import TableRow
from noisytune_cli.study.data.tables import read_table

COLUMNS = ("text", "label")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_tsv_file_has_no_quoting(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'id\tlabel\ttext\n7\t1\t" He said , 5\n8\t0\tx\x0by\u2028z\n')
    assert read_table(path, COLUMNS) == [
        TableRow(path, 2, ('" He said , 5', "1")),
        TableRow(path, 3, ("x\x0by\u2028z", "0")),
    ]


def test_a_tsv_file_may_have_no_header_a_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "\ufeffé\t1\r\nb\t0\r\n")
    found = read_table(path, COLUMNS, header=COLUMNS)
    assert found == [
        TableRow(path, 1, ("é", "1")),
        TableRow(path, 2, ("b", "0")),
    ]


def test_a_csv_file_has_quoting(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,label\n"one, two",1\n"three\nfour",0\n')
    assert read_table(path, COLUMNS) == [
        TableRow(path, 2, ("one, two", "1")),
        TableRow(path, 4, ("three\nfour", "0")),
    ]


def test_a_cell_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    book = "word " * 100_000
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(tmp_path, name, f"text{separator}label\n{book}{separator}1\n")
        assert read_table(path, COLUMNS) == [TableRow(path, 2, (book, "1"))]


def test_a_jsonl_file_holds_objects(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.jsonl", '{"text": "a", "label": 1, "more": []}\n\n{"label": "x", "text": "b"}\n'
    )
    assert read_table(path, COLUMNS) == [TableRow(path, 1, ("a", "1")), TableRow(path, 3, ("b", "x"))]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "", "it is empty"),
        ("a.tsv", "text\tlabel\n", "it holds no rows"),
        ("a.jsonl", "\n", "it holds no rows"),
        ("a.tsv", "text\tmark\na\t1\n", 'there is no column "label"; the columns are text, mark'),
        ("a.csv", "text,label,label\na,1,1\n", 'two columns are called "label"'),
        ("a.tsv", "text\tlabel\na\t1\nb\t1\t2\n", "line 3: 3 columns where there should be 2"),
        ("a.csv", "text,label\na\n", "line 2: 1 columns where there should be 2"),
        ("a.csv", 'text,label\n"a"b,1\n', "line 2: "),
        ("a.tsv", b"text\tlabel\na\t1\n\xffb\t1\n", "line 3: byte 1 is not UTF-8"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2: it is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: it is not JSON"),
        ("a.jsonl", "[1]\n", "line 1: it is not a JSON object"),
        ("a.jsonl", '{"text": "a"}\n', 'line 1: there is no column "label"; the columns are text'),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', 'line 1: column "text" is neither text nor a number'),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', 'line 1: column "label" is neither text nor a number'),
        (
            "a.jsonl",
            '{"text": "a \\ud83d", "label": 1}\n',
            'line 1: column "text" has half of a surrogate',
        ),
        ("a.txt", "x", "the file's name ends in .txt"),
    ],
)
def test_what_is_malformed_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputInvalid) as caught:
        read_table(path, COLUMNS)
    assert said in caught.value.line()
    assert str(path) in caught.value.line()


def test_a_file_that_is_not_there_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(InputUnreadable):
        read_table(tmp_path / "a.tsv", COLUMNS)
