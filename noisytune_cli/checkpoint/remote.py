"""A checkpoint that lies elsewhere: its names are known, and a file is fetched when it is asked for.

What the hub and object stores have in common: several files or parts of them at a time, by threads that are
left behind when a signal asks us to stop; and headers alone, at the beginning of files that are empty else.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from noisytune_cli.checkpoint.background import begin
from noisytune_cli.checkpoint.formats.safetensors.header import header_end
from noisytune_cli.checkpoint.layout import Listing
from noisytune_cli.errors import NoisytuneError, exhausted

_T = TypeVar("_T")

#: How much of a file is asked for first where its header is all that is needed: most headers are shorter.
_HEAD = 64 << 10

#: What is asked for together where a few bytes are asked for, and how many such blocks are kept.
_BLOCK, _KEPT = 16 << 10, 1024

#: Files, or parts of them, that are fetched at a time.
_WORKERS = 8

#: How long the workers get to remove their partial files when nobody waits any more, in seconds.
_GRACE = 1.0


class Remote(ABC):
    """The names of a checkpoint that lies elsewhere, and where those lie that are fetched (`root`)."""

    root: Path
    listing: Listing
    #: What errors name in place of `root`, where that is of this run alone.
    moved: tuple[tuple[Path, str], ...] = ()

    @abstractmethod
    def size(self, name: str) -> int:
        """Return how long a file is said to be, 0 where that was never said."""

    @abstractmethod
    def lacks(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that are not in `root`, and can be asked for."""

    @abstractmethod
    def fetch(self, names: Sequence[str]) -> None:
        """Bring `names` to `root`; raises unless each is then what was said of it."""

    @abstractmethod
    def part(self, name: str, start: int, end: int, left_behind: threading.Event) -> bytes:
        """Return the bytes of a file from `start` to `end`, no others and no fewer."""

    def etag(self, name: str) -> str | None:
        """Return what tells this content of a file from another, where that is said of single files."""
        return None

    @contextmanager
    def named(self) -> Iterator[None]:
        """Have errors name a file by where it is meant to be, and leave nothing behind where one comes."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, NoisytuneError):
                self.rename(error)
            self.close()
            raise

    def rename(self, error: NoisytuneError) -> None:
        """Have an error name a file by where it is meant to be."""
        for here, there in self.moved:
            error.move(here, there)

    def require(self, names: Iterable[str]) -> None:
        """Raise for a name that can be had neither here nor there."""
        return

    def close(self) -> None:
        """Remove what nobody else will need."""
        return

    def fetch_headers(self, names: Sequence[str], folder: Path) -> None:
        """Put the headers of safetensors files into `folder`, each at the beginning of a file of its size.

        What follows there is empty, and no digest can tell whether what was sent is true: none of it is for
        a cache.
        """
        left_behind = threading.Event()

        def fetch(name: str) -> None:
            size = self.size(name)
            head = self.part(name, 0, min(size, _HEAD), left_behind)
            end = header_end(head)
            if len(head) < end <= size:
                head += self.part(name, len(head), end, left_behind)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("xb") as file:
                    file.write(head)
                    file.truncate(size)
            except OSError as error:
                raise exhausted(error) from error

        do_all(fetch, names, left_behind)


def in_blocks(remote: Remote) -> Callable[[str, int, int], bytes]:
    """Return what fetches bytes of a file, where these are few together with those around them.

    A few values here and there, and scales that are asked for row by row, are one request.
    """

    @lru_cache(_KEPT)
    def block(name: str, number: int) -> bytes:
        start = number * _BLOCK
        return remote.part(name, start, min(start + _BLOCK, remote.size(name)), threading.Event())

    def part(name: str, start: int, end: int) -> bytes:
        if end - start > _BLOCK:
            return remote.part(name, start, end, threading.Event())
        first = start // _BLOCK
        found = b"".join(block(name, number) for number in range(first, -(-end // _BLOCK)))
        return found[start - first * _BLOCK : end - first * _BLOCK]

    return part


def do_all(work: Callable[[_T], None], items: Iterable[_T], left_behind: threading.Event) -> None:
    """Do `work` with each of `items`, several at a time; `left_behind` tells that nobody waits any more."""

    def do() -> None:
        with ThreadPoolExecutor(_WORKERS) as pool:
            for _ in pool.map(work, items):
                pass

    wait_for(do, left_behind)


def wait_for(
    work: Callable[[], _T], left_behind: threading.Event | None = None, patience: float | None = None
) -> _T:
    """Return what `work` does in a thread of its own, which is left behind when a signal asks us to stop.

    A pool would be waited for even then, and so would a call that does not return. TimeoutError where
    `patience`, in seconds, is over.
    """
    outcome = begin(work)
    try:
        return outcome.result(patience)
    finally:
        if left_behind is not None:
            left_behind.set()
            wait([outcome], _GRACE)


class Scratch:
    """A folder of this run's own, among the system's temporary ones (TMPDIR); it goes with its holder."""

    def __init__(self) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="noisytune-"))
        except OSError as error:
            raise exhausted(error) from error
        # Also where a run ends before anything was opened that would close it.
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
