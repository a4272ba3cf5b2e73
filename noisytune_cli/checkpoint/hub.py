"""A checkpoint on the Hugging Face hub, fetched into the standard cache.

One idea: the repository's list of files is enough to decide what is needed (`checkpoint/weights.py`,
`checkpoint/layout.py`), so the order is list, config, index, manifests, and only then the weights and the
files beside them. Whatever can be refused is refused before a weight is fetched, and no other weight format
is fetched at all. The cache, the token, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's own.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape as glob_escape
from pathlib import Path

from noisytune_cli.checkpoint.config import CONFIG, ConfigCheck, read_config
from noisytune_cli.checkpoint.folder import list_folder
from noisytune_cli.checkpoint.hub_errors import CANNOT_FETCH, mapped_errors
from noisytune_cli.checkpoint.index import check_present, read_index
from noisytune_cli.checkpoint.layout import (
    CHUNKS_SUFFIX,
    INDEX_SUFFIXES,
    METADATA,
    Listing,
    arrange,
    list_names,
    manifests,
)
from noisytune_cli.checkpoint.weights import choose_weights
from noisytune_cli.errors import HubError
from noisytune_cli.manifest.previous import EarlierCheck, of_folder
from noisytune_cli.manifest.write import MAX_BYTES

_ID_PART = re.compile(r"(?=.{1,96}$)\w(?:[\w.-]*\w)?", re.ASCII)

#: A name that ends so is a misspelt path, not a repository.
_FILE_SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".git")

#: How much is fetched between two looks at whether to stop, in bytes, and how long the workers then get to
#: remove their partial files, in seconds.
_CHUNK = 256 << 10
_GRACE = 1.0


@dataclass(frozen=True)
class Snapshot:
    """A downloaded commit: where it lies, and all the repository's names, downloaded or not."""

    root: Path
    commit: str
    listing: Listing


def is_repo_id(text: str) -> bool:
    """Tell whether `text` looks like NAME or OWNER/NAME."""
    parts = text.split("/")
    return (
        len(parts) <= 2
        and all(_ID_PART.fullmatch(part) and "--" not in part and ".." not in part for part in parts)
        and not text.endswith(_FILE_SUFFIXES)
    )


def download(
    repo_id: str,
    revision: str | None = None,
    *,
    weights: str | None = None,
    check_config: ConfigCheck | None = None,
    check_earlier: EarlierCheck | None = None,
    quiet: bool = False,
) -> Snapshot:
    """Fetch what is needed of a repository (from the cache what is there) and return where it lies.

    `weights` names the weights as --weights does. Before any weights are fetched `check_config` may refuse
    the config, and `check_earlier` what an earlier run of noisytune left. Raises HubError for the hub and the
    network, InputInvalid for a repository without weights.
    """
    with mapped_errors(repo_id, revision), _silenced(quiet):
        commit = _resolve(repo_id, revision)
        home = posixpath.dirname(weights or "")
        config_name = posixpath.join(home, CONFIG)
        root = _fetch(repo_id, commit, [CONFIG, config_name])
        sizes = _cached_sizes(repo_id, commit)
    listing = list_folder(root) if sizes is None else list_names(_checked_names(repo_id, sizes))

    chosen = choose_weights(listing, weights, repo_id)
    _check_sizes(root, sizes, [name for name in (config_name,) if name in listing.files])
    config = read_config(root / config_name)
    if config is not None and check_config is not None:
        check_config(config, f"{repo_id}/{config_name}")

    files: tuple[str, ...] = (chosen,)
    if chosen.endswith(INDEX_SUFFIXES):
        with mapped_errors(repo_id, revision), _silenced(quiet):
            _fetch(repo_id, commit, [chosen])
        _check_sizes(root, sizes, [chosen])
        index = read_index(root, chosen)
        files = index.shards
        if sizes is None and (missing := set(files).difference(listing.files)):
            raise _not_cached(repo_id, f"{min(missing)} is not in the cache")
        check_present(index, listing.files, repo_id)

    elif posixpath.basename(chosen) == METADATA:
        home = posixpath.dirname(chosen)
        chunks = (name for name in listing.files if name.endswith(CHUNKS_SUFFIX))
        files += tuple(name for name in chunks if posixpath.dirname(name) == home)

    # A manifest is not copied, but says what was done to the weights.
    left = [name for name in manifests(listing) if sizes is None or sizes[name] <= MAX_BYTES]
    if left:
        with mapped_errors(repo_id, revision), _silenced(quiet):
            _fetch(repo_id, commit, left)
        earlier, _ = of_folder(root, left, files)
        if earlier is not None and check_earlier is not None:
            check_earlier(earlier)

    others, _ = arrange(listing, chosen, files)
    needed = [*files, *others]
    with mapped_errors(repo_id, revision), _silenced(quiet):
        _fetch(repo_id, commit, needed)
    _check_sizes(root, sizes, needed)
    return Snapshot(root, commit, listing)


