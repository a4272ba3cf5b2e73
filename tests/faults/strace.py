"""System calls seen and failed by strace, attached to one held run.

`trace` runs it and returns its calls; `inject` does the same while one of them fails. strace counts the calls
of each thread apart, so a call is named by its number in its own thread. Everything counts from the moment
the run is released: Python's own start is over by then.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from warm import Ended, Run, Warm

#: What a run may do to files, on either side. Only those that occur are found by counting.
CALLS = (
    *("openat", "mkdir", "write", "pwrite64", "fallocate", "fsync", "fdatasync"),
    *("rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir", "close", "flock"),
    *("fchmod", "fchmodat", "chmod", "ftruncate", "getdents64", "newfstatat", "fstat", "statfs", "fstatfs"),
    *("preadv", "preadv2", "pread64", "read", "lseek", "copy_file_range"),
)

_LINE = re.compile(r"(?P<tid>\d+) +(?P<name>\w+)\((?P<rest>.*)$")
_RESUMED = re.compile(r"(?P<tid>\d+) +<\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)$")
_UNFINISHED = " <unfinished ...>"


@dataclass(frozen=True)
class Call:
    """One system call: the thread, its name, its number in that thread, and strace's text after the name."""

    tid: int
    name: str
    number: int
    text: str

    @property
    def injected(self) -> bool:
        """Whether strace made it fail."""
        return "(INJECTED" in self.text

    @property
    def succeeded(self) -> bool:
        """Whether it returned anything but an error."""
        return " = " in self.text and not re.search(r" = -1 E[A-Z]+ \(|\) = \?", self.text)


def available() -> str | None:
    """Return why there is nothing to trace with, or None."""
    return None if shutil.which("strace") else "strace is not installed"


def trace(
    warm: Warm,
    argv: Sequence[str],
    log: Path,
    *,
    calls: Sequence[str] = CALLS,
    injections: Sequence[str] = (),
) -> tuple[Ended, tuple[Call, ...]]:
    """Run `noisytune ARGV` and return how it ended and its calls, in order.

    An injection is strace's: `fsync:error=EIO:when=2+`, `write:signal=KILL:when=1`.
    """
    expressions = [f"trace={','.join(calls)}", *(f"inject={injection}" for injection in injections)]
    run = warm.hold(argv)
    tracer = attach(run, log, expressions)
    run.release()
    ended = run.wait()
    tracer.communicate()
    return ended, parse(log)


def attach(run: Run, log: Path, expressions: Sequence[str]) -> subprocess.Popen[str]:
    """Attach strace to a held run; it ends with the run."""
    options = [word for expression in expressions for word in ("-e", expression)]
    command = ["strace", "-f", "-y", "-s", "16", "-o", str(log), *options, "-p", str(run.pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if " attached" not in said:
        tracer.wait()
        raise RuntimeError(f"strace cannot attach: {said.strip()}")
    return tracer


def parse(log: Path) -> tuple[Call, ...]:
    """Read a log; a call that another thread's interrupted stands where it began."""
    begun: dict[tuple[int, str], int] = {}
    numbers: Counter[tuple[int, str]] = Counter()
    calls: list[Call] = []
    for line in log.read_text(errors="replace").splitlines():
        if resumed := _RESUMED.match(line):
            at = begun.pop((int(resumed["tid"]), resumed["name"]))
            known = calls[at]
            calls[at] = Call(known.tid, known.name, known.number, known.text + resumed["rest"])
        elif found := _LINE.match(line):
            tid, name, rest = int(found["tid"]), found["name"], found["rest"]
            numbers[tid, name] += 1
            if rest.endswith(_UNFINISHED):
                begun[tid, name] = len(calls)
                rest = rest.removesuffix(_UNFINISHED)
            calls.append(Call(tid, name, numbers[tid, name], rest))
    return tuple(calls)
