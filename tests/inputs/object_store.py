"""An object store on loopback: moto's S3, behind a proxy that writes down every request and fails on demand.

`faults` are tried on each request in their order: the first that takes it is used up (unless it is meant to
stay). A test asks for the `store` fixture, and puts objects into a bucket of its own.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

SECRET = "5ecretKeyThatNobodyMaySee"


@dataclass
class Asked:
    """A request that came to the proxy."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Fault:
    """What goes wrong with a request whose method and path fit.

    `before` is called first. With a `status` the store is not asked; with `lost` it is, and the connection
    ends without its answer; `cut` leaves out the last bytes of the body, `short` also says that they are
    fewer; `instead` takes the body's place. The store does not see the header that it `drops`, and another
    body where it `damages` that. It happens `times` times.
    """

    method: str
    path: str
    status: int | None = None
    body: bytes = b""
    reset: bool = False
    lost: bool = False
    cut: int = 0
    short: int = 0
    instead: bytes | None = None
    drops: str = ""
    damages: bool = False
    before: Callable[[], object] | None = None
    times: int = 1

    def takes(self, asked: Asked) -> bool:
        """Tell whether it happens to this request."""
        if asked.method != self.method or not re.search(self.path, asked.path) or not self.times:
            return False
        self.times -= 1
        return True


def error(code: str) -> bytes:
    """The body of an S3 error."""
    return f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()


def _sha256(content: bytes) -> str:
    return b64encode(hashlib.sha256(content).digest()).decode()


@dataclass
class ObjectStore:
    """A bucket on loopback; `asked` are the requests that came, `faults` what is to go wrong."""

    direct: str
    bucket: str
    asked: list[Asked] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def put(self, key: str, content: bytes) -> None:
        """Put an object past the proxy."""
        _ask(f"{self.direct}/{self.bucket}/{quote(key)}", "PUT", content)

    def put_folder(self, folder: Path, key: str) -> None:
        """Put all the files of a folder below a key."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def get(self, key: str) -> bytes:
        return _ask(f"{self.direct}/{self.bucket}/{quote(key)}", "GET")

    def delete(self, key: str) -> None:
        """Remove an object past the proxy."""
        _ask(f"{self.direct}/{self.bucket}/{quote(key)}", "DELETE")

    def keys(self, below: str = "") -> set[str]:
        """The keys below a prefix, without it."""
        listed = _ask(f"{self.direct}/{self.bucket}?list-type=2&prefix={quote(below)}", "GET").decode()
        return {key.removeprefix(below) for key in re.findall("<Key>(.*?)</Key>", listed)}

    def uploads(self) -> list[str]:
        """The keys of uploads in parts that were neither completed nor aborted."""
        return re.findall("<Key>(.*?)</Key>", _ask(f"{self.direct}/{self.bucket}?uploads", "GET").decode())

    def of(self, method: str, path: str = "") -> list[Asked]:
        """The requests of a method whose path fits."""
        return [one for one in self.asked if one.method == method and re.search(path, one.path)]


def _ask(url: str, method: str, content: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, data=content, method=method)
    request.add_header("Content-Type", "application/octet-stream")
    request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request")
    with urllib.request.urlopen(request, timeout=30) as answer:
        body: bytes = answer.read()
    return body


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of moto's server."""
    pytest.importorskip("obstore", reason="object stores need obstore")
    pytest.importorskip("moto", reason="the object store of the tests is moto's")
    with started() as address:
        yield address


@contextmanager
def started() -> Iterator[str]:
    """Start moto's server, which takes seconds, and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                _ask(f"{address}/moto-api/", "GET")
                break
            except (OSError, http.client.HTTPException):
                assert server.poll() is None, "moto's server did not start"
                time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


_buckets = count()


@pytest.fixture
def store(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An empty bucket, which the environment leads to through the proxy."""
    with proxied(moto) as (made, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield made


@contextmanager
def proxied(moto: str) -> Iterator[tuple[ObjectStore, dict[str, str]]]:
    """Make an empty bucket and a proxy before it; give it and the environment that leads to it."""
    made = ObjectStore(moto, f"bucket-{next(_buckets)}")
    _ask(f"{moto}/{made.bucket}", "PUT")
    server = _Proxy(("127.0.0.1", 0), _handler(made))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield (
            made,
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_REGION": "us-east-1",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Proxy(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hangs up."""


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            store.asked.append(asked)
            fault = next((one for one in store.faults if one.takes(asked)), None)
            if fault is not None and fault.before is not None:
                fault.before()
            if fault is not None and fault.reset:
                return self._hang_up()
            if fault is not None and fault.status is not None:
                return self._answer(fault.status, {"Content-Type": "application/xml"}, fault.body)
            if fault is not None and fault.drops:
                del self.headers[fault.drops]
            if fault is not None and fault.damages and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            if (told := asked.headers.get("x-amz-checksum-sha256")) and told != _sha256(body):
                # As S3 does; moto does not look.
                return self._answer(400, {"Content-Type": "application/xml"}, error("BadDigest"))
            status, headers, content = self._forward(body)
            if fault is not None and fault.lost:
                return self._hang_up()
            if fault is not None and fault.instead is not None:
                content = fault.instead
            if fault is not None and fault.short:
                content = content[: -fault.short]
            return self._answer(status, headers, content, cut=0 if fault is None else fault.cut)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(store.direct.removeprefix("http://"), timeout=60)
            try:
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                answer = connection.getresponse()
                return answer.status, dict(answer.headers.items()), answer.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: int = 0) -> None:
            self.send_response(status)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            for name, value in headers.items():
                if name.lower() not in (
                    "content-length",
                    "transfer-encoding",
                    "connection",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) - cut])
            if cut:
                self._hang_up()

        def _hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    return Handler
