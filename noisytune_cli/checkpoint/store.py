"""An object store, as far as noisytune uses one; the only file that knows obstore.

Credentials, region and endpoint are the store's own standard variables (AWS_*, GOOGLE_*, AZURE_*), which
obstore reads. What goes wrong is told apart once (`StoreFault`), and made an error of by who reads or writes.
Of what a store says only its status and its code are passed on: the rest may hold what is secret.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from noisytune_cli.checkpoint.address import Address
from noisytune_cli.checkpoint.remote import wait_for
from noisytune_cli.errors import (
    HubError,
    InputUnreadable,
    Mismatch,
    NoisytuneError,
    OutputUnsafe,
    PackageMissing,
    ResourceExhausted,
)

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

_T = TypeVar("_T")

#: What is read or sent in one request.
PIECE = 8 << 20

#: Parts that an upload may have (S3's limit, the lowest), and parts that are on their way at a time.
_PARTS = 10_000
_AT_A_TIME = 4

#: A request that fails for the network or the server's load is repeated by obstore, for half a minute or so.
_RETRIES = {
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=8), "base": 2},
}

_STATUS = re.compile(r"status(?: code)?:? (\d{3})\b")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")

Cause = Literal["absent", "denied", "exists", "changed", "full", "lacking", "late", "failed"]

#: What a store's codes and statuses stand for, where obstore has no class of its own for them.
_CAUSES: dict[str, Cause] = {
    **dict.fromkeys(("404", "NoSuchBucket", "NoSuchKey"), "absent"),
    **dict.fromkeys(("401", "403", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"), "denied"),
    **dict.fromkeys(("InvalidAccessKeyId", "RequestExpired"), "denied"),
    **dict.fromkeys(("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), "denied"),
    **dict.fromkeys(("413", "507", "EntityTooLarge", "QuotaExceeded", "XMinioStorageFull"), "full"),
    **dict.fromkeys(("501", "NotImplemented"), "lacking"),
    "412": "changed",
}

#: How obstore says that a store leads on to nowhere, which is how S3 says that a bucket is in another region,
#: and that a request took longer than it may.
_ELSEWHERE, _TOO_LONG = "redirect without LOCATION", "kind: Timeout"


class StoreFault(Exception):
    """What a store refused or could not do: the cause, and what to tell of it."""

    def __init__(self, cause: Cause, why: str) -> None:
        self.cause, self.why = cause, why
        super().__init__(why)


class Object(NamedTuple):
    """An object: its key, its length, and what tells this content from another under the same key."""

    key: str
    size: int
    etag: str | None


class Store:
    """A bucket. Raises StoreFault; a signal ends the wait for an answer."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._opened: ObjectStore | None = None
        try:
            import obstore  # noqa: F401
        except ModuleNotFoundError as error:
            raise PackageMissing(
                "object stores need obstore",
                path=address,
                why="it is not installed",
                next_step="Install it: pip install '.[remote]' in a clone of noisytune",
            ) from error

    @property
    def _store(self) -> ObjectStore:
        """The store as the environment says it is, opened when it is first asked for anything."""
        from obstore.store import from_url

        if self._opened is None:
            # No options of the client: they would take the place of what AWS_ALLOW_HTTP and its like say.
            # Only S3 can be told what to hold an upload against; on the others TLS has to do.
            options: dict[str, Any] = {"retry_config": _RETRIES}
            if self.address.startswith("s3:"):
                options["checksum_algorithm"] = "SHA256"
            try:
                self._opened = from_url(self.address.store, **options)
            except Exception as error:
                known = "Account must be specified" in str(error)
                why = "AZURE_STORAGE_ACCOUNT_NAME is not set" if known else "its variables cannot be used"
                raise StoreFault("denied", why) from None
        return self._opened

    def head(self, key: str) -> Object | None:
        """Return the object at a key, None where there is none."""
        import obstore

        try:
            return _object(_wait(lambda: obstore.head(self._store, key)))
        except StoreFault as fault:
            if fault.cause == "absent":
                return None
            raise

    def below(self, limit: int, key: str | None = None) -> dict[str, Object]:
        """Return what lies below the address, or a key, by its name there; of more than `limit` a part."""
        import obstore

        prefix = self.address.key if key is None else key
        start = len(prefix) + 1 if prefix else 0

        def look() -> dict[str, Object]:
            found: dict[str, Object] = {}
            for page in obstore.list(self._store, prefix or None):
                entries = map(_object, page)
                found |= {entry.key[start:]: entry for entry in entries if entry.key[start:]}
                if len(found) > limit:
                    break
            return found

        return _wait(look)

    def read(self, entry: Object, start: int, end: int) -> bytes:
        """Return the bytes of an object from `start` to `end`; `changed` where it is no longer that one."""
        import obstore

        def read() -> bytes:
            options: GetOptions = {"range": (start, end)}
            if entry.etag is not None:
                options["if_match"] = _quoted(entry.etag)
            answer = obstore.get(self._store, entry.key, options=options)
            told, content = _object(answer.meta), bytes(answer.bytes())
            if told.size != entry.size or (entry.etag and _bare(told.etag) != _bare(entry.etag)):
                raise StoreFault("changed", "another object took its place")
            if len(content) != end - start:
                raise StoreFault("failed", "fewer bytes were sent than asked for")
            return content

        return _wait(read) if end > start else b""

    def create(self, key: str, content: bytes) -> None:
        """Make a small object; `exists` where one is there."""
        import obstore

        _wait(lambda: obstore.put(self._store, key, content, mode="create"))

    def send(
        self, key: str, pieces: Iterable[bytes], size: int, left_behind: threading.Event, *, slowly: bool
    ) -> None:
        """Make an object of `size` bytes in parts, or replace one; `slowly` sends one part at a time.

        An error of `pieces` gives it up, and what was sent is forgotten; so they end where nobody waits:
        `left_behind` tells.
        """
        import obstore

        part, at_a_time = max(PIECE, -(-size // _PARTS)), 1 if slowly else _AT_A_TIME

        def put() -> None:
            obstore.put(
                self._store, key, pieces, use_multipart=True, chunk_size=part, max_concurrency=at_a_time
            )

        _wait(put, left_behind)

    def delete(self, keys: str | list[str], patience: float) -> None:
        """Remove objects, where there are any; `failed` where it takes longer than `patience`."""
        import obstore

        _wait(lambda: obstore.delete(self._store, keys), patience=patience)


def _object(meta: Any) -> Object:
    return Object(meta["path"], meta["size"], meta["e_tag"])


def _bare(etag: str | None) -> str | None:
    return None if etag is None else etag.removeprefix("W/").strip('"')


def _quoted(etag: str) -> str:
    """Return an ETag as a header has it; Azure lists them without quotation marks."""
    return etag if '"' in etag else f'"{etag}"'


def _wait(
    ask: Callable[[], _T], left_behind: threading.Event | None = None, patience: float | None = None
) -> _T:
    """Return what `ask` does; a signal needs not wait for the store."""
    try:
        return wait_for(ask, left_behind, patience)
    except (StoreFault, NoisytuneError):
        raise
    except Exception as error:
        raise _fault(error) from None  # its text may hold what is secret


def _fault(error: Exception) -> StoreFault:
    """Tell what an error of obstore means."""
    from obstore import exceptions

    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    told = [found[1] for found in (code, status) if found is not None]
    said = f"the store answered {' '.join(reversed(told))}" if told else ""
    if code is not None and code[1] == "NoSuchBucket":
        return StoreFault("absent", "there is no such bucket")
    if isinstance(error, FileNotFoundError):
        return StoreFault("absent", said or "there is no such object")
    if isinstance(error, exceptions.AlreadyExistsError):
        return StoreFault("exists", "an object is there already")
    if isinstance(error, exceptions.PreconditionError):
        return StoreFault("changed", "another object took its place")
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return StoreFault("denied", f"access is denied ({said})" if said else "access is denied")
    if _ELSEWHERE in text:
        return StoreFault("denied", "it is in another region than is set, or at another endpoint")
    if told == ["400"]:  # to HEAD, which tells no code: of another region, or with credentials that expired
        return StoreFault("denied", f"access is denied ({said})")
    if cause := next((_CAUSES[one] for one in told if one in _CAUSES), None):
        return StoreFault(cause, f"access is denied ({said})" if cause == "denied" else said)
    if "169.254." in text or "metadata.google" in text:
        return StoreFault("denied", "no credentials are set, and no machine's own could be had")
    if "BadScheme" in text:
        return StoreFault("failed", "its endpoint is http, which is not allowed unless AWS_ALLOW_HTTP=true")
    if isinstance(error, exceptions.InvalidPathError | ValueError):
        return StoreFault("failed", "it has a key that is no path ('..', '//')")
    if _TOO_LONG in text and not told:
        return StoreFault("late", "a request took longer than it may")
    return StoreFault("failed", said or "the connection failed")


_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SESSION_TOKEN, AWS_REGION, …",
    "gs": "GOOGLE_SERVICE_ACCOUNT, …",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY, …",
}


#: How the names of a store's variables begin.
_PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}


