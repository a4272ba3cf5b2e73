"""Publishing to an object store: staged here as any output is, then sent, the manifest last.

A bucket has no rename. So the order is what makes an output whole: a claim, weights, other files, indexes,
configs, the manifest, and the claim goes. Loaders refuse a folder that lacks its index or config, and what
has no manifest is not complete.

The claim is an object below `.noisytune/` that only one content can have: the digest of the manifest, which
accounts for every byte of the output. Who comes with another one is refused, so that two runs never mix; who
comes with the same one goes on where a run was stopped. What is there already must be what would be sent.
Nothing tells who else has come with the same one, so a claim stays until the manifest is there: whoever took
it away because he failed could leave another's files, or an upload of theirs that goes on, without one.

The weights of a job are there already, sent by its shares (`output/jobs`). Its claim is the plan's digest,
and lies there since it was planned.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from blake3 import blake3

from noisytune_cli.checkpoint.address import UNFINISHED, Address, Place
from noisytune_cli.checkpoint.bucket import MAX_OBJECTS, claim_name
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.config import CONFIG
from noisytune_cli.checkpoint.layout import folders_among, index_suffix, is_weights
from noisytune_cli.checkpoint.remote import Scratch
from noisytune_cli.checkpoint.store import Object, Store, StoreFault, writing
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import NOTHING_PUBLISHED, OutputUnsafe, UsageError
from noisytune_cli.escape import escape
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX
from noisytune_cli.output import signals
from noisytune_cli.output.publish import Publication
from noisytune_cli.output.sending import Sender

#: How often a claim is made before a store is taken for one that replaces what it should not. Who has made
#: the same may take it back in between, for the output is complete: once, at most.
_CLAIMS = 3

#: What a file may be called here, in bytes.
_LONGEST_NAME = 255

#: What a key may have at most, in bytes (S3's limit; the others' are like it), and what it may not have.
_LONGEST_KEY, _CONTROL = 1024, re.compile("[\x00-\x1f\x7f]")

#: How long a claim gets to be taken back, in seconds.
_PATIENCE = 1.0

KEPT = "what was sent is kept, and the same command completes it"


def check_in_store(output: Address, *sources: Checkpoint, is_file: bool, overwrite: bool) -> None:
    """Raise OutputUnsafe unless an output may be sent there, UsageError where it shall replace one.

    Where a claim is, its run's bytes decide, which are not known yet.
    """
    if is_file and not output.key:
        raise OutputUnsafe(
            "cannot write there",
            path=output,
            why=f"it is a bucket; --out={output}/ writes a file inside one",
            next_step="Choose another output with -o",
        )
    if len(os.fsencode(output.name + MANIFEST_SUFFIX * is_file)) > _LONGEST_NAME:
        raise OutputUnsafe(
            "cannot write there",
            path=output,
            why="the last part of its key is too long for a file, which it is before it is sent",
            next_step="Choose a shorter name with -o",
        )
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
    for source in () if is_file else sources[:1]:
        _check_names(output, source)
    target = Target(output, is_folder=not is_file)
    with writing(output, NOTHING_PUBLISHED):
        if target.store.head(target.claim) is None and (there := target.look()):
            raise exists(output, f"{escape(min(there))} is there")


def _check_names(output: Address, source: Checkpoint) -> None:
    """Raise OutputUnsafe for a file that no object can be named like, before others are sent."""
    for name in (*source.weight_files, *source.others):
        if _CONTROL.search(name):
            why = f"no object can be called {escape(name)}"
            next_step = "Rename that file, or choose an output here with -o"
        elif len((output / name).key.encode()) > _LONGEST_KEY:
            why = f"the key of {escape(name)} would have more than {_LONGEST_KEY:,} bytes"
            next_step = "Choose a shorter name with -o"
        else:
            continue
        raise OutputUnsafe("cannot write there", path=output, why=why, next_step=next_step)


class RemotePublication(Publication):
    """An output on its way into an object store; what `Publication` puts in place is sent there."""

    def __init__(
        self,
        address: Address,
        *,
        directory: bool,
        recipe: bool,
        progress: Progress,
        job_claim: bytes | None = None,
    ) -> None:
        """Prepare for an output that `check_in_store` has passed; `job_claim` is that of a job's output."""
        self._address, self._progress, self._job_claim = address, progress, job_claim
        self._there: dict[str, int] = {}
        self._scratch = Scratch()
        place = self._scratch.path / address.name
        super().__init__(place, directory=directory, overwrite=False, recipe=recipe)

    @property
    def shown(self) -> Place:
        return self._address

    def take(self, name: str, size: int) -> None:
        """Let the weight file `name` be what the job's shares have sent to its place, of this size."""
        self._there[self._weights_name(name)] = size

    def _discard(self) -> None:
        super()._discard()
        self._scratch.remove()

    def commit(self) -> Place:
        """Send what was sealed, the manifest last; return its address."""
        assert self._stage is not None
        self._require_whole()
        is_job = self._job_claim is not None
        target = Target(self._address, is_folder=self._directory, of_job=is_job)
        files = {name: self._stage / name for name in sorted(self._written, key=self._rank)}
        with self._progress(sum(path.stat().st_size for path in files.values())) as report:
            claim = self._job_claim or claim_of_manifest(files[self._manifest_name].read_bytes())
            _Sending(target, files, self._there, claim, report).send_all()
        self.published = True
        signals.leave(f"{self._address} is complete")
        if not target.release():
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