def _resolve(repo_id: str, revision: str | None) -> str:
    """Return the commit that `revision` names, from the cache where the hub cannot be reached."""
    from huggingface_hub import HfApi

    return HfApi().resolve_revision(repo_id, revision=revision).resolved


def _fetch(repo_id: str, commit: str, names: Iterable[str]) -> Path:
    """Bring `names` (those that exist) into the cache and return the snapshot's folder.

    snapshot_download waits for its worker threads even when a signal has asked us to stop. So it runs in a
    thread of its own, which is left behind then, and the workers give up at the next piece of data.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    left_behind = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if left_behind.is_set():
                raise RuntimeError("the download was abandoned")
            shown: bool | None = super().update(n)
            return shown

    # Names are handed over as patterns; a bracket in a name must match itself.
    patterns = [glob_escape(name) for name in names]
    outcome: Future[str] = Future()

    def fetch() -> None:
        try:
            outcome.set_result(
                snapshot_download(repo_id, revision=commit, allow_patterns=patterns, tqdm_class=Bar)
            )
        except BaseException as error:  # handed to the thread that waits, whatever it is
            outcome.set_exception(error)

    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, _CHUNK)
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        return Path(outcome.result())
    finally:
        left_behind.set()
        thread.join(_GRACE)


def _cached_sizes(repo_id: str, commit: str) -> dict[str, int] | None:
    """Return size in bytes by name of all the commit's files; None when offline and never listed."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo_id, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None


def _checked_names(repo_id: str, sizes: Mapping[str, int]) -> list[str]:
    """Return the repository's file names; raises HubError for one that would leave the snapshot's folder."""
    for name in sizes:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise HubError(
                CANNOT_FETCH,
                path=repo_id,
                why=f"it lists an unsafe file name, '{name}'",
                next_step="Report it to the hub",
            )
    return list(sizes)


def _check_sizes(root: Path, sizes: Mapping[str, int] | None, names: Iterable[str]) -> None:
    """Raise HubError unless every file is in the cache, as long as the hub says it is."""
    for name in names:
        path = root / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise _not_cached(str(path), "the file is not in the cache") from None
        if sizes is not None and size != sizes[name]:
            raise HubError(
                "the hub's cache holds a damaged file",
                path=path,
                why=f"it has {size:,} bytes, the hub lists {sizes[name]:,}",
                next_step=f"Delete {os.path.realpath(path)} and this link to it, then run again",
            )


def _not_cached(path: str, why: str) -> HubError:
    return HubError(
        CANNOT_FETCH,
        path=path,
        why=f"{why}, and the hub cannot be asked",
        next_step="Unset HF_HUB_OFFLINE, then run again",
    )


@contextmanager
def _silenced(quiet: bool) -> Iterator[None]:
    """Keep huggingface_hub's log and warnings off stderr, and its progress off all but a terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    verbosity = hub_logging.get_verbosity()
    hide = (quiet or not sys.stderr.isatty()) and not are_progress_bars_disabled()
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
