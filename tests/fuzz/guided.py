"""Fuzzing that coverage guides: one target, in a process of its own, for so many seconds.

    python tests/fuzz/guided.py TARGET SECONDS [--seed N] [--corpus DIR]

Needs atheris (`pip install atheris`: Python's binding to libFuzzer), which is no dependency, for not every
Python has a wheel of it. It begins with what the target's own mutations make of a valid document, and with
what earlier runs found in the same corpus. An input that breaks the property is kept in FUZZ_FAILURES.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")

#: libFuzzer's own watch, for what does not return to Python: seconds by the clock, and MiB in all.
_HANG_SECONDS, _MOST_MEMORY = 60, 4096

#: Valid documents with a few things wrong, to begin with; and the longest input, in bytes.
_SEEDS, _LONGEST = 200, 16_384


def available() -> str:
    """Return why this cannot run here, nothing if it can."""
    return "" if importlib.util.find_spec("atheris") else "atheris is not installed (pip install atheris)"


def failures() -> Path:
    """Return the folder in which inputs that break a property are kept."""
    folder = Path(os.environ.get("FUZZ_FAILURES", "fuzz-failures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def scratch() -> Iterator[Path]:
    """Give an empty folder where it costs least to write small files: in memory, if there is such a place."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="noisytune-fuzz-") as folder:
        yield Path(folder)


def fuzz(target: str, seconds: float, seed: int, corpus: Path) -> tuple[int, str]:
    """Fuzz a target; return how many inputs were tried, and what was said of one that broke its property."""
    corpus.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", __file__, target, "--inside", str(corpus)),
            *(f"-max_total_time={max(1, round(seconds))}", f"-seed={seed % 2**31 or 1}"),
            *(f"-timeout={_HANG_SECONDS}", f"-rss_limit_mb={_MOST_MEMORY}", f"-max_len={_LONGEST}"),
            *(f"-artifact_prefix={failures()}/{target}-", "-print_final_stats=1", "-verbosity=0"),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    found = _EXECUTED.search(done.stderr)
    broken = "" if done.returncode == 0 and found else done.stderr[-4000:]
    return int(found[1]) if found else 0, broken


def _inside(target: str, corpus: str, flags: list[str]) -> None:
    """Be the process that libFuzzer runs in."""
    import atheris

    sys.path[:0] = [str(_ROOT), *(str(_ROOT / "tests" / name) for name in ("", "inputs", "faults"))]
    with atheris.instrument_imports(include=["noisytune_cli"]):
        from fuzz.properties import holds
        from fuzz.targets import TARGETS
    check, _, bounds = TARGETS[target]
    sow(target, Path(corpus))
    with scratch() as place:
        atheris.Setup(
            [sys.argv[0], *flags, corpus], lambda content: bool(holds(check, content, place, bounds)) and None
        )
        atheris.Fuzz()


def sow(target: str, corpus: Path) -> None:
    """Put what the target's mutations make of valid documents into an empty corpus."""
    from hypothesis import HealthCheck, Phase, given, settings

    from fuzz.targets import TARGETS

    if any(corpus.iterdir()):
        return
    made: list[bytes] = []

    @settings(
        max_examples=_SEEDS,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(TARGETS[target].inputs())
    def make(content: bytes) -> None:
        made.append(content)

    make()
    for number, content in enumerate(made):
        (corpus / f"sown-{number}").write_bytes(content)


def main() -> int:
    """Fuzz a target; return 1 if an input broke its property."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=_ROOT / "build" / "corpus")
    options = parser.parse_args()
    if why := available():
        print(f"cannot run: {why}", file=sys.stderr)
        return 2
    count, broken = fuzz(options.target, options.seconds, options.seed, options.corpus / options.target)
    print(f"{options.target}: {count:,} inputs{', one of which broke it' * bool(broken)}")
    if broken:
        print(broken, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    if sys.argv[2:3] == ["--inside"]:
        _inside(sys.argv[1], sys.argv[3], sys.argv[4:])
    sys.exit(main())
