"""Files on their way into an object store: whatever answers get lost, the bytes that are there decide.

Small objects are created and never replaced; large ones are sent in parts. That an object is there, or that a
request failed, says nothing yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from noisytune_cli.checkpoint.store import PIECE, Object, Store, StoreFault

#: How often an object is sent whose bytes did not come to be there.
_TRIES = 3

#: What is read of a file at a time.
_CHUNK = 1 << 20


class Sender:
    """Has files and bytes be in a store, and reports what arrived of files. Raises StoreFault."""

    def __init__(self, store: Store, report: Callable[[int], None]) -> None:
        self._store, self._report = store, report

    def create(self, key: str, content: bytes) -> Literal["made", "same", "other"]:
        """Make an object, unless there is one; say whether its content is the same."""
        for left in reversed(range(_TRIES)):
            try:
                self._store.create(key, content)
                return "made"
            except StoreFault as fault:
                entry = self._look_after(key, fault)
                if entry is not None:
                    is_same = entry.size == len(content)
                    is_same = is_same and self._store.read(entry, 0, entry.size) == content
                    return "same" if is_same else "other"
                if not left:
                    raise
        raise AssertionError("unreachable")

    def send(
        self,
        key: str,
        path: Path,
        *,
        in_parts: bool = True,
        before_end: Callable[[], None] = lambda: None,
    ) -> Literal["made", "same", "other"]:
        """Make an object of a file, which is not there yet; say whether what came to be there is the same.

        A large one is sent `in_parts`, and then takes the place of what may have come. It may take hours, so
        `before_end` is called when all is read, and what it raises gives the upload up.
        """
        size = path.stat().st_size
        made: Literal["made", "same", "other"] = "made"
        if in_parts and size > PIECE:
            self._send_in_parts(key, path, size, before_end)
        elif (made := self.create(key, path.read_bytes())) != "other":
            self._report(size)
        return made

    def is_same(self, entry: Object, path: Path) -> bool:
        """Tell whether an object has the bytes of a file."""
        if entry.size != path.stat().st_size:
            return False
        with path.open("rb") as file:
            return all(
                self._store.read(entry, at, min(at + PIECE, entry.size)) == file.read(PIECE)
                for at in range(0, entry.size, PIECE)
            )

    def _send_in_parts(self, key: str, path: Path, size: int, before_end: Callable[[], None]) -> None:
        shown = 0

        def pieces(left_behind: threading.Event) -> Iterator[bytes]:
            nonlocal shown
            done = 0
            with path.open("rb") as file:
                while piece := file.read(_CHUNK):
                    if left_behind.is_set():
                        raise RuntimeError("the upload was abandoned")  # which has the store forget its parts
                    yield piece
                    done += len(piece)
                    if done > shown:  # a part of it may be sent again
                        self._report(done - shown)
                        shown = done
            before_end()

        for left in reversed(range(_TRIES)):
            left_behind = threading.Event()
            # On a slow line parts that share it may each take longer than a request may.
            slowly = left < _TRIES - 1
            try:
                self._store.send(key, pieces(left_behind), size, left_behind, slowly=slowly)
                entry = self._store.head(key)
                if entry is None or entry.size != size:
                    raise StoreFault("failed", "the store says that all was sent, and has it not")
                return
            except StoreFault as fault:
                entry = self._look_after(key, fault)
                if entry is not None and self.is_same(entry, path):
                    return
                if not left:
                    raise

    def _look_after(self, key: str, fault: StoreFault) -> Object | None:
        """Return what is there though a request failed; raises the fault again where that would not help."""
        if fault.cause in ("denied", "full", "lacking"):
            raise fault
        return self._store.head(key)