def _check_credentials(address: Address) -> str:
    return f"Check the store's variables ({_VARIABLES[address[:2]]}) and what they may do"


@contextmanager
def reading(address: Address) -> Iterator[None]:
    """Turn what a store refuses into the errors of an input."""
    try:
        yield
    except StoreFault as fault:
        raise _unreadable(fault, address) from None


def _unreadable(fault: StoreFault, address: Address) -> NoisytuneError:
    if fault.cause == "absent":
        next_step = "Check the spelling of bucket and key, and the endpoint and region that are set"
        return InputUnreadable("no such input", path=address, why=fault.why, next_step=next_step)
    if fault.cause == "denied":
        return InputUnreadable(
            "cannot read", path=address, why=fault.why, next_step=_check_credentials(address)
        )
    if fault.cause == "changed":
        return Mismatch(
            "the input changed while it was read",
            path=address,
            why=fault.why,
            next_step="Wait until nothing writes to it any more, then run again",
        )
    return _failed("cannot fetch", fault, fault.why, address)


@contextmanager
def writing(address: Address, left: str) -> Iterator[None]:
    """Turn what a store refuses into the errors of an output; `left` says what is there then."""
    try:
        yield
    except StoreFault as fault:
        raise _unwritable(fault, address, left) from None


def _unwritable(fault: StoreFault, address: Address, left: str) -> NoisytuneError:
    why = f"{fault.why}; {left}"
    if fault.cause in ("exists", "changed"):
        next_step = "Choose another output with -o"
        return OutputUnsafe("the output exists", path=address, why=why, next_step=next_step)
    if fault.cause in ("absent", "denied", "full", "lacking"):
        steps = {
            "absent": "Make the bucket, or check the endpoint and region that are set",
            "denied": _check_credentials(address),
            "full": "Free space, or choose another place with -o, then run again",
            "lacking": "Write to a folder here and copy it, or choose another store with -o",
        }
        return ResourceExhausted("cannot write", path=address, why=why, next_step=steps[fault.cause])
    return _failed("cannot write", fault, why, address)


def _failed(what: str, fault: StoreFault, why: str, address: Address) -> HubError:
    next_step = "Check the network and the endpoint that is set, then run again"
    if fault.cause == "late":
        next_step = f"On a slow line give requests more time ({_PREFIXES[address[:2]]}_TIMEOUT=300s); else "
        next_step += "check the network, then run again"
    return HubError(
        what,
        path=address,
        why=why,
        next_step=next_step,
    )
