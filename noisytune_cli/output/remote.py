"""Publishing to an object store: staged here as any output is, then sent, the manifest last.

A bucket has no rename. So the order is what makes an output whole: a claim, weights, other files, indexes,
configs, the manifest, and the claim goes. Loaders refuse a folder that lacks its index or config, and what
has no manifest is not complete.

The claim is an object below `.noisytune/` that only one content can have: the digest of the manifest, which
accounts for every byte of the output. Who comes with another one is refused, so that two runs never mix; who
comes with the same one goes on where a run was stopped. What is there already must be what would be sent.

Small objects and the manifest are created and never replaced. That an object is there, or that a request
failed, says nothing yet: an answer may have been lost. The bytes that are there decide.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from blake3 import blake3

from noisytune_cli.checkpoint.address import Address, Place
from noisytune_cli.checkpoint.bucket import MAX_OBJECTS, UNFINISHED
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.config import CONFIG
from noisytune_cli.checkpoint.layout import folders_among, index_suffix, is_weights
from noisytune_cli.checkpoint.remote import Scratch
from noisytune_cli.checkpoint.store import PIECE, Object, Store, StoreFault, Upload, writing
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import NOTHING_PUBLISHED, OutputUnsafe, UsageError
from noisytune_cli.escape import escape
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX
from noisytune_cli.output import signals
from noisytune_cli.output.publish import Publication

#: How often an object is sent whose bytes did not come to be there.
_TRIES = 3

#: How long a claim gets to be taken back, in seconds.
_PATIENCE = 1.0

#: What is read of a file at a time.
_CHUNK = 1 << 20

_KEPT = "what was sent is kept, and the same command completes it"


def check_in_store(output: Address, *sources: Checkpoint, is_file: bool, overwrite: bool) -> None:
    """Raise OutputUnsafe unless an output may be sent there, UsageError where it shall replace one.

    Where a claim is, its run's bytes decide, which are not known yet.
    """
    if overwrite:
        raise UsageError(
            "--overwrite cannot be used",
            path=output,
            why="nothing in an object store can be replaced as a whole",
            next_step="Choose another output with -o, or remove what is there",
        )
    for source in sources:
        if not source.single_file and source.id in (output, *output.parents):
            raise OutputUnsafe(
                "cannot write there",
                path=output,
                why="it is the input, or lies in the input",
                next_step="Choose another output with -o",
            )
    target = _Target(output, is_folder=not is_file)
    with writing(output, NOTHING_PUBLISHED):
        if target.store.head(target.claim) is None and (there := target.look()):
            raise _exists(output, f"{escape(min(there))} is there")


class RemotePublication(Publication):
    """An output on its way into an object store; what `Publication` puts in place is sent there."""

    def __init__(self, address: Address, *, directory: bool, recipe: bool, progress: Progress) -> None:
        """Prepare for an output that `check_in_store` has passed."""
        self._address, self._progress = address, progress
        self._scratch = Scratch()
        place = self._scratch.path / address.name
        super().__init__(place, directory=directory, overwrite=False, recipe=recipe)

    @property
    def shown(self) -> Place:
        return self._address

    def _discard(self) -> None:
        super()._discard()
        self._scratch.remove()

    def commit(self) -> Place:
        """Send what was sealed, the manifest last; return its address."""
        assert self._stage is not None
        self._require_whole()
        target = _Target(self._address, is_folder=self._directory)
        files = {name: self._stage / name for name in sorted(self._written, key=self._rank)}
        with self._progress(sum(path.stat().st_size for path in files.values())) as report:
            sending = _Sending(target, files, files[self._manifest_name].read_bytes(), report)
            sending.send_all()
        self.published = True
        signals.leave(f"{self._address} is complete")
        if not sending.release():
            self._left.append(target.claim.rpartition("/")[2])
        with signals.deferred():
            self._discard()
        return target.home / self._manifest_name

    def _rank(self, name: str) -> tuple[int, str]:
        """Return when a file is sent: what loaders ask for first comes last."""
        if name == self._manifest_name:
            return 4, name
        if name.rpartition("/")[2] == CONFIG:
            return 3, name
        if index_suffix(name) is not None:
            return 2, name
        return (0 if is_weights(name) or not self._directory else 1), name


class _Target:
    """A place in a store: what the names of an output's files are relative to, and where its claim is."""

    def __init__(self, output: Address, *, is_folder: bool) -> None:
        self.output, self.is_folder = output, is_folder
        self.store = Store(output)
        self.home = output if is_folder else output.parent
        self.claim = self.key(f"{UNFINISHED}{'' if is_folder else f'{output.name}.'}publishing")

    def key(self, name: str) -> str:
        return (self.home / name).key

    def look(self) -> dict[str, Object]:
        """Return what is there, by its name in the output: all of a folder, or a file and its manifest."""
        if not self.is_folder:
            names = (self.output.name, self.output.name + MANIFEST_SUFFIX)
            found = {name: self.store.head(self.key(name)) for name in names}
            return {name: entry for name, entry in found.items() if entry is not None}
        listed = self.store.below(MAX_OBJECTS)
        if self.output.key and (entry := self.store.head(self.output.key)) is not None:
            listed[self.output.name] = entry
        folders = folders_among(listed)
        return {
            name: entry
            for name, entry in listed.items()
            # An empty object of a folder's name is what consoles make of folders.
            if entry.key != self.claim and (entry.size or name not in folders)
        }


