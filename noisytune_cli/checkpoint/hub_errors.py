"""The errors of huggingface_hub, turned into ours, here and nowhere else.

What the library raises depends on whether its cache could help: it wraps what the hub or the network did in
an error about the cache. The user is told the cause, and what to do about it, in one line.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from noisytune_cli.errors import HubError, NoisytuneError, ResourceExhausted

CANNOT_FETCH = "cannot fetch from the hub"

#: These come from writing the cache, not from the network, as does what names a file.
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


@contextmanager
def mapped_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn every error of huggingface_hub into one of ours."""
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

    # The HTTPError of the httpx that this huggingface_hub is built on, whatever that package's name.
    transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    where = repo_id if revision is None else f"{repo_id}@{revision}"
    try:
        yield
    except (RevisionResolutionError, transport_error, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno and (error.errno in _DISK_ERRNOS or error.filename):
            raise cannot_write_cache(os.strerror(error.errno), error.filename) from error
        why, next_step = _explain(error)
        raise HubError(CANNOT_FETCH, path=where, why=why, next_step=next_step) from error
    except NoisytuneError:
        raise
    except Exception as error:  # what the library makes of an answer that it did not expect can be anything
        raise HubError(
            CANNOT_FETCH,
            path=where,
            why=f"the answer is not that of a hub ({error or type(error).__name__})",
            next_step="Check HF_ENDPOINT and the proxy, then run again",
        ) from error


def cannot_write_cache(why: str, path: str | Path | None) -> ResourceExhausted:
    """Return the error for a cache that takes nothing more."""
    return ResourceExhausted(
        "cannot write the hub's cache",
        path=path,
        why=why,
        next_step="Free space, or choose another cache with HF_HOME, then run again",
    )


def _explain(error: BaseException) -> tuple[str, str]:
    """Return why fetching failed, and what the user can do."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return "access to it is restricted", f"Ask for access on its page, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such path here, and no such repository there, or it is private",
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
    if constants.is_offline_mode():
        return (
            "no such path here, it is not in the cache, and HF_HUB_OFFLINE is set",
            "Check the spelling, or unset HF_HUB_OFFLINE, then run again",
        )
    if isinstance(error, errors.RevisionResolutionError | errors.LocalEntryNotFoundError):
        # Raised when the cache could not help either; the cause is what the hub or the network did.
        if error.__cause__ is not None:
            return _explain(error.__cause__)
        return "it is not in the cache", "Run again with the hub in reach"
    if "Consistency check failed" in str(error):
        return "a file arrived with the wrong size", "Run again; nothing of it was kept"
    return (
        f"no such path here, and the connection failed ({type(error).__name__}: {error})",
        "Check the spelling and the network, then run again",
    )
