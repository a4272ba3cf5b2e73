"""What a hub answers, looked at before huggingface_hub acts on it.

A hub is a stranger, and huggingface_hub takes its word: a commit and an ETag become names of files, a list of
files goes into the cache as it comes, and a body is read to its end. So hooks of its HTTP client see every
answer first, redirects, further pages and repeated requests among them. That is one place for all that the
library asks, whenever it asks; to ask beforehand ourselves would not bind the second answer to the first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from noisytune_cli.checkpoint.layout import is_safe
from noisytune_cli.errors import UsageError
from noisytune_cli.reading import parse_json

#: A repository has no more files than a folder; a hub sends about a thousand of them a page.
MAX_FILES = 100_000
_MAX_ANSWERS = 200

#: Of an answer that is no file, in bytes.
_MAX_BYTES = 16 << 20

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

#: Headers that become names in the cache, and what they look like; a plain ETag does where HEAD is asked.
_ETAG = re.compile(r'(?:W/)?"?[0-9A-Za-z_-]{1,128}"?')
_NAMES = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": _ETAG, "X-Xet-Hash": SHA256}

#: The answers that are about a repository; its files are asked for at other places.
_API = "/api/models/"

#: A wait of a quarter of an hour and more; the hub's own windows are of five minutes.
_LONG = re.compile(r"(?:^|;\s*t\s*=\s*)(?:9\d\d|\d{4,})")


#: Who sees what comes in; the last counts.
_seen_by: list[Answers] = []


class Untrue(Exception):
    """An answer that no hub gives; says what is wrong with it."""


class Answers:
    """What is expected of the answers to come, and what the files were said to be.

    `commit` is what everything has to be of, once it is known; `longest` the size of the largest file that is
    fetched. `sha256` has by name what a list said of files that lie in large file storage.
    """

    def __init__(self) -> None:
        self.commit: str | None = None
        self.longest = 0
        self.sha256: dict[str, str] = {}
        self._files = 0
        self._about = 0

    def look(self, response: Any) -> None:
        """Raise Untrue for an answer that must not be acted on; bound what will be read of it."""
        headers = response.headers
        forms = _NAMES
        if (
            response.request.method == "HEAD"
            and response.status_code < 400
            and "X-Linked-Etag" not in headers
        ):
            forms = _NAMES | {"ETag": _ETAG}
        for name, form in forms.items():
            if name in headers and not form.fullmatch(headers[name]):
                raise Untrue(f"its {name} is {headers[name]}")
        if self.commit is not None and headers.get("X-Repo-Commit", self.commit) != self.commit:
            raise Untrue(f"it is of commit {headers['X-Repo-Commit']}, and {self.commit} was asked for")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Untrue("it is compressed, which was not asked for")
        if response.status_code >= 400 and any(
            _LONG.search(headers.get(name, "")) for name in ("Retry-After", "RateLimit")
        ):
            raise Untrue("it asks to wait for more than a quarter of an hour")
        response.stream = _bounded(response.stream, max(self.longest, _MAX_BYTES))
        if _API in response.url.path:
            self._look_at_answer(response)

    def _look_at_answer(self, response: Any) -> None:
        self._about += 1
        if self._about > _MAX_ANSWERS:
            raise Untrue(f"it takes more than {_MAX_ANSWERS} answers")
        for onward in (response.headers.get("Location"), response.links.get("next", {}).get("url")):
            if onward is not None and _API not in onward:
                raise Untrue(f"it leads on to {onward}")
        if not response.is_success:
            return
        response.read()
        answer = parse_json(response.content, lenient=True)
        is_list = self.commit is not None and f"/tree/{self.commit}" in response.url.path
        if isinstance(answer, list) != is_list:
            raise Untrue(f"it is {'no' if is_list else 'a'} list")
        if isinstance(answer, list):
            self._files += len(answer)
            if self._files > MAX_FILES:
                raise Untrue(f"it lists more than {MAX_FILES:,} files")
            for entry in answer:
                self._look_at_entry(entry)
        elif self.commit is None and not COMMIT.fullmatch(_text(answer, "sha")):
            raise Untrue("it names no commit")

    def _look_at_entry(self, entry: object) -> None:
        if _text(entry, "type") == "directory":
            return
        if not isinstance(entry, dict) or _text(entry, "type") != "file":
            raise Untrue("it lists what is no file")
        check_listed(_text(entry, "path"), entry.get("size"))
        if not COMMIT.fullmatch(_text(entry, "oid")):
            raise Untrue("it lists a file without its digest")
        if (lfs := entry.get("lfs")) is not None:
            if not SHA256.fullmatch(_text(lfs, "oid")) or lfs.get("size") != entry["size"]:
                raise Untrue("it lists a large file without its SHA-256")
            self.sha256[entry["path"]] = lfs["oid"]


def check_listed(name: str, size: object) -> None:
    """Raise Untrue for a file that would leave the snapshot's folder, or cannot be."""
    if not is_safe(name):
        raise Untrue(f"it lists an unsafe file name, '{name}'")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise Untrue(f"it lists a file of a size that is none, '{name}'")


