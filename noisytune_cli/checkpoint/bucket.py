"""A checkpoint in an object store, fetched into a scratch folder that goes when it is closed.

The listing tells names, lengths and ETags. Every read is of a range, of the object that was listed: one that
was replaced since is refused. What is fetched whole goes through the disk, so that all that reads a local
checkpoint reads this one.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from noisytune_cli.checkpoint import downloads
from noisytune_cli.checkpoint.address import UNFINISHED, Address
from noisytune_cli.checkpoint.config import ADAPTER_CONFIG, CONFIG
from noisytune_cli.checkpoint.layout import folders_among, is_safe, list_names
from noisytune_cli.checkpoint.remote import Remote, Scratch, do_all
from noisytune_cli.checkpoint.store import PIECE, Object, Store, StoreFault, reading
from noisytune_cli.errors import (
    HubError,
    InputInvalid,
    InputUnreadable,
    ResourceExhausted,
    exhausted,
)
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX

#: No checkpoint comes near; a bucket given by mistake does.
MAX_OBJECTS = 100_000

#: How often a part is asked for that came short, or did not come.
_TRIES = 3


class _Part(NamedTuple):
    """Bytes of a file that are fetched at once."""

    name: str
    start: int
    end: int


class Bucket(Remote):
    """What lies at an address: an object (`file`, and what may tell of it beside it), or all below it."""

    def __init__(self, source: str) -> None:
        self.address = Address(source)
        self._store = Store(self.address)
        with reading(self.address):
            found = _object_at(self._store, source)
            self.file = None if found is None else self.address.name
            objects = self._below() if found is None else {self.address.name: found, **self._beside()}
            if found is not None and f"{self.file}{MANIFEST_SUFFIX}" not in objects:
                self._refuse_claimed()
        self._objects = objects
        self.listing = list_names(objects)
        self._scratch = Scratch()
        self.root = self._scratch.path
        self.moved = ((self.root, self._home),)

    @property
    def _home(self) -> Address:
        """The address that names are relative to."""
        return self.address if self.file is None else self.address.parent

    def _beside(self) -> dict[str, Object]:
        """Return what lies beside an object and may tell of it."""
        names = (CONFIG, ADAPTER_CONFIG, MANIFEST, self.address.name + MANIFEST_SUFFIX)
        there = {name: self._look_beside(name) for name in names}
        return {name: entry for name, entry in there.items() if entry is not None}

    def _look_beside(self, name: str) -> Object | None:
        try:
            return self._store.head((self._home / name).key)
        except StoreFault as fault:
            if fault.cause != "denied":  # who may not list is told so of what is absent
                raise
            return None

    def _refuse_claimed(self) -> None:
        """Raise InputInvalid for an object whose manifest is still to come: it may have noise already."""
        if self._look_beside(claim_name(self.file)) is not None:
            raise self._unfinished()

    def _below(self) -> dict[str, Object]:
        found = self._store.below(MAX_OBJECTS)
        if len(found) > MAX_OBJECTS:
            raise InputInvalid(
                "cannot read the checkpoint",
                path=self.address,
                why=f"more than {MAX_OBJECTS:,} objects lie below it",
                next_step="Give the prefix that holds the weights alone",
            )
        for name in folders_among(found):  # consoles make an empty object of a folder's name
            if found[name].size:
                raise self._refused(name, "it is an object, and others lie below it")
            del found[name]
        if not found:
            raise InputUnreadable(
                "no such input",
                path=self.address,
                why="no object has this key, and none lies below it",
                next_step="Check the spelling of bucket and key, and the endpoint and region that are set",
            )
        for name in found:
            if not is_safe(name):
                raise self._refused(name, "no file can have such a name")
        making = [name for name in found if name.startswith(f"{UNFINISHED}/")]
        if making and MANIFEST not in found:
            raise self._unfinished()
        return {name: entry for name, entry in found.items() if name not in making}

    def _unfinished(self) -> InputInvalid:
        return InputInvalid(
            "cannot read the checkpoint",
            path=self.address,
            why="a run of noisytune is writing it, or was stopped while it did",
            next_step="Wait for that run, or give its command again to complete it",
        )

    def _refused(self, name: str, why: str) -> InputInvalid:
        next_step = "Rename or remove the object, or give another prefix"
        return InputInvalid(
            "cannot read the checkpoint", path=f"{self.address}/{name}", why=why, next_step=next_step
        )

    def size(self, name: str) -> int:
        return self._objects[name].size

    def etag(self, name: str) -> str | None:
        return self._objects[name].etag if name in self._objects else None

    def lacks(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not (self.root / name).exists()]

    def fetch(self, names: Sequence[str]) -> None:
        """Bring `names` to the scratch folder, in parts, if there is room for all of them."""
        new = self.lacks(dict.fromkeys(names))
        self._require_room(sum(map(self.size, new)))
        parts = []
        for name in new:
            size, path = self.size(name), self.root / name
            parts += [_Part(name, at, min(at + PIECE, size)) for at in range(0, size, PIECE)]
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    file.truncate(size)
            except OSError as error:
                raise exhausted(error) from error
        left_behind = threading.Event()
        with downloads.shown.get()(sum(map(self.size, new))) as show:

            def fetch(part: _Part) -> None:
                content = self.part(*part, left_behind)
                try:
                    with (self.root / part.name).open("r+b") as file:
                        file.seek(part.start)
                        file.write(content)
                except OSError as error:
                    raise exhausted(error) from error
                show(len(content))

            do_all(fetch, parts, left_behind)

    def part(self, name: str, start: int, end: int, left_behind: threading.Event) -> bytes:
        tries = _TRIES
        while True:
            if left_behind.is_set():
                raise RuntimeError("the download was abandoned")
            try:
                with reading(self._home / name):
                    return self._store.read(self._objects[name], start, end)
            except HubError:
                tries -= 1
                if not tries:
                    raise

    def close(self) -> None:
        self._scratch.remove()

    def _require_room(self, nbytes: int) -> None:
        try:
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise exhausted(error) from error
        if nbytes > free:
            raise ResourceExhausted(
                "not enough space to fetch to",
                path=self.root.parent,
                why=f"{self.address} needs {nbytes:,} bytes there and {free:,} are free",
                next_step="Free space, or set TMPDIR to a folder that has it, then run again",
            )


def claim_name(file: str | None) -> str:
    """Return the name of an output's claim: below a folder, or beside a `file`."""
    return f"{UNFINISHED}/{'' if file is None else f'{file}.'}publishing"


def is_object(source: str) -> bool:
    """Tell whether an object lies at an address, and not what lies below it is meant."""
    address = Address(source)
    with reading(address):
        return _object_at(Store(address), source) is not None


def _object_at(store: Store, source: str) -> Object | None:
    key = store.address.key
    return None if source.endswith("/") or not key else store.head(key)
