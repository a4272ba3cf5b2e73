"""noisytune in a process that lacks a package, as on a machine where it was never installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Run before anything else: what looks for packages on the disk does not see those hidden.
_SITE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {hidden!r} else find(name, path, target)
PathFinder.find_spec = find_spec
"""


def run_without(
    packages: tuple[str, ...], folder: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` in a process that finds none of `packages`; `folder` is for its own use."""
    (folder / "sitecustomize.py").write_text(_SITE.format(hidden=packages))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        timeout=120,
    )
