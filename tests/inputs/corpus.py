"""Every malformed input there is, from all the tables: what it is laid out as, and what must become of it.

Files come from `malformed.py`, `malformed_headers.py` and `malformed_pickles.py`; folders, indexes, configs
and outputs from the tables of their names. `fingerprint` tells inputs apart by what lies there, not by what
rows call them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from hostile import Hostile
from malformed import CASES, Case
from malformed_chunks import CHUNKS
from malformed_configs import CONFIGS
from malformed_folders import FOLDERS
from malformed_headers import MORE
from malformed_indexes import INDEXES
from malformed_outputs import OUTPUTS
from malformed_pickles import CASES as PICKLES

_PIECE = 1 << 20


def _as_file(kind: str, case: Case) -> Hostile:
    """The input that is one weight file."""

    def lay(root: Path) -> Path:
        path = root / f"input{case.suffix}"
        path.write_bytes(case.build())
        return path

    return Hostile(f"{kind}: {case.name}", lay, case.words)


#: The safetensors files.
SAFETENSORS: tuple[Case, ...] = CASES + MORE

#: The rows by what they are, as docs/security.md counts them.
KINDS: dict[str, tuple[Hostile, ...]] = {
    "safetensors files": tuple(_as_file("safetensors", case) for case in SAFETENSORS),
    # A safetensors file under a pickle's name is refused by that format, and read as what it is here.
    "PyTorch files": tuple(_as_file("pickle", case) for case in PICKLES if case.name != "safetensors"),
    "folders of torch.distributed.checkpoint": CHUNKS,
    "indexes and shards": INDEXES,
    "folders and other sources": FOLDERS,
    "configs and earlier outputs": CONFIGS,
    "outputs with manifests that lie": OUTPUTS,
}

CORPUS: tuple[Hostile, ...] = tuple(row for rows in KINDS.values() for row in rows)

REFUSED = tuple(row for row in CORPUS if row.refused)
ACCEPTED = tuple(row for row in CORPUS if not row.refused)


def fingerprint(root: Path, source: Path) -> str:
    """A digest of everything under `root`: names, kinds, links, contents; and of which of it is the input."""
    digest = hashlib.blake2b(os.fsencode(os.path.relpath(source, root)))
    for folder, folders, names in os.walk(root):
        for name in sorted([*folders, *names]):
            path = os.path.join(folder, name)
            digest.update(os.fsencode(os.path.relpath(path, root)) + b"\0" + _content(path))
    return digest.hexdigest()


def _content(path: str) -> bytes:
    try:
        status = os.lstat(path)
    except OSError as error:  # of a path that is too long there is no more than its name
        return str(error.errno).encode()
    kind = stat.S_IFMT(status.st_mode).to_bytes(4)
    if stat.S_ISLNK(status.st_mode):
        return kind + os.fsencode(os.readlink(path))
    if not stat.S_ISREG(status.st_mode):
        return kind
    with open(path, "rb") as file:
        content: Callable[..., hashlib.blake2b] = hashlib.blake2b
        return kind + status.st_size.to_bytes(8) + content(file.read(_PIECE)).digest()
