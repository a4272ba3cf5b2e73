"""A checkpoint on the Hugging Face hub, fetched into the standard cache.

One idea: the repository's list of files is enough to decide what is needed, so that comes first, and a file
is fetched when it is asked for (`checkpoint/find.py` says which). No other weight format is ever fetched. The
cache, the token, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from noisytune_cli.checkpoint import downloads
from noisytune_cli.checkpoint.folder import list_folder
from noisytune_cli.checkpoint.hub_answers import (
    COMMIT,
    SHA256,
    Answers,
    Untrue,
    check_listed,
    watched,
)
from noisytune_cli.checkpoint.hub_errors import CANNOT_FETCH, cannot_write_cache, mapped_errors
from noisytune_cli.checkpoint.layout import folders_among, is_safe, list_names
from noisytune_cli.checkpoint.remote import Remote, do_all
from noisytune_cli.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

#: How much is fetched between two looks at whether to stop, in bytes.
_CHUNK = 256 << 10


class Repository(Remote):
    """One commit of a repository: its names, and where in the cache those lie that are fetched.

    What this process fetches is in the snapshot in the end only if its content is what the hub says it is,
    unless the process was killed. What others fetched is theirs to look at, and to take away.
    """

    def __init__(self, repo_id: str, revision: str | None) -> None:
        self._id, self._revision = repo_id, revision
        self._answers = Answers()
        with self._asked():
            self.commit = self._answers.commit = _resolve(repo_id, revision)
            self.root = _list(repo_id, self.commit)
            self._listed = _cached_list(repo_id, self.commit)
        if self._listed is None and not self.root.is_dir():  # the library keeps it to itself that it cannot
            raise cannot_write_cache("the list of the files could not be written there", self.root)
        self.listing = list_folder(self.root) if self._listed is None else list_names(list(self._listed))

    def require(self, names: Iterable[str]) -> None:
        """Raise HubError for a name that is not in the cache, where the hub cannot be asked for it."""
        if self._listed is None and (missing := set(names).difference(self.listing.files)):
            raise _not_cached(self._id, f"{min(missing)} is not in the cache")

    def size(self, name: str) -> int:
        """Return how long the hub says a file is, 0 where it never did."""
        return 0 if self._listed is None else self._listed[name].size

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that are not in the cache, where the hub can be asked for them."""
        from huggingface_hub import constants

        if self._listed is None or constants.is_offline_mode():
            return []
        return [name for name in names if not (self.root / name).exists()]

    def part(self, name: str, start: int, end: int, left_behind: threading.Event) -> bytes:
        """Return the bytes of a file from `start` to `end`; Untrue where the answer has others, or more."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        if start == end:
            return b""
        url = hf_hub_url(self._id, name, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
        due = f"bytes {start}-{end - 1}/{self.size(name)}"
        # The library would take these for its own, and ask again.
        transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
        broken: Exception | None = None
        content = bytearray()
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as answer:
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            told = answer.headers.get("Content-Range")
            if answer.status_code != 206 or told != due:
                raise Untrue(f"{name}: asked for {due}, it sends {told or 'another part of it'}")
            try:
                for data in answer.iter_bytes():
                    if left_behind.is_set():
                        raise RuntimeError("the download was abandoned")
                    content += data
                    if len(content) > end - start:
                        break
            except transport_error as error:
                broken = error
        if broken is not None:
            raise broken
        if len(content) != end - start:
            raise Untrue(f"{name}: it sends another number of bytes than it says")
        return bytes(content)

    def fetch_headers(self, names: Sequence[str], folder: Path) -> None:
        with self._asked():
            super().fetch_headers(names, folder)

    def fetch(self, names: Sequence[str]) -> None:
        """Bring `names` into the cache; raises HubError unless each is then what the hub lists."""
        for _ in range(2):  # another process may have fetched a name, and taken it away as it was stopped
            new = [name for name in names if self._listed is not None and not (self.root / name).exists()]
            if new:
                self._fetch_new(new)
        for name in names:
            self._check_size(self.root / name, name)

    def _fetch_new(self, names: Sequence[str]) -> None:
        sizes = {name: self.size(name) for name in names}
        self._answers.longest = max(sizes.values())
        unchecked = set[str]()

        def check(name: str) -> None:
            with suppress(FileNotFoundError):  # another process has just taken it away
                self._check_new(self.root / name, name)
            unchecked.discard(name)

        try:
            with self._asked():
                _fetch(self._id, self.commit, sizes, unchecked.add, check)
        except BaseException:
            # What nobody looked at must not be taken for good by the next run; what another process brought
            # may be in use by it.
            for name in tuple(unchecked):
                (self.root / name).unlink(missing_ok=True)
            raise

    @contextmanager
    def _asked(self) -> Iterator[None]:
        with watched(self._answers), mapped_errors(self._id, self._revision), _silenced():
            yield

    def _check_new(self, path: Path, name: str) -> None:
        """Raise HubError, and keep nothing of it, unless the content is of the size and digest told.

        The cache names a blob by its ETag, which is the SHA-256 of a large file and git's digest of others.
        """
        assert self._listed is not None
        listed, size = self._listed[name], path.stat().st_size
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        told = {self._answers.sha256.get(name, blob.name), blob.name}
        if size != listed.size:
            why = f"it has {size:,} bytes, the hub lists {listed.size:,}"
        elif any(_differs(path, size, digest, listed.blob_id) for digest in told):
            why = "its content has another digest than the hub says"
        else:
            return
        for file in {Path(os.path.realpath(path)), blob, path}:
            file.unlink(missing_ok=True)
        raise HubError(
            CANNOT_FETCH,
            path=f"{self._id}/{name}",
            why=why,
            next_step="Run again; nothing of it was kept",
        )

    def _check_size(self, path: Path, name: str) -> None:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise _not_cached(str(path), "the file is not in the cache") from None
        if self._listed is not None and size != self._listed[name].size:
            raise HubError(
                "the hub's cache holds a damaged file",
                path=path,
                why=f"it has {size:,} bytes, the hub lists {self._listed[name].size:,}",
                next_step=f"Delete {os.path.realpath(path)} and this link to it, then run again",
            )


def _resolve(repo_id: str, revision: str | None) -> str:
    """Return the commit that `revision` names, from the cache where the hub cannot be reached."""
    from huggingface_hub import HfApi, constants

    if revision is not None and not is_safe(revision):  # it becomes the name of a file
        raise HubError(
            CANNOT_FETCH,
            path=f"{repo_id}@{revision}",
            why="it has no such revision",
            next_step="Name a branch, tag or full commit of it with --revision",
        )
    offline = constants.is_offline_mode()
    commit = HfApi().resolve_revision(repo_id, revision=revision, local_files_only=offline).resolved
    if not COMMIT.fullmatch(commit):
        raise Untrue(f"'{commit}' in the cache's refs is no commit")
    return commit


def _list(repo_id: str, commit: str) -> Path:
    """Bring the list of the commit's files into the cache and return the snapshot's folder."""
    from huggingface_hub import constants, snapshot_download

    offline = constants.is_offline_mode()
    return Path(snapshot_download(repo_id, revision=commit, allow_patterns=[], local_files_only=offline))


def _fetch(
    repo_id: str,
    commit: str,
    sizes: Mapping[str, int],
    begun: Callable[[str], None],
    arrived: Callable[[str], None],
) -> None:
    """Bring files, whose sizes are given by name, into the cache.

    What is sent to this process is `begun` first; what another fetches meanwhile only arrives.

    snapshot_download would compare each of its patterns with each name of the repository, which takes hours
    for what a stranger can list, and waits for its workers even when a signal has asked us to stop. Here they
    are left behind then, and give up at the next piece of data.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils.tqdm import tqdm

    left_behind = threading.Event()
    offline = constants.is_offline_mode()
    came: Callable[[int], None]

    class Part(tqdm):
        """What is shown of one file: its share of the whole. It is made when the file's bytes are to come."""

        of: str

        def __init__(self, *args: Any, initial: int = 0, **options: Any) -> None:
            begun(self.of)
            super().__init__(*args, **options | {"disable": True})  # type: ignore[no-untyped-call]
            came(initial)  # of an earlier run

        def update(self, n: float | None = 1) -> None:
            if left_behind.is_set():
                raise RuntimeError("the download was abandoned")
            came(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """What comes over the wire is shown as what is made of it."""

        def set_transfer_postfix_str(self, *args: object, **options: object) -> None:
            """No rate beside that of the whole."""

    def fetch(name: str) -> None:
        class PartOfIt(Part):
            of = name

        hf_hub_download(repo_id, name, revision=commit, tqdm_class=PartOfIt, local_files_only=offline)
        arrived(name)

    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, _CHUNK)
    with downloads.shown.get()(sum(sizes.values())) as came:
        do_all(fetch, sizes, left_behind)


