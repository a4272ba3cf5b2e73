"""Running noisytune many times: the harness's side of `warm_server.py`.

A `Warm` starts one server and gives out one run at a time: held before its first instruction, so that a
tracer or a timer can be set up, then released, then waited for. A run that does not end in time is killed
and reported as a hang. Signals go through a pidfd, so they can never reach another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_SERVER = Path(__file__).with_name("warm_server.py")

#: Seconds after which a run hangs, on a machine that does other things, and between two looks at it.
_HANG_SECONDS, _LOOK_SECONDS = 60.0, 0.2


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, or minus the signal that killed it; and what it printed."""

    code: int
    stdout: str
    stderr: str
    hung: bool = False


class Run:
    """One run: held until `release`, then on its way until `wait`."""

    def __init__(self, server: Warm, pid: int) -> None:
        """Take charge of the process `pid`, which still waits."""
        self.pid = pid
        self._server = server
        self._pidfd = os.pidfd_open(pid)

    def release(self) -> None:
        """Let the run start."""
        self._server.say("go")

    def send(self, signum: signal.Signals) -> None:
        """Send a signal, if the run is still there."""
        try:
            signal.pidfd_send_signal(self._pidfd, signum)
        except ProcessLookupError:
            return

    def wait(self, timeout: float = _HANG_SECONDS) -> Ended:
        """Wait for the end; after `timeout` seconds kill the run, and say that it hung.

        What it waits for a processor that others have does not count.
        """
        until = time.monotonic() + timeout - self._starved()
        hung = False
        while not (hung or self._server.has_answer(min(timeout, _LOOK_SECONDS))):
            hung = self._is_there() and time.monotonic() - self._starved() > until
        if hung:
            self.send(signal.SIGKILL)
        code = os.waitstatus_to_exitcode(int(self._server.hear()))
        os.close(self._pidfd)
        return Ended(code, self._server.stdout.read_text(), self._server.stderr.read_text(), hung)

    def _is_there(self) -> bool:
        """Tell whether it has not ended; that is told a moment later."""
        with contextlib.suppress(OSError):
            return " Z " not in Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2][:3]
        return False

    def _starved(self) -> float:
        """Return how many seconds its threads were ready to run, and did not."""
        waited, threads = 0, Path(f"/proc/{self.pid}/task")
        with contextlib.suppress(OSError):  # it, or one of them, has just ended
            for thread in threads.iterdir():
                waited += int((thread / "schedstat").read_text().split()[1])
        return waited * 1e-9


class Warm:
    """A server of runs; use as a context. `folder` takes what the runs print."""

    def __init__(self, folder: Path, warm_up: Sequence[Sequence[str]]) -> None:
        """Prepare a server that runs each of `warm_up` once before it is ready."""
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self.shortened = folder / "shortened"
        self._warm_up = [list(argv) for argv in warm_up]

    def __enter__(self) -> Warm:
        """Start the server and wait until it is warm."""
        command = [sys.executable, str(_SERVER), json.dumps(self._warm_up)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        if (answer := self.hear()) != "ready":
            raise RuntimeError(f"the server did not start: {answer}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the server; a run that is still held goes with it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def hold(self, argv: Sequence[str], short: int | None = None) -> Run:
        """Fork a run of `noisytune ARGV` that waits to be released.

        With a seed `short` its transfers move less than they are asked to; how many did is in `shortened`.
        """
        request = {
            "argv": list(argv),
            "stdout": str(self.stdout),
            "stderr": str(self.stderr),
            "short": short,
            "shortened": str(self.shortened),
        }
        # Here, and not by the run alone: one that is killed before its first instruction has printed nothing.
        for printed in (self.stdout, self.stderr):
            printed.write_bytes(b"")
        self.say(json.dumps(request))
        return Run(self, int(self.hear()))

    def run(self, argv: Sequence[str]) -> Ended:
        """Run `noisytune ARGV` to its end."""
        run = self.hold(argv)
        run.release()
        return run.wait()

    def say(self, line: str) -> None:
        """Send the server a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def hear(self) -> str:
        """Return the server's next line."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def has_answer(self, timeout: float) -> bool:
        """Tell whether a line comes within `timeout` seconds."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return bool(ready)