class Target:
    """A place in a store: what the names of an output's files are relative to, and where its claim is.

    Where it is `of_job`, what lies beside the claim is the job's, and is not looked at.
    """

    def __init__(self, output: Address, *, is_folder: bool, of_job: bool = False) -> None:
        self.output, self.is_folder, self._of_job = output, is_folder, of_job
        self.store = Store(output)
        self.home = output if is_folder else output.parent
        self.claim = self.key(claim_name(None if is_folder else output.name))

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
            if entry.key != self.claim
            and (entry.size or name not in folders)
            and not (self._of_job and name.startswith(f"{UNFINISHED}/"))
        }

    def take(self, sender: Sender, claim: bytes) -> None:
        """Claim the place, or join who has claimed it for the same output.

        A store that does not know the condition replaces what is there, another run's claim too. So it is
        asked again, until it says that the claim is there.
        """
        for _ in range(_CLAIMS):
            made = sender.create(self.claim, claim)
            if made == "other":
                raise claimed_by_another(self)
            if made == "same":
                return
        self.release()
        raise StoreFault("lacking", "the store replaces objects where it was asked not to (If-None-Match)")

    def release(self) -> bool:
        """Take the claim back, and tell whether that was possible."""
        try:
            self.store.delete(self.claim, _PATIENCE)
        except StoreFault:
            return False
        return True


class _Sending:
    """The files of one output, in their order, on their way to a target."""

    def __init__(
        self,
        target: Target,
        files: Mapping[str, Path],
        sizes: Mapping[str, int],
        claim: bytes,
        report: Callable[[int], None],
    ) -> None:
        """Prepare to send `files`; those that there are `sizes` of were sent before."""
        self._target, self._files, self._sizes, self._claim, self._report = (
            target,
            files,
            sizes,
            claim,
            report,
        )
        self._sender = Sender(target.store, report)

    def send_all(self) -> None:
        """Send what is not there yet; what is there must be the same."""
        output = self._target.output
        with writing(output, NOTHING_PUBLISHED):
            self._take()
            there = self._compare()
        with writing(output, KEPT):
            for name, path in self._files.items():
                if name in there:
                    self._report(path.stat().st_size)
                    continue
                in_parts = not name.endswith((MANIFEST, MANIFEST_SUFFIX))
                if self._sender.send(self._target.key(name), path, in_parts=in_parts) == "other":
                    raise exists(output, differs(name))

    def _take(self) -> None:
        """Claim the place, or join who has claimed it for the same output."""
        if self._target.store.head(self._target.claim) is None:
            # Who has come since the place was checked should not find a claim there, which would stay.
            self._compare()
        signals.leave(f"{self._target.output} is not complete: the same command completes it")
        self._target.take(self._sender, self._claim)

    def _compare(self) -> set[str]:
        """Return which files are there; OutputUnsafe where anything else is, or another content."""
        there = self._target.look()
        for name, entry in there.items():
            if name in self._sizes:
                is_same = entry.size == self._sizes[name]
            else:
                is_same = name in self._files and self._sender.is_same(entry, self._files[name])
            if not is_same:
                raise exists(self._target.output, differs(name))
        for name in self._sizes.keys() - there.keys():
            raise exists(self._target.output, f"{escape(name)} was there, and is there no more")
        return set(there)


def claim_of_manifest(manifest: bytes) -> bytes:
    """Return the claim of a run that makes an output of this manifest."""
    digest = f"blake3:{blake3(manifest).hexdigest()}"
    return json.dumps({"manifest": digest}).encode() + b"\n"


def claimed_by_another(target: Target) -> OutputUnsafe:
    """Return the error for an output that another run has claimed."""
    return OutputUnsafe(
        "the output is claimed",
        path=target.output,
        why="a run with another result is writing there, or failed or was stopped before it was complete",
        next_step="Choose another output with -o, or, once nothing writes there, remove what is there, "
        f"{target.claim} last",
    )


def exists(output: Address, why: str) -> OutputUnsafe:
    """Return the error for what is there, and may not be replaced."""
    next_step = "Choose another output with -o, or remove what is there"
    return OutputUnsafe("the output exists", path=output, why=why, next_step=next_step)


def differs(name: str) -> str:
    """Say of a file that is there that it is another."""
    return f"{escape(name)} is there, and is not what this run would put there"
