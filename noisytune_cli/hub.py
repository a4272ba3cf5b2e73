"""A checkpoint on the Hugging Face hub, fetched into the standard cache.

One idea: the repository's list of files is enough to decide what is needed (`layout.py`), so the order is
list, config, index, and only then the weights and the files beside them. Whatever can be refused is refused
before a weight is fetched, and no other weight format is fetched at all. The cache, the token, HF_ENDPOINT
and HF_HUB_OFFLINE are huggingface_hub's own; its errors become ours here and nowhere else.
"""

from __future__ import annotations

import errno
import logging
import os
import posixpath
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape as glob_escape
from pathlib import Path
from typing import cast

from noisytune_cli.config import CONFIG, ConfigCheck, read_config
from noisytune_cli.errors import HubError, ResourceExhausted
from noisytune_cli.folder import list_folder
from noisytune_cli.index import check_present, read_index
from noisytune_cli.layout import (
    INDEX_SUFFIX,
    Listing,
    arrange,
    choose_weights,
    list_names,
)

_ID_PART = re.compile(r"(?=.{1,96}$)\w(?:[\w.-]*\w)?", re.ASCII)

#: A name that ends so is a misspelt path, not a repository.
_FILE_SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".git")

_CANNOT = "cannot fetch from the hub"


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
    quiet: bool = False,
) -> Snapshot:
    """Fetch what is needed of a repository (from the cache what is there) and return where it lies.

    `weights` names the weights as --weights does; `check_config` may refuse the config before any weights are
    fetched. Raises HubError for the hub and the network, InputInvalid for a repository without safetensors.
    """
    with _mapped_errors(repo_id, revision), _silenced(quiet):
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
    if chosen.endswith(INDEX_SUFFIX):
        with _mapped_errors(repo_id, revision), _silenced(quiet):
            _fetch(repo_id, commit, [chosen])
        _check_sizes(root, sizes, [chosen])
        index = read_index(root, chosen)
        files = index.shards
        if sizes is None and (missing := set(files).difference(listing.files)):
            raise _not_cached(repo_id, f"{min(missing)} is not in the cache")
        check_present(index, listing.files, repo_id)

    others, _ = arrange(listing, chosen, files)
    needed = [*files, *others]
    with _mapped_errors(repo_id, revision), _silenced(quiet):
        _fetch(repo_id, commit, needed)
    _check_sizes(root, sizes, needed)
    return Snapshot(root, commit, listing)


def _resolve(repo_id: str, revision: str | None) -> str:
    """Return the commit that `revision` names, from the cache where the hub cannot be reached."""
    from huggingface_hub import HfApi

    return HfApi().resolve_revision(repo_id, revision=revision).resolved


def _fetch(repo_id: str, commit: str, names: Iterable[str]) -> Path:
    """Bring `names` (those that exist) into the cache and return the snapshot's folder."""
    from huggingface_hub import snapshot_download

    # Names are handed over as patterns; a bracket in a name must match itself.
    patterns = [glob_escape(name) for name in names]
    return Path(snapshot_download(repo_id, revision=commit, allow_patterns=patterns))


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
                _CANNOT,
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
        _CANNOT,
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


@contextmanager
def _mapped_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn every error of huggingface_hub into one of ours."""
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

    # The HTTPError of the httpx that this huggingface_hub is built on, whatever that package's name.
    transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    where = repo_id if revision is None else f"{repo_id}@{revision}"
    try:
        yield
    except (RevisionResolutionError, transport_error, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
            raise ResourceExhausted(
                "cannot write the hub's cache",
                path=error.filename,
                why=os.strerror(error.errno),
                next_step="Free space, or choose another cache with HF_HOME, then run again",
            ) from error
        why, next_step = _explain(error)
        raise HubError(_CANNOT, path=where, why=why, next_step=next_step) from error
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(
            _CANNOT,
            path=where,
            why=f"the answer is not that of a hub ({error})",
            next_step="Check HF_ENDPOINT and the proxy, then run again",
        ) from error


def _explain(error: BaseException) -> tuple[str, str]:
    """Return why fetching failed, and what the user can do."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return "access to it is restricted", f"Ask for access on its page, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private",
            f"Check the spelling; for a private one {log_in}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision", "Name a branch, tag or full commit of it with --revision"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"not authorised (HTTP {status})", f"Check the token: {log_in}"
        if status == 429:
            return "too many requests (HTTP 429)", "Wait a few minutes, then run again"
        return f"the hub answered HTTP {status}", "Run again later; what was fetched is kept"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE, then run again"
    if isinstance(error, errors.RevisionResolutionError | errors.LocalEntryNotFoundError):
        # Raised when the cache could not help either; the cause is what the hub or the network did.
        if error.__cause__ is not None:
            return _explain(error.__cause__)
        return "it is not in the cache", "Run again with the hub in reach"
    if "Consistency check failed" in str(error):
        return "a file arrived with the wrong size", "Run again; nothing of it was kept"
    return f"the connection failed ({type(error).__name__}: {error})", "Check the network, then run again"


_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
