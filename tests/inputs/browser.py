"""A headless Chromium, driven over a pipe by its DevTools protocol: no driver, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

#: What Debian and others call it; the variable names another.
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_VARIABLE = "NOISYTUNE_BROWSER"


def find_browser() -> str | None:
    """The path of a Chromium here, or None."""
    return os.environ.get(_VARIABLE) or next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One page in a browser of its own. `errors` are what its console has, `requests` what it asked for."""

    def __init__(self, path: str, profile: Path) -> None:
        into, self._out = os.pipe()
        self._in, out_of = os.pipe()
        # The browser reads descriptor 3 and writes 4, whatever the pipe's numbers are here.
        shell = f'exec 3<&{into} 4>&{out_of}; exec "$0" "$@"'
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, path, *arguments, f"--user-data-dir={profile}"],
            pass_fds=(into, out_of),
            stderr=subprocess.DEVNULL,
        )
        os.close(into)
        os.close(out_of)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.call("Page.navigate", url=path.as_uri())
        while self.evaluate("document.readyState") != "complete":
            pass

    def evaluate(self, expression: str) -> Any:
        """Return what an expression gives in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """Return what is to be seen, as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        self._process.kill()
        self._process.wait()
        os.close(self._in)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 16)
            assert chunk, "the browser ended"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.errors.append(str(params))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(str(params))
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
        return message
