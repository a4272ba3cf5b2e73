"""Break the product in one place at a time, and show that the tests see it.

    python tests/faults/prove.py [--only WORD]

Each mutation is applied to a copy of the package, and the part of the tests that guards the place is run on
the copy: it has to fail, by failed tests and not by an error of its own. The same part has to pass on an
unbroken copy. A mutation whose text is no longer found is an error too, so that this list stays true.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutations import MUTATIONS, Mutation

_ROOT = Path(__file__).resolve().parents[2]
_FAILED = 1  # pytest: tests were run, and some failed


def main() -> int:
    """Prove every mutation that is asked for; return 1 if one survives or does not apply."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="WORD", help="only mutations whose name holds this")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    holes = 0
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        # Copied once: what is edited meanwhile must not be mistaken for a mutation.
        unbroken = _copy(_ROOT, Path(folder))
        for suite in dict.fromkeys(mutation.suite for mutation in chosen):
            if (code := _test(unbroken, suite)) != 0:
                print(f"not proven: unbroken, {' '.join(suite)} ends with {code}")
                return 1
        for mutation in chosen:
            started = time.monotonic()
            seen = _is_seen(mutation, _copy(unbroken, Path(folder)))
            holes += not seen
            print(
                f"{'red  ' if seen else 'HOLE '} {mutation.name} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    print(f"{len(chosen) - holes} of {len(chosen)} mutations are seen")
    return 1 if holes else 0


def _is_seen(mutation: Mutation, copy: Path) -> bool:
    path = copy / "noisytune_cli" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: its text is in {mutation.file} {text.count(mutation.old)} times, not once"
        )
    path.write_text(text.replace(mutation.old, mutation.new))
    return _test(copy, mutation.suite) == _FAILED


def _copy(root: Path, folder: Path) -> Path:
    """Return a fresh copy of the package, its tests and what these read, in a folder of its own."""
    copy = Path(tempfile.mkdtemp(dir=folder))
    for name in ("noisytune_cli", "tests", "docs"):
        shutil.copytree(root / name, copy / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, copy)
    return copy


def _test(copy: Path, suite: tuple[str, ...]) -> int:
    """Run tests in a copy, which comes first on the path, and return pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *suite]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