def _cached_list(repo_id: str, commit: str) -> dict[str, RepoFile] | None:
    """Return all the commit's files by name; None when offline and never listed."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        listed = {file.path: file for file in get_cached_repo_tree(repo_id, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None
    for name, file in listed.items():  # others write there too
        check_listed(name, file.size)
    if both := folders_among(listed):
        raise Untrue(f"it lists '{min(both)}' as a file and as a folder")
    return listed


def _differs(path: Path, size: int, digest: str, blob_id: str) -> bool:
    """Tell whether a file's content is not what `digest` says, as far as that says anything."""
    if SHA256.fullmatch(digest):
        told = hashlib.sha256()
    elif digest == blob_id:
        told = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: told).hexdigest() != digest


def _not_cached(path: str, why: str) -> HubError:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        why, next_step = f"{why}, and HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE, then run again"
    else:
        next_step = "Run again with the hub in reach, and a cache (HF_HOME) that can be written"
    return HubError(CANNOT_FETCH, path=path, why=why, next_step=next_step)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep huggingface_hub's log, warnings and bars off stderr."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    verbosity = hub_logging.get_verbosity()
    hide = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub_logging.set_verbosity(logging.CRITICAL)
        if hide:
            disable_progress_bars()
        try:
            yield
        finally:
            hub_logging.set_verbosity(verbosity)
            if hide:
                enable_progress_bars()
