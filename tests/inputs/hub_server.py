"""A model hub on loopback, as far as huggingface_hub speaks to one: repository info, file tree, files.

It serves repositories out of dictionaries, writes down every request, and fails or lies on demand: `faults`
maps a file name (or `api`) to the way in which its answers are wrong, `headers` to headers of its answers,
`sent` a file name to what comes in place of its content, `answers` a question (`info`, `tree`) to the answer.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from noisytune_cli.checkpoint.find import Found, find


def safetensors(**tensors: list[float]) -> bytes:
    """A safetensors file of F32 vectors."""
    header, data = {}, b""
    for name, values in tensors.items():
        packed = struct.pack(f"<{len(values)}f", *values)
        span = [len(data), len(data) + len(packed)]
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": span}
        data += packed
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


PLAIN = {
    ".gitattributes": b"*.bin filter=lfs\n",
    "config.json": b'{"model_type": "bert"}',
    "tokenizer [v1].json": b"{}",
    "model.safetensors": safetensors(a=[1.0, 2.0]),
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"h5",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{ }",
    "2_Dense/model.safetensors": safetensors(b=[3.0]),
    "coreml/a.mlpackage/Data/weight.bin": b"coreml",
}

SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": safetensors(a=[1.0]),
    "model-00002-of-00002.safetensors": safetensors(b=[2.0]),
    "consolidated.safetensors": safetensors(a=[1.0], b=[2.0]),
}


def fetch(source: str, revision: str | None = None) -> Found:
    """Look at a checkpoint on the hub, and bring what it needs into the cache."""
    found = find(source, revision=revision)
    found.fetch()
    return found


@dataclass
class Repository:
    """One repository with one commit; `token` is what a private one asks for."""

    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    branches: tuple[str, ...] = ("main",)
    token: str | None = None


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """What the server serves and what it was asked."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    sent: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    sent_bytes: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for."""
        gets = [r.path for r in self.requests if r.method == "GET" and "/resolve/" in r.path]
        return sorted({unquote(path.split("/resolve/")[1].split("/", 1)[1]) for path in gets})


@contextmanager
def serve(**repositories: Repository) -> Iterator[Hub]:
    """Serve `repositories` (`__` in a keyword stands for `/`) until the block ends."""
    hub = Hub(repositories={name.replace("__", "/"): repo for name, repo in repositories.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


def asked(hub: Hub, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask this hub, with its cache in `folder`."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.setattr(constants, "AGENT_HARNESSES_PATH", str(folder / "harnesses.json"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.delenv("HF_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        """Keep the test's stderr clean."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        headers = self.headers
        self.hub.requests.append(Request(self.command, path, headers["Authorization"], headers["Range"]))
        is_api = path.startswith("/api/models/")
        rest = path.removeprefix("/api/models/" if is_api else "/")
        found = [name for name in self.hub.repositories if rest == name or rest.startswith(name + "/")]
        if not found:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        repo, rest = self.hub.repositories[found[0]], rest.removeprefix(found[0]).lstrip("/")
        if repo.token is not None and headers["Authorization"] != f"Bearer {repo.token}":
            self._send(401, b"{}", {})
        elif is_api:
            self._answer_api(found[0], repo, rest)
        else:
            _, revision, name = rest.split("/", 2)
            self._answer_file(repo, unquote(revision), unquote(name), body)

    def _answer_api(self, repo_id: str, repo: Repository, rest: str) -> None:
        if self._fails("api"):
            return
        kind, _, revision = rest.partition("/")
        kind = kind if kind == "tree" else "info"
        if revision and unquote(revision) not in (repo.commit, *repo.branches):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif kind in self.hub.answers:
            self._send(200, self.hub.answers[kind], self.hub.headers.get(kind, {}))
        elif kind == "tree":
            tree = [_tree_entry(name, content) for name, content in repo.files.items()]
            self._send(200, json.dumps(tree).encode(), {})
        else:
            self._send(200, json.dumps({"id": repo_id, "sha": repo.commit, "private": False}).encode(), {})

    def _answer_file(self, repo: Repository, revision: str, name: str, body: bool) -> None:
        if name not in repo.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
            return
        content = repo.files[name]
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        headers |= self.hub.headers.get(name, {})
        content = self.hub.sent.get(name, content)
        fault = self.hub.faults.get(name)
        start = self.headers["Range"]
        if fault == "short":
            self._send(200, content[:-1], headers, body)
        elif body and fault == "cut once":
            # The whole length is promised, half arrives, and the rest is answered with the whole file.
            self.hub.faults[name] = "200 to a range"
            self._send(200, content[: len(content) // 2], headers | {"Content-Length": str(len(content))})
            self.close_connection = True
        elif body and fault == "stall":
            self._send(200, b"", headers | {"Content-Length": str(len(content))})
            self.hub.stopped.wait()
            self.close_connection = True
        elif (body or fault == "404") and self._fails(name):
            return
        elif body and start and fault != "200 to a range":
            first, _, last = start.removeprefix("bytes=").partition("-")
            part = slice(int(first), min(int(last or len(content)) + 1, len(content)))
            span = f"bytes {part.start}-{part.stop - 1}/{len(content) + (fault == 'another size')}"
            sent = content[part][: -1 if fault == "short part" else None]
            self._send(206, sent, {"Content-Range": span} | headers)
        else:
            self._send(200, content, headers, body)

    def _fails(self, name: str) -> bool:
        """Answer with the fault of `name`, if it has one that needs no content."""
        fault = self.hub.faults.get(name)
        if fault == "reset":
            self.close_connection = True
        elif fault == "html":
            self._send(200, b"<html>Log in to the network</html>", {})
        elif fault is not None and fault.isdigit():
            codes = {"403": {"X-Error-Code": "GatedRepo"}, "404": {"X-Error-Code": "EntryNotFound"}}
            self._send(int(fault), b"{}", codes.get(fault, {}) | self.hub.headers.get(name, {}))
        else:
            return False
        return True

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command == "GET":
            self.hub.sent_bytes += len(content)
            self.wfile.write(content)


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
