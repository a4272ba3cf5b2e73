"""A job in an object store, below the output's address; its shares send weights straight to their keys there.

A copy from a scratch key would cost the store's room twice and, beyond 5 GiB, requests that not every store
has; and until there is a manifest no reader takes the output for complete (`output/remote.py`). So that
nobody else writes to the same keys, planning claims every output before anything is sent.

A bucket has no rename, so what is removed goes object by object: first the plan is kept under another name,
by which who was killed goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from noisytune_cli.checkpoint.address import Address, Place
from noisytune_cli.checkpoint.remote import Scratch, do_all
from noisytune_cli.checkpoint.store import PIECE, Object, Store, StoreFault, reading, writing
from noisytune_cli.errors import InputInvalid, InputUnreadable, NoisytuneError, OutputUnsafe, exhausted
from noisytune_cli.manifest.job import Job
from noisytune_cli.manifest.write import MAX_BYTES
from noisytune_cli.output.jobs import FINISHED, PLAN, JobStorage, claim_of, no_job, own_of
from noisytune_cli.output.publish import Publication
from noisytune_cli.output.remote import RemotePublication, Target, claimed_by_another, differs, exists
from noisytune_cli.output.sending import Sender

#: How long objects get to be removed, in seconds.
_PATIENCE = 60.0

#: More files than a job can have in a folder.
_MOST = 100_000_000

_KEPT = "the shares that are done are kept, and the same command goes on"


class BucketStorage(JobStorage):
    """What lies below an address."""

    beside = False  # a signal has to get through to what is being sent

    def __init__(self, path: Address) -> None:
        self.path: Address = path
        self._store = Store(path)
        self._plan: Object | None = None  # the one that was opened, or made

    def require_trusted(self) -> None:
        """Do nothing: who may write to the bucket is trusted with all in it."""

    def stands(self, own: str) -> bool:
        # Its ETag tells it from a later plan's, which the same place may have been given to.
        return self._plan is not None and self._head(self.path / PLAN) == self._plan

    def size(self, name: str) -> int | None:
        return self._size(self.path / name)

    def names(self, folder: str) -> frozenset[str]:
        place = self.path / folder
        with reading(place):
            return frozenset(self._store.below(_MOST, place.key))

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        place = self.path / name
        entry = self._head(place)
        if entry is None:
            raise InputUnreadable(
                "cannot use the job",
                path=place,
                why="it is not there",
                next_step="Remove what lies below it, and plan it again",
            )
        if entry.size > MAX_BYTES:
            raise InputInvalid(
                "cannot use the job",
                path=place,
                why=f"it has {entry.size:,} bytes; {MAX_BYTES:,} is the limit",
                next_step="Remove what lies below it, and plan it again",
            )
        if name == PLAN:
            self._plan = entry
        with self._fetched(place, entry) as path:
            yield path

    @contextmanager
    def reading_output(self, file: Place) -> Iterator[Path | None]:
        assert isinstance(file, Address)
        entry = self._head(file)
        if entry is None or entry.size > MAX_BYTES:
            yield None
            return
        with self._fetched(file, entry) as path:
            yield path

    def put(self, content: Iterable[bytes], name: str) -> None:
        place = self.path / name
        with writing(place, _KEPT):
            made = self._sender().create(place.key, b"".join(content))
            if not self.stands(own_of(name)):  # it was finished meanwhile
                self._delete([place.key])
                raise no_job(self.path)
        if made == "other":
            raise InputInvalid(
                "cannot use the job",
                path=place,
                why="it is there, and is not what this share comes to",
                next_step="Remove it, and do its share again with noisytune work",
            )

    @contextmanager
    def growing(self, own: str, share: int) -> Iterator[Path]:
        scratch = Scratch()
        try:
            yield scratch.path
        finally:
            scratch.remove()

    def keep(self, made: Path, name: str, final: Place) -> None:
        assert isinstance(final, Address)
        own = own_of(name)

        def require_plan() -> None:
            if not self.stands(own):
                raise no_job(self.path)

        require_plan()
        sender = self._sender()
        with writing(final, _KEPT):
            # Another worker may have been here, and an earlier one that was stopped.
            entry = self._store.head(final.key)
            if entry is None:
                came = sender.send(final.key, made, before_end=require_plan)
            else:
                came = "same" if sender.is_same(entry, made) else "other"
        if came == "other":
            require_plan()
            raise exists(final.parent, differs(final.name))
        if came == "made" and not self.stands(own):
            raise OutputUnsafe(
                "a weight file came too late",
                path=final,
                why="its job was finished or removed just before all of it was there",
                next_step="Run noisytune verify on what is there now",
            )
        with contextlib.suppress(OSError):
            made.unlink()  # the others of the share need the room

    def kept(self, name: str, final: Place) -> int | None:
        assert isinstance(final, Address)
        return self._size(final)

    def adopt(self, publication: Publication, as_name: str, name: str, size: int) -> None:
        assert isinstance(publication, RemotePublication)
        publication.take(as_name, size)

    @contextmanager
    def drafting(self) -> Iterator[Path]:
        scratch = Scratch()
        try:
            yield scratch.path
        except OSError as error:
            raise exhausted(error) from error
        finally:
            scratch.remove()

    def create(self, draft: Path, own: str, plan: bytes, job: Job) -> Literal["made", "same", "other"]:
        sender, left_behind = self._sender(), threading.Event()
        claim, targets = claim_of(own), _targets(job)

        def send(path: Path) -> None:
            key = (self.path / own / "steps" / path.name).key
            if sender.create(key, path.read_bytes()) == "other":
                raise exists(self.path, differs(path.name))

        def has_begun() -> bool:
            """Tell whether the same plan is further along by another process, whose claims these are too."""
            return self._store.head((self.path / own / "steps/1.json").key) is not None

        def look(target: Target) -> None:
            # Who plans the same may have been quicker, and workers then too.
            if (there := target.look()) and not has_begun():
                raise exists(target.output, differs(min(there)))

        def look_before(target: Target) -> None:
            entry = self._store.head(target.claim)
            if entry is None:
                look(target)
            elif entry.size != len(claim) or self._store.read(entry, 0, entry.size) != claim:
                raise claimed_by_another(target)

        with writing(self.path, "the same command goes on"):
            if self.size(PLAN) is None:
                for target in targets:  # claims stay, for who plans the same may rely on them by then
                    look_before(target)
                for target in targets:
                    target.take(sender, claim)
                    look(target)
                do_all(send, sorted(draft.iterdir()), left_behind)
            made = sender.create((self.path / PLAN).key, plan)
            self._plan = self._store.head((self.path / PLAN).key)
        return made

    def clear(self, output: Place, claim: bytes) -> tuple[str, ...]:
        assert isinstance(output, Address)
        left = []
        for is_folder in (True, False):
            target = Target(output, is_folder=is_folder, of_job=True)
            with reading(output):
                entry = self._store.head(target.claim)
                if entry is None or self._store.read(entry, 0, entry.size) != claim:
                    continue
            if target.release():
                left.append(target.claim.rpartition("/")[2])
        return tuple(left)

    def remove(self, own: str, plan: Iterable[bytes]) -> bool:
        plan_key, finished_key = (self.path / PLAN).key, (self.path / FINISHED).key
        try:
            if self._store.head(plan_key) is not None:
                made = self._sender().create(finished_key, b"".join(plan))
                there = self._store.head(plan_key)
                if there is not None and there != self._plan:  # another has removed it, and a third planned
                    if made == "made":
                        self._delete([finished_key])
                    return True
                self._delete([plan_key])
            # Beside it there may be another job, and claims of files in the same folder.
            left = self._store.below(_MOST, (self.path / own).key)
            self._delete([entry.key for entry in left.values()])
            self._delete([finished_key])
        except (StoreFault, NoisytuneError):
            return False
        return True

    def _sender(self) -> Sender:
        return Sender(self._store, lambda done: None)

    def _delete(self, keys: list[str]) -> None:
        if keys:
            self._store.delete(keys, _PATIENCE)

    def _size(self, file: Address) -> int | None:
        entry = self._head(file)
        return None if entry is None else entry.size

    def _head(self, file: Address) -> Object | None:
        with reading(file):
            return self._store.head(file.key)

    @contextmanager
    def _fetched(self, place: Address, entry: Object) -> Iterator[Path]:
        """Have an object be here; errors name it by its address."""
        scratch = Scratch()
        path = scratch.path / "fetched.json"
        try:
            try:
                with reading(place), path.open("xb") as file:
                    for at in range(0, entry.size, PIECE):
                        file.write(self._store.read(entry, at, min(at + PIECE, entry.size)))
            except OSError as error:
                raise exhausted(error) from error
            yield path
        except NoisytuneError as error:
            error.move(path, place)
            raise
        finally:
            scratch.remove()


def _targets(job: Job) -> list[Target]:
    """Return the places of a job's outputs."""
    is_folder = not (job.is_file or job.recipe_only)
    return [Target(Address(one.path), is_folder=is_folder, of_job=True) for one in job.outputs]
