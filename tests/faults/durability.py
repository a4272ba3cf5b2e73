"""Whether a run flushed everything in the right order, read off its system calls.

Before a name appears in the output: every file below it is flushed after its last write, and every directory
after its last new name. After the last name has appeared, the directory it stands in is flushed; before the
manifest's appears, whatever else changed there is. Otherwise a power cut could show a name without the bytes,
a manifest without its weights, or nothing at all after exit 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from scenarios import LEFT_OVER, Scenario
from strace import Call

_FD = re.compile(r"^\d+<([^>]*)>")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_WRITES = {"write", "pwrite64", "ftruncate", "fallocate", "copy_file_range"}
_FLUSHES = {"fsync", "fdatasync"}
_RENAMES = {"rename", "renameat", "renameat2", "link", "linkat"}
_MANIFEST = "noisytune.json"
_ANNOUNCEMENT = f"{LEFT_OVER}moves"


class _Ledger:
    """When each file was last written, each directory last changed, and each of them last flushed."""

    def __init__(self) -> None:
        self.changed: dict[str, int] = {}
        self.flushed: dict[str, int] = {}

    def name_changed(self, path: str, at: int) -> None:
        self.changed[os.path.dirname(path)] = at

    def unflushed(self, root: str) -> list[str]:
        """Return what is changed and not flushed since, of `root` and everything below it."""
        return sorted(
            path
            for path, at in self.changed.items()
            if (path == root or path.startswith(f"{root}/")) and self.flushed.get(path, -1) < at
        )

    def move(self, source: str, target: str) -> None:
        for times in (self.changed, self.flushed):
            for path in [p for p in times if p == source or p.startswith(f"{source}/")]:
                times[target + path.removeprefix(source)] = times.pop(path)


def unordered(scenario: Scenario, calls: Sequence[Call]) -> list[str]:
    """Return what an undisturbed run that made these calls flushed too late, or not at all."""
    ledger, found, published = _Ledger(), [], []
    for at, call in enumerate(calls):
        if not call.succeeded or str(scenario.place) not in call.text:
            continue
        opened = _FD.match(call.text)
        names = _QUOTED.findall(call.text)
        if call.name in _WRITES and opened:
            ledger.changed[opened[1]] = at
        elif call.name in _FLUSHES and opened:
            ledger.flushed[opened[1]] = at
        elif call.name == "mkdir" or (call.name == "openat" and "O_CREAT" in call.text):
            ledger.name_changed(names[0], at)
        elif call.name in _RENAMES:
            source, target = names[0], names[1]
            if LEFT_OVER not in target:
                found += list(_before_publishing(ledger, source, target))
                published.append(target)
            ledger.move(source, target)
            for path in (source, target):
                if call.name not in ("link", "linkat") or path == target:
                    ledger.name_changed(path, at)
    found += [f"{path} was not flushed at the end" for path in _left_at_end(ledger, scenario)]
    if not published or not _is_manifest_last(scenario, published):
        found.append(f"the manifest is not the last to be published: {published}")
    return found


def _before_publishing(ledger: _Ledger, source: str, target: str) -> Iterator[str]:
    announced = [path for path in ledger.unflushed(os.path.dirname(source)) if path.endswith(_ANNOUNCEMENT)]
    for path in ledger.unflushed(source) + announced:
        yield f"{path} was not flushed before {os.path.basename(target)} was published"
    if target.endswith(_MANIFEST):
        place = os.path.dirname(target)
        late = [path for path in ledger.unflushed(place) if LEFT_OVER not in path]
        yield from (f"{path} was not flushed before the manifest was published" for path in late)


def _left_at_end(ledger: _Ledger, scenario: Scenario) -> list[str]:
    return [path for path in ledger.unflushed(str(scenario.place)) if LEFT_OVER not in path]


def _is_manifest_last(scenario: Scenario, published: Sequence[str]) -> bool:
    """Tell whether the last name to appear was the manifest's, or that of the directory it lies in."""
    return published[-1].endswith(_MANIFEST) or published == [str(scenario.place / scenario.out)]
