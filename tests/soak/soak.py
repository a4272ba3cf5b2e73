"""All long runs by turns, for a given time: `make soak`, or

    python tests/soak/soak.py --seconds 3600 --journal docs/long-runs.jsonl [--only fuzz,kills]

Each turn is one part: some minutes of faults, of kills, of power cuts, of fuzzing, of random commands, of the
kernels under sanitizers. It ends with a line in the journal for each kind of thing that it tried: the date,
the commit, the seed, how many, how many broke a promise, in how many seconds. So a run may be stopped at any
time. `docs/long_runs.py` adds up a journal. What a turn finds is shown at once, and kept: inputs lie in
`fuzz-failures/`, the seed makes everything else again.

A new kind is a function here that yields outcomes, and its line in PARTS.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """What came of the part of a turn: what was tried, how often, and what was said of those that broke."""

    kind: str
    count: int
    broken: int
    seconds: float
    said: str = ""
    #: Of those tried, how many found what they were to disturb.
    hit: int | None = None


class Unavailable(Exception):
    """Why this machine cannot do a part."""


@dataclass(frozen=True)
class Turn:
    """How long a turn may take, with which seed, and where what it needs from one to the next may lie."""

    seconds: float
    seed: int
    keep: Path


#: What one reader gets of a turn, at the least, where a process has to be started for it.
_GUIDED_SECONDS = 60

#: How many ways of writing are disturbed in one turn: each is looked at undisturbed first.
_SCENARIOS = 5

#: What takes a turn, and yields its outcomes.
Part = Callable[[Turn], Iterator[Outcome]]


def _place(turn: Turn) -> str:
    """Return where runs are disturbed: on a disk every fourth turn, else in memory, where no flush waits."""
    memory = "/dev/shm"
    return memory if turn.seed % 4 and os.access(memory, os.W_OK) else tempfile.gettempdir()


def _faults(*kinds: str) -> Part:
    def part(turn: Turn) -> Iterator[Outcome]:
        import strace

        if why := strace.available():
            raise Unavailable(why)
        journal = turn.keep / f"faults-{turn.seed}-{kinds[0].replace(' ', '-')}.jsonl"
        command = [sys.executable, str(_ROOT / "tests/faults/run.py"), "--budget", str(turn.seconds)]
        command += ["--workers", "1", "--seed", str(turn.seed), "--kinds", ",".join(kinds)]
        command += ["--place", _place(turn), "--some", str(_SCENARIOS)]
        started = time.monotonic()
        done = _run([*command, "--journal", str(journal)])
        seconds = _since(started)
        text = journal.read_text() if journal.exists() else ""
        tried = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        if done.returncode and not any(one["breaches"] for one in tried):
            yield Outcome("lost turn", 1, 0, seconds, done.stdout + done.stderr)
        if "power cut" in kinds and not tried and "no power is cut" in done.stderr:
            raise Unavailable(done.stderr.strip())
        for kind in kinds:
            of_kind = [one for one in tried if one["kind"] == kind]
            broken = [f"{one['what']}: {one['breaches']}" for one in of_kind if one["breaches"]]
            hit = sum(bool(one["hit"]) for one in of_kind)
            share = seconds * len(of_kind) / max(1, len(tried))
            yield Outcome(kind, len(of_kind), len(broken), share, "\n".join(broken), hit)
        if not done.returncode:
            journal.unlink(missing_ok=True)

    return part


def _fuzz(turn: Turn) -> Iterator[Outcome]:
    """Fuzz every reader by the structure of what it reads."""
    from fuzz.targets import TARGETS, WHOLE

    started = time.monotonic()
    nodes = [f"tests/fuzz/test_fuzz.py::test_any_bytes_are_refused_or_read[{target}]" for target in WHOLE]
    environment = {"FUZZ_SECONDS": str(turn.seconds * len(TARGETS) / len(WHOLE))}
    done = _run([sys.executable, "-m", "pytest", "-q", "-s", "--tb=short", *nodes], environment)
    seconds = _since(started) / len(WHOLE)
    tried = dict(re.findall(r"^\W*([\w-]+): ([\d,]+) inputs", done.stdout, re.MULTILINE))
    for target in WHOLE:
        broken = f"read[{target}]" in done.stdout or target not in tried
        said = done.stdout[-4000:] if broken else ""
        yield Outcome(f"fuzz {target}", int(tried.get(target, "0").replace(",", "")), broken, seconds, said)


def _guided(turn: Turn) -> Iterator[Outcome]:
    """Fuzz some readers as coverage guides: a process for each, which takes long to start."""
    from fuzz import guided
    from fuzz.targets import TARGETS

    if why := guided.available():
        raise Unavailable(why)
    wanted = max(1, int(turn.seconds // _GUIDED_SECONDS))
    for target in random.Random(turn.seed).sample([*TARGETS], min(wanted, len(TARGETS))):
        started = time.monotonic()
        corpus = turn.keep / "corpus" / target
        count, said = guided.fuzz(target, turn.seconds / wanted, turn.seed, corpus)
        yield Outcome(f"fuzz {target}", count, bool(said), _since(started), said)


def _bulk(turn: Turn) -> Iterator[Outcome]:
    """Fuzz the quick readers with as many inputs as can be."""
    from fuzz.targets import QUICK

    return _by_number([*QUICK], turn)


def _files(turn: Turn) -> Iterator[Outcome]:
    """Fuzz the readers of files with as many inputs as can be."""
    from fuzz.targets import WHOLE

    return _by_number([*WHOLE], turn)


def _by_number(targets: Sequence[str], turn: Turn) -> Iterator[Outcome]:
    from fuzz import bulk

    for target in targets:
        started = time.monotonic()
        corpus = turn.keep / "corpus" / target
        count, broken = bulk.fuzz(target, turn.seconds / len(targets), turn.seed, corpus)
        said = "\n".join(broken)
        yield Outcome(f"fuzz {target}", count, len(broken), _since(started), said)


def _commands(turn: Turn) -> Iterator[Outcome]:
    """Hold random commands against the reference."""
    import commands
    from fuzz import guided

    started, broken, count = time.monotonic(), [], 0
    line = commands.Commands()
    with guided.scratch() as scratch:
        for number in itertools.count():
            if _since(started) > turn.seconds:
                break
            root = scratch / "case"
            commands.empty(root)
            seed = turn.seed * 1_000_000 + number
            broken += [f"seed {seed}: {breach}" for breach in commands.try_case(seed, root, line)[:1]]
            count += 1
    yield Outcome("random command", count, len(broken), _since(started), "\n".join(broken))


def _stores(turn: Turn) -> Iterator[Outcome]:
    """Send outputs to an object store that fails at random."""
    if missing := [name for name in ("obstore", "moto") if importlib.util.find_spec(name) is None]:
        raise Unavailable(f"{' and '.join(missing)} are not installed")
    import commands
    import stores
    from fuzz import guided

    started, broken, hits, count = time.monotonic(), [], 0, 0
    with guided.scratch() as scratch, stores.stores(scratch, commands.Commands()) as tried:
        while _since(started) < turn.seconds:
            seed = turn.seed * 1_000_000 + count
            hit, found = tried.try_case(seed)
            broken += [f"seed {seed}: {breach}" for breach in found[:1]]
            hits, count = hits + hit, count + 1
    yield Outcome("store fault", count, len(broken), _since(started), "\n".join(broken), hits)


def _sanitizers(turn: Turn) -> Iterator[Outcome]:
    """Run the kernels' tests with every access to memory and every operation watched."""
    if shutil.which("gcc") is None:
        raise Unavailable("there is no gcc")
    started = time.monotonic()
    done = _run(["make", "sanitize", f"BIN={Path(sys.executable).parent}"])
    tried = sum(map(int, re.findall(r"(\d+) (?:passed|failed|error)", done.stdout)))
    said = "" if done.returncode == 0 else done.stdout[-4000:] + done.stderr[-4000:]
    if tried:
        yield Outcome("kernel test under sanitizers", tried, bool(said), _since(started), said)
    else:
        yield Outcome("lost turn", 1, 0, _since(started), said)


