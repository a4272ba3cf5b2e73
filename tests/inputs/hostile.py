"""What a hostile input is: laid out under an empty folder, given to a command, refused with an exit code.

The tables of `malformed_*.py` are made of these; `corpus.py` gathers them. A row without words is one that
only looks wrong and has to be accepted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from malformed import ENTRY, frame

#: What lies under a name: bytes, or a call that puts something there.
Content = bytes | str | Callable[[Path], object]

Command = Literal["inspect", "perturb", "verify", "replay"]


@dataclass(frozen=True)
class Hostile:
    """An input: `lay` puts it under an empty folder and returns what the command is given.

    `times` is how many times the CPU time of others it may take.
    """

    name: str
    lay: Callable[[Path], Path]
    words: tuple[str, ...] = ()
    code: int = 3
    command: Command = "inspect"
    times: int = 1

    @property
    def refused(self) -> bool:
        return bool(self.words)

    def argv(self, source: Path, out: Path) -> list[str]:
        """The command line that meets it; `out` is a place that it must not write to."""
        return {
            "inspect": ["inspect", str(source), "--headers-only"],
            "perturb": ["perturb", str(source), "-o", str(out)],
            "verify": ["verify", str(source)],
            "replay": ["replay", str(source), "--base", str(source.parent), "-o", str(out)],
        }[self.command]


def tree(files: Mapping[str, Content], source: str = "model") -> Callable[[Path], Path]:
    """Lay out these files under the folder `model`; `source` is what the command is given."""

    def lay(root: Path) -> Path:
        for name, content in files.items():
            path = root / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, str):
                path.write_text(content)
            else:
                content(path)
        (root / "model").mkdir(exist_ok=True)
        return root / source

    return lay


def fifo(path: Path) -> None:
    """A pipe that nobody writes to."""
    os.mkfifo(path)


def folder(path: Path) -> None:
    """An empty folder."""
    path.mkdir()


def link(target: str) -> Callable[[Path], None]:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def hard_link(name: str) -> Callable[[Path], None]:
    """Another name of the file `name` beside it."""
    return lambda path: os.link(path.with_name(name), path)


def sparse(size: int) -> Callable[[Path], None]:
    """A file of so many bytes, none of them on the disk."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def weight_file(*names: str) -> bytes:
    """A valid safetensors file with a tensor of four floats for each name."""
    entries = (
        f'"{name}":{ENTRY.replace("[0,16]", f"[{16 * i},{16 * i + 16}]")}' for i, name in enumerate(names)
    )
    return frame("{" + ",".join(entries) + "}", bytes(range(1, 17)) * len(names))