def _text(value: object, key: str) -> str:
    """Return the text at `key`, empty where there is none."""
    text = value.get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else ""


@contextmanager
def watched(answers: Answers) -> Iterator[None]:
    """Have `answers` see all that huggingface_hub gets meanwhile, whatever thread asks.

    Raises UsageError if the user's own settings are such that nothing can be asked.
    """
    session = _session()
    if session is not None and _look not in session.event_hooks["response"]:
        _hook(session)
    _seen_by.append(answers)
    try:
        yield
    finally:
        _seen_by.pop()


def _hook(session: Any) -> None:
    """Have clients like this one show what they send and get.

    The library makes its client anew when a connection failed, so a hook on the one that is there gets lost.
    """
    from huggingface_hub import set_client_factory

    make, before = type(session), session.event_hooks
    hooks = {"request": [*before["request"], _ask_plainly], "response": [*before["response"], _look]}
    set_client_factory(lambda: make(event_hooks=hooks, follow_redirects=True, timeout=None))


def _ask_plainly(request: Any) -> None:
    if _seen_by:  # a compressed megabyte can be a gigabyte
        request.headers["Accept-Encoding"] = "identity"


def _look(response: Any) -> None:
    if _seen_by:
        _seen_by[-1].look(response)


def _session() -> Any:
    """Return huggingface_hub's HTTP client, None where the user wants no network.

    Nothing is sent yet, so whatever fails here fails for the user's own settings, which are read here.
    """
    try:
        from huggingface_hub import constants, get_session, get_token

        if constants.is_offline_mode():
            return None
        session = get_session()
        url = session.build_request("GET", constants.ENDPOINT).url
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("HF_ENDPOINT does not begin with http:// or https:// and a host")
        token = get_token() or ""
        if not (token.isascii() and token.isprintable()):
            raise ValueError("the token has characters that no token has")
    except ModuleNotFoundError:
        raise  # no setting helps
    except Exception as error:
        raise UsageError(
            "cannot ask the hub",
            why=str(error) or type(error).__name__,
            next_step="Check HF_ENDPOINT, HF_TOKEN, and HTTPS_PROXY, ALL_PROXY, NO_PROXY, then run again",
        ) from error
    return session


def _bounded(stream: Any, room: int) -> Any:
    """Return the body of an answer, which raises Untrue when it has more than `room` bytes."""
    from huggingface_hub.errors import HfHubHTTPError

    # httpx, whatever the name of the package is that this huggingface_hub is built on.
    httpx: Any = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]

    class Bounded(httpx.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            left = room
            for data in stream:
                left -= len(data)
                if left < 0:
                    raise Untrue(f"it has more than {room:,} bytes")
                yield data

        def close(self) -> None:
            stream.close()

    return Bounded()