def _since(started: float) -> float:
    return time.monotonic() - started


#: What takes turns: its name, its share of the time, and whether one turn is enough.
PARTS: dict[str, tuple[Part, float, bool]] = {
    "bulk": (_bulk, 3, False),
    "files": (_files, 3, False),
    "guided": (_guided, 3, False),
    "fuzz": (_fuzz, 2, False),
    "commands": (_commands, 2, False),
    "kills": (_faults("kill", "signal", "short transfer"), 2, False),
    "faults": (_faults("fault", "lost stage"), 2, False),
    "power": (_faults("power cut"), 1, False),
    "stores": (_stores, 1, False),
    "sanitizers": (_sanitizers, 1, True),
}


def _run(
    command: Sequence[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    # What is tried is what lies here, whatever is installed.
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command,
        cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": path} | (environment or {}),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _commit() -> str:
    """Return the commit that is tried, marked where what is tried differs from it."""
    said = _run(["git", "rev-parse", "--short=7", "HEAD"]).stdout.strip()
    differs = _run(["git", "diff", "--quiet", "HEAD", "--", "noisytune_cli", "tests"]).returncode
    return f"{said or '?'}{'+' * bool(differs)}"


def soak(
    seconds: float, journal: Path, seed: int, names: Sequence[str], keep: Path, turn: float = 60.0
) -> int:
    """Take turns until the time is over, `turn` seconds for each share; return how many things broke."""
    until, broken, commit = time.monotonic() + seconds, 0, _commit()
    share = min(turn, seconds / sum(PARTS[name][1] for name in names))
    waiting, round_ = list(names), 0
    while waiting:
        for name in tuple(waiting):
            part, weight, once = PARTS[name]
            length = min(weight * share, until - time.monotonic())
            if length <= 0:
                return broken
            if once or round_ == 0:
                print(f"{name}…", flush=True)
            if once:
                waiting.remove(name)
            try:
                for outcome in part(Turn(length, seed + round_, keep)):
                    broken += outcome.broken
                    _write(journal, outcome, commit, seed + round_, name)
            except Unavailable as why:
                print(f"{name} is left out: {why}", flush=True)
                if name in waiting:
                    waiting.remove(name)
        round_ += 1
    return broken


def _write(journal: Path, outcome: Outcome, commit: str, seed: int, part: str) -> None:
    """Add a line to the journal, in one write: two runs may have the same one."""
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "seed": seed,
        "part": part,
        "kind": outcome.kind,
        "count": outcome.count,
        "broken": int(outcome.broken),
        "seconds": round(outcome.seconds, 1),
    }
    if outcome.hit is not None:
        record["hit"] = outcome.hit
    with journal.open("a") as file:
        file.write(json.dumps(record) + "\n")
    if outcome.said:
        print(f"{outcome.kind}, seed {seed}: {outcome.broken} broke:\n{outcome.said}", flush=True)


def main() -> int:
    """Run; return 1 if anything broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--journal", type=Path, default=_ROOT / "docs" / "long-runs.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="the first turn's; 0: any")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,…", help="of %(default)s")
    parser.add_argument("--turn", type=float, default=60, metavar="SECONDS", help="of the shortest turn")
    parser.add_argument("--keep", type=Path, default=_ROOT / "build" / "soak", help="corpora of fuzzers")
    options = parser.parse_args()
    sys.path[:0] = [str(_ROOT), *(str(_ROOT / "tests" / name) for name in ("", "inputs", "faults"))]
    names = options.only.split(",")
    if unknown := {*names} - {*PARTS}:
        parser.error(f"--only {','.join(unknown)}: {', '.join(PARTS)}")
    options.keep.mkdir(parents=True, exist_ok=True)
    seed = options.seed or random.SystemRandom().randrange(1, 1_000_000)
    broken = soak(
        options.seconds, options.journal.absolute(), seed, names, options.keep.absolute(), options.turn
    )
    print(f"{broken} broke; the journal is {options.journal}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