class _Sending:
    """The files of one output, in their order, on their way to a target."""

    def __init__(
        self, target: _Target, files: dict[str, Path], manifest: bytes, report: Callable[[int], None]
    ) -> None:
        self._target, self._store, self._files, self._report = target, target.store, files, report
        digest = f"blake3:{blake3(manifest).hexdigest()}"
        self._claimed = json.dumps({"manifest": digest}).encode() + b"\n"
        self._is_own = False
        self._has_sent = False

    def send_all(self) -> None:
        """Send what is not there yet; what is there must be the same."""
        output = self._target.output
        try:
            with writing(output, NOTHING_PUBLISHED):
                self._take()
                there = self._compare()
            with writing(output, _KEPT):
                for name, path in self._files.items():
                    if name in there:
                        self._report(path.stat().st_size)
                    else:
                        self._send(name, path)
        except BaseException:
            if self._is_own and not self._has_sent:
                self.release()
            raise

    def release(self) -> bool:
        """Take the claim back, and tell whether that was possible."""
        try:
            self._store.delete(self._target.claim, _PATIENCE)
        except StoreFault:
            return False
        return True

    def _take(self) -> None:
        """Claim the place, or join who has claimed it for the same output."""
        signals.leave(f"{self._target.output} is not complete: the same command completes it")
        claimed = self._create(self._target.claim, self._claimed)
        self._is_own = claimed == "made"
        if claimed == "other":
            raise OutputUnsafe(
                "the output is claimed",
                path=self._target.output,
                why="a run with another result is writing there, or was stopped while it did",
                next_step=f"Choose another output with -o, or remove all below it, {UNFINISHED} last",
            )

    def _compare(self) -> set[str]:
        """Return which files are there; OutputUnsafe where anything else is, or another content."""
        there = self._target.look()
        for name, entry in there.items():
            if name not in self._files or not self._is_same(entry, self._files[name]):
                raise _exists(self._target.output, _differs(name))
        return set(there)

    def _send(self, name: str, path: Path) -> None:
        key, size = self._target.key(name), path.stat().st_size
        if size > PIECE and not name.endswith((MANIFEST, MANIFEST_SUFFIX)):
            self._send_in_parts(key, path, size)
        elif self._create(key, path.read_bytes()) != "other":
            self._report(size)
        else:
            raise _exists(self._target.output, _differs(name))
        self._has_sent = True

    def _create(self, key: str, content: bytes) -> Literal["made", "same", "other"]:
        """Make an object, unless there is one; say whether its content is the same."""
        for left in reversed(range(_TRIES)):
            try:
                self._store.create(key, content)
                return "made"
            except StoreFault as fault:
                entry = self._look_after(key, fault)
                if entry is not None:
                    is_same = self._store.read(entry, 0, entry.size) == content
                    return "same" if is_same else "other"
                if not left:
                    raise
        raise AssertionError("unreachable")

    def _send_in_parts(self, key: str, path: Path, size: int) -> None:
        shown = 0

        def pieces(upload: Upload) -> Iterator[bytes]:
            nonlocal shown
            done = 0
            with path.open("rb") as file:
                while piece := file.read(_CHUNK):
                    if upload.left_behind.is_set():
                        raise RuntimeError("the upload was abandoned")  # which has the store forget its parts
                    yield piece
                    done += len(piece)
                    if done > shown:  # a part of it may be sent again
                        self._report(done - shown)
                        shown = done

        for left in reversed(range(_TRIES)):
            upload = Upload()
            try:
                self._store.send(key, pieces(upload), size, upload)
                entry = self._store.head(key)
                if entry is None or entry.size != size:
                    raise StoreFault("failed", "the store says that all was sent, and has it not")
                return
            except StoreFault as fault:
                entry = self._look_after(key, fault)
                if entry is not None and self._is_same(entry, path):
                    return
                if not left:
                    raise
            except BaseException:
                # What was left behind may be complete in the end.
                self._has_sent |= not upload.given_up.is_set()
                raise

    def _look_after(self, key: str, fault: StoreFault) -> Object | None:
        """Return what is there though a request failed; raises the fault again where that would not help."""
        if fault.cause in ("denied", "full"):
            raise fault
        return self._store.head(key)

    def _is_same(self, entry: Object, path: Path) -> bool:
        """Tell whether an object has the bytes of a file."""
        if entry.size != path.stat().st_size:
            return False
        with path.open("rb") as file:
            return all(
                self._store.read(entry, at, min(at + PIECE, entry.size)) == file.read(PIECE)
                for at in range(0, entry.size, PIECE)
            )


def _exists(output: Address, why: str) -> OutputUnsafe:
    next_step = "Choose another output with -o, or remove what is there"
    return OutputUnsafe("the output exists", path=output, why=why, next_step=next_step)


def _differs(name: str) -> str:
    return f"{escape(name)} is there, and is not what this run would put there"
