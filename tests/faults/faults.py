"""Every fault on every system call of a scenario that touches its files.

An undisturbed run is traced first; each call that it makes on the source's or the output's side becomes a
target. A target fails in every way of its kind, once and from then on. A file system that cannot rename
without replacing, or exchange two names, is made by failing those calls always: the ways around them are
scenarios of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import strace
from invariants import Fault, breaches, breaches_after_rerun
from scenarios import Expected, Scenario
from strace import Call
from warm import Warm

#: Added to every run on a file system without renameat2.
WITHOUT_RENAMEAT2 = ("renameat2:error=EINVAL:when=1+",)

_ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EROFS", "EINTR")
_READING = ("EIO", "ESTALE", "ENOMEM", "EINTR")
_READS = {"read", "preadv", "preadv2", "pread64", "getdents64", "lseek", "newfstatat", "fstat"}
_MORE = {
    "openat": ("EMFILE", "ENFILE", "ENOMEM"),
    "renameat2": ("EEXIST", "EINVAL", "ENOSYS"),
    "link": ("EEXIST", "EPERM"),
    "fallocate": ("EOPNOTSUPP", "EFBIG"),
    "flock": ("ENOLCK", "EOPNOTSUPP", "EAGAIN"),
    "write": ("EFBIG", "NOTHING"),
    "pwrite64": ("EFBIG", "NOTHING"),
}


@dataclass(frozen=True)
class Result:
    """One fault's outcome: which calls it hit, and what did not hold."""

    fault: Fault
    injected: int
    code: int
    breaches: tuple[str, ...]


def targets(scenario: Scenario, calls: Sequence[Call]) -> tuple[tuple[str, int], ...]:
    """Return (name, number) of every call on the scenario's files, one for all threads."""
    ours = (str(scenario.source), str(scenario.place))
    found = {
        (c.name, c.number): None for c in calls if any(path in c.text for path in ours) and not c.injected
    }
    return tuple(found)


def faults_of(name: str, number: int) -> Iterator[Fault]:
    """Yield every fault to try on one call."""
    reading = name in _READS
    for kind in (*(_READING if reading else _ERRORS), *_MORE.get(name, ())):
        yield Fault(name, number, kind)
        if kind != "NOTHING":
            yield Fault(name, number, kind, sticky=True)
    yield Fault(name, number, "KILL")


def try_fault(
    scenario: Scenario,
    expected: Expected,
    warm: Warm,
    log: Path,
    fault: Fault,
    always: Sequence[str] = (),
) -> Result:
    """Run the scenario with one fault (and those of `always`), check it, and run it again."""
    scenario.reset()
    names = {fault.call, *(injection.partition(":")[0] for injection in always)}
    # Two rules for one name would replace each other: the fault is the stronger one.
    others = [injection for injection in always if injection.partition(":")[0] != fault.call]
    ended, calls = strace.trace(
        warm, scenario.argv, log, calls=sorted(names), injections=[*others, fault.injection]
    )
    injected = [c for c in calls if c.injected and c.name == fault.call]
    if fault.kind == "KILL" and ended.code == -9:
        injected = [c for c in calls if c.name == fault.call][-1:]
    found = breaches(scenario, expected, fault, ended, injected)
    if not found:
        found = breaches_after_rerun(scenario, expected, warm)
    return Result(fault, len(injected), ended.code, tuple(found))


def count(scenario: Scenario, warm: Warm, log: Path, always: Sequence[str] = ()) -> tuple[Call, ...]:
    """Return all calls of an undisturbed run."""
    scenario.reset()
    ended, calls = strace.trace(warm, scenario.argv, log, injections=always)
    if ended.code != 0:
        raise RuntimeError(f"{scenario.name}: undisturbed, it ends with {ended.code}: {ended.stderr}")
    return calls
