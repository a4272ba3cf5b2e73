"""Rows of a Parquet or Arrow file, as the hub and `datasets` keep them, by pyarrow where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from noisytune_cli.errors import InputInvalid, PackageMissing, unreadable
from noisytune_cli.study.data.rows import TableRow, as_text, check_columns, malformed

#: What an Arrow file begins with; a stream of Arrow, which is what `datasets` writes, does not.
_FILE = b"ARROW1"


def arrow_rows(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    """Yield the wanted columns of every row; PackageMissing without pyarrow."""
    if importlib.util.find_spec("pyarrow") is None:
        raise PackageMissing(
            "cannot read",
            path=path,
            why="pyarrow is not installed",
            next_step="Install it (pip install pyarrow), or give the rows as .tsv, .csv or .jsonl",
        )
    import pyarrow

    done = 0
    try:
        with open(path, "rb") as file:
            for names, batch in _batches(path, file, columns):
                check_columns(path, columns, names)
                lists = [batch.column(column).to_pylist() for column in columns]
                for number, values in enumerate(zip(*lists, strict=True), start=done + 1):
                    named = zip(columns, values, strict=True)
                    yield TableRow(path, number, tuple(as_text(path, c, value, number) for c, value in named))
                done += len(lists[0])
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # What pyarrow finds in a damaged page is an OSError, too, but not one of the system's.
        raise (_damaged(path, error) if error.errno is None else unreadable(error, path)) from error


def _batches(path: Path, file: BinaryIO, columns: Sequence[str]) -> Iterable[tuple[list[str], Any]]:
    """Yield the file's batches, each with the names of all columns that the file has."""
    from pyarrow import ipc, parquet

    if path.suffix.lower() == ".parquet":
        reader = parquet.ParquetFile(file)
        names = list(reader.schema_arrow.names)
        check_columns(path, columns, names)
        return ((names, batch) for batch in reader.iter_batches(columns=list(dict.fromkeys(columns))))
    start = file.read(len(_FILE))
    file.seek(0)
    if start != _FILE:
        return ((list(batch.schema.names), batch) for batch in ipc.open_stream(file))
    whole = ipc.open_file(file)
    return ((list(whole.schema.names), whole.get_batch(index)) for index in range(whole.num_record_batches))


def _damaged(path: Path, error: Exception) -> InputInvalid:
    lines = str(error).strip().splitlines()
    return malformed(path, lines[0] if lines else type(error).__name__, "Fetch or write the file again")
