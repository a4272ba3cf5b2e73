"""The full run: every fault on every call of every scenario; kills, signals, short transfers by the hundred.

    python tests/faults/run.py --budget 900

Each worker has a sandbox and a warm server of its own. What must be in any run of some minutes comes first
(all kills and signals, a sample of the faults, power cuts), in an order that `--seed` decides; then the rest.
`--kinds` tries some alone. Every outcome goes to the journal at once, so a run that was stopped is resumed by
naming the same one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import faults
import kills
import mounts
import power
import stages
import strace
from invariants import Fault
from scenarios import Expected, Scenario, further_scenarios, learn, scenarios
from warm import Warm

# For the scenarios' inputs, as pytest has it.
sys.path.append(str(Path(__file__).resolve().parents[1] / "inputs"))

_KILLS, _STOPS, _SHORT, _LOST, _CUTS, _FIRST_FAULTS = 2600, 800, 800, 1500, 500, 6000

#: Of every other run that is not traced: what strace counts is told in one thread alone.
_THREADS = 4

KINDS = ("fault", "kill", "signal", "short transfer", "lost stage", "power cut")


@dataclass(frozen=True)
class Task:
    """One thing to try; `key` names it in the journal."""

    scenario: int
    kind: str
    always: tuple[str, ...] = ()
    fault: Fault | None = None
    number: int = 0
    call: tuple[str, int] | None = None
    way: str = ""

    @property
    def key(self) -> str:
        what = self.fault or self.call or self.number
        return f"{self.scenario} {self.kind} {len(self.always)} {what}{self.way}"


class Worker:
    """Carries out its share of the tasks until the time is over."""

    def __init__(
        self, sandbox: Path, seed: int, share: tuple[int, int], kinds: Collection[str], some: int
    ) -> None:
        """Prepare share `share[0]` of `share[1]` of these kinds, in so many scenarios."""
        self._sandbox, self._seed, self._share, self._kinds = sandbox, seed, share, kinds
        every = (*scenarios(sandbox), *further_scenarios(sandbox))
        self._scenarios = tuple(random.Random(seed).sample(every, min(some, len(every))))
        #: A disk whose power can be cut, where this machine has one.
        self._device: mounts.Device | None = None

    def work(self, until: float, journal: Path, done: set[str]) -> None:
        """Write the outcome of each task that is not `done` to the journal."""
        for scenario in self._scenarios:
            scenario.reset()
        with (
            Warm(self._sandbox, [scenario.argv for scenario in self._scenarios]) as warm,
            journal.open("a", buffering=1) as file,
            ExitStack() as stack,
        ):
            if "power cut" in self._kinds:
                (self._sandbox / "device").mkdir()
                try:
                    self._device = stack.enter_context(mounts.device(self._sandbox / "device"))
                except mounts.Unavailable as why:
                    print(f"no power is cut: {why}", file=sys.stderr)
            expected = [learn(scenario, warm) for scenario in self._scenarios]
            for task in self._tasks(warm):
                if time.monotonic() > until:
                    return
                if task.key not in done:
                    scenario = self._scenarios[task.scenario]
                    outcome = self._try(task, scenario, expected[task.scenario], warm)
                    file.write(json.dumps({"key": task.key, "kind": task.kind, **outcome}) + "\n")

    def _tasks(self, warm: Warm) -> Iterator[Task]:
        choose = random.Random(self._seed)
        injected = [
            Task(index, "fault", always, fault)
            for index, scenario in enumerate(self._scenarios)
            for always in ((), faults.WITHOUT_RENAMEAT2)
            if "fault" in self._kinds
            for name, number in faults.targets(scenario, faults.count(scenario, warm, self._log, always))
            for fault in faults.faults_of(name, number)
        ]
        choose.shuffle(injected)
        lost = [
            Task(index, "lost stage", call=call, way=way)
            for index, scenario in enumerate(self._scenarios)
            if "lost stage" in self._kinds
            for call in faults.targets(scenario, faults.count(scenario, warm, self._log))
            for way in stages.WAYS
            if call[0] in stages.CALLS
        ]
        choose.shuffle(lost)
        cuts = self._cuts(warm)
        choose.shuffle(cuts)
        count = len(self._scenarios)
        stopped = [
            Task(n % count, kind, number=n)
            for kind, times in (("kill", _KILLS), ("signal", _STOPS), ("short transfer", _SHORT))
            if kind in self._kinds
            for n in range(times)
        ]
        first = injected[:_FIRST_FAULTS] + stopped + lost[:_LOST] + cuts[:_CUTS]
        choose.shuffle(first)
        mine, workers = self._share
        yield from (first + injected[_FIRST_FAULTS:] + lost[_LOST:] + cuts[_CUTS:])[mine::workers]

    def _cuts(self, warm: Warm) -> list[Task]:
        """Return the power cuts: after each flush and rename, and others at random moments."""
        if self._device is None:
            return []
        found = []
        for index, scenario in enumerate(self._scenarios):
            disk = power.on(self._disk, scenario)
            disk.reset()
            _, calls = strace.trace(warm, disk.argv, self._log, calls=power.CALLS)
            found += [Task(index, "power cut", call=moment) for moment in power.moments(disk, calls)]
        count = len(self._scenarios)
        return found + [Task(n % count, "power cut", number=n) for n in range(_CUTS)]

    @property
    def _disk(self) -> Path:
        return self._sandbox / "device" / "disk"

    @property
    def _log(self) -> Path:
        return self._sandbox / "strace.log"

    def _try(self, task: Task, scenario: Scenario, expected: Expected, warm: Warm) -> dict[str, object]:
        seconds = expected.seconds
        choose = random.Random(f"{self._seed} {task.key}")
        what = scenario.name
        if task.fault is not None:
            result = faults.try_fault(scenario, expected, warm, self._log, task.fault, task.always)
            what += " without renameat2" * bool(task.always)
            outcome = asdict(result) | {"what": f"{what}: {task.fault}", "hit": result.injected > 0}
            return {name: outcome[name] for name in ("what", "hit", "code", "breaches")}
        if task.kind == "power cut":
            assert self._device is not None
            disk = power.on(self._disk, scenario)
            if task.call is not None:
                found = power.cut_at(disk, expected, warm, self._log, self._device, task.call)
                return {"what": f"{what}: power cut at {task.call}", "hit": True, "breaches": found}
            delay = choose.uniform(0, 2 * seconds)
            hit, found = power.cut_after(disk, expected, warm, self._device, delay)
            return {"what": f"{what}: power cut after {delay * 1e3:.1f} ms", "hit": hit, "breaches": found}
        if task.call is not None:
            hit, found = stages.lose(scenario, expected, warm, self._log, task.call, task.way)
            return {"what": f"{what}: stage {task.way} at {task.call}", "hit": hit, "breaches": found}
        if choose.random() < 0.5:
            scenario = replace(scenario, threads=_THREADS)
            what += f" in {_THREADS} threads"
        if task.kind == "kill":
            delay = choose.uniform(0, seconds)
            hit, found = kills.kill(scenario, expected, warm, delay)
            what = f"{what}: killed after {delay * 1e3:.1f} ms"
        elif task.kind == "short transfer":
            hit, found = kills.shorten(scenario, expected, warm, task.number)
            what = f"{what}: short transfers of seed {task.number}"
        else:
            stop = kills.random_stop(choose, seconds)
            hit, found = kills.ask(scenario, expected, warm, stop)
            what = f"{what}: {stop}"
        return {"what": what, "hit": hit, "breaches": found}


def _run_worker(
    place: Path,
    seed: int,
    share: tuple[int, int],
    kinds: Collection[str],
    some: int,
    until: float,
    journal: Path,
    done: set[str],
) -> None:
    with tempfile.TemporaryDirectory(dir=place, prefix="faults-") as sandbox:
        Worker(Path(sandbox), seed, share, kinds, some).work(until, journal, done)


def main() -> int:
    """Run until the budget is spent or nothing is left; return 1 if anything did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="outcomes; an existing one is resumed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="KIND,…", help="of %(default)s")
    parser.add_argument(
        "--some", type=int, default=100, metavar="N", help="of the scenarios; the seed chooses"
    )
    options = parser.parse_args()
    kinds = frozenset(options.kinds.split(","))
    if kinds - {*KINDS}:
        parser.error(f"--kinds: {', '.join(KINDS)}")
    if why := strace.available():
        print(f"cannot run: {why}", file=sys.stderr)
        return 2
    journal = options.journal or Path(tempfile.mkdtemp()) / "journal.jsonl"
    done = {record["key"] for record in _records(journal)}
    started = time.monotonic()
    until = started + options.budget
    workers = [
        multiprocessing.Process(
            target=_run_worker,
            args=(
                *(options.place, options.seed, (n, options.workers), kinds, options.some),
                *(until, journal, done),
            ),
        )
        for n in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    broken = sum(worker.exitcode != 0 for worker in workers)
    return _report(journal, time.monotonic() - started, broken)


def _records(journal: Path) -> list[dict[str, object]]:
    if not journal.exists():
        return []
    return [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]


def _report(journal: Path, seconds: float, broken: int) -> int:
    records = _records(journal)
    tried = Counter(str(record["kind"]) for record in records)
    hit = Counter(str(record["kind"]) for record in records if record["hit"])
    failed = [record for record in records if record["breaches"]]
    for record in failed:
        print(f"{record['what']} (exit {record.get('code', '?')}): {record['breaches']}")
    print(f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {seconds:.0f} s")
    print(f"journal: {journal}")
    for kind in KINDS:
        print(f"{kind:>14}s: {tried[kind]:6} tried, {hit[kind]:6} hit a running process")
    print(f"{len(failed)} of {len(records)} broke a promise" + f"; {broken} workers failed" * bool(broken))
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
