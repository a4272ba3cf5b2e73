"""Programs that see no network but loopback, and of which nothing is left when they end."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_ALONE = (
    *("unshare", "-n", "-p", "-f", "--mount-proc", "--kill-child=KILL", "sh", "-c"),
    'ip link set lo up && exec "$@"',
    "sh",
)

_TESTS = Path(__file__).parent.parent


def in_namespace(command: Sequence[str], seconds: float = 280) -> str:
    """Run a command alone, with these tests' inputs on Python's path; return what it writes to stdout.

    Skips the test where such a place cannot be made.
    """
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("unshare or ip is not here")
    if subprocess.run([*_ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network namespace of its own cannot be made here")
    paths = os.pathsep.join([str(_TESTS / "inputs"), str(_TESTS.parent)])
    # Ray would leave a token in the home directory, for a network that nobody else sees.
    result = subprocess.run(
        [*_ALONE, *command],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
