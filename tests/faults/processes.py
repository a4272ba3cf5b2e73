"""Real noisytune processes, from Python's first instruction to its last: what a warm fork cannot show."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import IO

COMMAND = (sys.executable, "-m", "noisytune_cli")


def start(
    argv: Sequence[str],
    *,
    before: Sequence[str] = (),
    stdout: int | IO[bytes] = subprocess.PIPE,
    setup: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `noisytune ARGV`, under the command `before` (prlimit, setpriv…), after `setup` in the child."""
    return subprocess.Popen(
        [*before, *COMMAND, *argv],
        stdout=stdout,
        stderr=subprocess.PIPE,
        preexec_fn=setup,
    )


def finish(process: subprocess.Popen[bytes], timeout: float = 60) -> tuple[int, str]:
    """Wait for a process, and return its exit code and what it wrote to stderr."""
    _, stderr = process.communicate(timeout=timeout)
    return process.returncode, stderr.decode()
