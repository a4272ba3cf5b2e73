"""Where the rows to train on and the rows to score lie in a folder, as `datasets` and the hub lay them out.

A split is one file, or shards of one name (`train-00000-of-00002.parquet`); `datasets.save_to_disk` makes a
folder of each, whose state.json names its files. Nothing is guessed: where more than one could be meant, they
are named and it is left to --train and --dev.
"""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

from noisytune_cli.errors import InputInvalid, InputUnreadable, unreadable
from noisytune_cli.escape import list_some
from noisytune_cli.study.data.tables import FORMATS

#: The files of one split, in order.
Files = tuple[Path, ...]

#: What splits are called: a word of the name, in the order in which they are looked for.
_TRAIN = (frozenset({"train", "training"}),)
_DEV = (
    frozenset({"validation", "valid", "val", "dev"}),
    frozenset({"test", "testing", "eval", "evaluation"}),
)

#: The end of a shard's name, which tells how many there are (the hub once put a digest behind), or all of it.
_SHARD = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?$|^\d+$")

#: How deep a split may lie: in the folder, in `data/`, or in `data/train/`.
_DEPTHS = ("*", "*/*", "*/*/*")


def split_files(path: Path) -> Files:
    """Return a file alone, or the files of a folder that holds one split."""
    if not path.is_dir():
        return (path,)
    found = _grouped(path, _DEPTHS[:1])
    if len(found) != 1:
        raise _unclear(path, "the rows", found)
    return _whole(next(iter(found.values())))


def find_splits(folder: Path) -> tuple[Files, Files]:
    """Return the files to train on and those to score: the validation split's, else the test split's."""
    found = _grouped(folder, _DEPTHS)
    train = _find(folder, "the rows to train on", _TRAIN, found)
    return train, _find(folder, "the rows to score", _DEV, found)


def _find(
    folder: Path, what: str, names: tuple[frozenset[str], ...], found: dict[tuple[Path, str], Files]
) -> Files:
    for words in names:
        some = {place: files for place, files in found.items() if words & {*_words(folder, place)}}
        if len(some) == 1:
            return _whole(next(iter(some.values())))
        if some:
            raise _unclear(folder, what, some)
    raise _unclear(folder, what, {})


def _whole(files: Files) -> Files:
    """Return a split's files; InputInvalid where shards lack, or lie beside those of another number."""
    told = [_SHARD.search(path.stem) for path in files]
    numbers = [(int(shard[1]), int(shard[2])) for shard in told if shard and shard[2]]
    if not numbers:
        return files
    total = max(of for _, of in numbers)
    counted = [[(number, total) for number in range(first, first + total)] for first in (0, 1)]
    if len(numbers) == len(files) and sorted(numbers) in counted:
        return files
    raise InputInvalid(
        "a split is not whole",
        path=files[0].parent,
        why=f"not each of {total} shards is there once, but {list_some([path.name for path in files])}",
        next_step="Fetch the split again, or put the files that you mean into a folder of their own",
    )


def _words(folder: Path, place: tuple[Path, str]) -> list[str]:
    """Return the words that a split goes by: those of its name, or of its folder where that says nothing."""
    parent, name = place
    stem = name.partition(".")[0]
    if parent != folder and stem in ("data", "part", ""):
        stem = parent.name
    return re.split(r"[^a-z0-9]+", stem.lower())


def _grouped(folder: Path, depths: tuple[str, ...]) -> dict[tuple[Path, str], Files]:
    """Return the files with rows below a folder, those of one split together, by their place and name."""
    found: dict[tuple[Path, str], list[Path]] = {}
    try:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        for path in sorted(path for pattern in depths for path in folder.glob(pattern)):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.suffix.lower() in FORMATS and path.is_file() and not hidden and _belongs(path):
                name = _SHARD.sub("", path.stem) + path.suffix.lower()
                found.setdefault((path.parent, name), []).append(path)
    except OSError as error:
        raise unreadable(error, folder) from error
    return {place: tuple(files) for place, files in found.items()}


def _belongs(path: Path) -> bool:
    """Tell whether a file is data: beside state.json lie also caches, which it does not name."""
    state = path.parent / "state.json"
    if not state.is_file():
        return True
    try:
        return path.name in {entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def _unclear(folder: Path, what: str, found: dict[tuple[Path, str], Files]) -> InputInvalid | InputUnreadable:
    if not found:
        return InputUnreadable(
            f"cannot find {what}",
            path=folder,
            why=f"no {', '.join(FORMATS)} there is named after them",
            next_step="Name the files with --train and --dev",
        )
    names = ", ".join(str((parent / name).relative_to(folder)) for parent, name in found)
    return InputInvalid(
        f"cannot tell {what}",
        path=folder,
        why=f"they could be any of {names}",
        next_step="Name the files with --train and --dev",
    )
