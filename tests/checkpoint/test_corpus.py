"""Every malformed input, through the command line: its exit code, its one line, and nothing done.

Each may take 256 MB and two seconds of CPU time (`limited.py`). All run once, before the first test; the
tests look at what came of each.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from corpus import ACCEPTED, CORPUS, KINDS, REFUSED, fingerprint
from hostile import Hostile, tree
from limited import CPU_SECONDS, Ended, Limited
from malformed_outputs import output

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="limits need Linux's /proc"),
    # All rows run before the first test, which takes minutes where the machine has other work.
    pytest.mark.timeout(3600),
]

_ONE_LINE = re.compile(r"noisytune: error: [^\n]+\. [^\n]+\.\n")

#: What of an input is shown is cut: nobody reads a longer line.
_LONGEST_LINE = 2000


@dataclass(frozen=True)
class Outcome:
    """What became of a row: how the run ended, what lay there, whether it left anything; how others ended."""

    ended: Ended
    fingerprint: str
    changed: bool
    others: dict[str, Ended]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Run every row."""
    good = tree(output())(tmp_path_factory.mktemp("good"))
    root = tmp_path_factory.mktemp("rows") / "row"
    found = {}
    with Limited([["verify", str(good)], ["inspect", str(good), "--headers-only"]]) as limited:
        for row in CORPUS:
            root.mkdir()
            source = row.lay(root)
            before = fingerprint(root, source)
            ended = limited.run(row.argv(source, root / "out"), row.times)
            changed = fingerprint(root, source) != before
            others = {}
            for argv in other_commands(row, source, root):
                others[argv[0]] = limited.run(argv, argv.count(str(source)))
            found[row.name] = Outcome(ended, before + row.command, changed, others)
            shutil.rmtree(root)
    return found


def other_commands(row: Hostile, source: Path, root: Path) -> list[list[str]]:
    """What else takes checkpoints: they are read alike, but what is made of them is not."""
    if row.command != "inspect":
        return []
    argvs = [["average", str(source), str(source), "-o", str(root / "mean")]]
    if row in KINDS["PyTorch files"]:
        argvs.append(["perturb", str(source), "-o", str(root / "noisy"), "--to", "safetensors"])
    return argvs


def by_row(rows: tuple[Hostile, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[ascii(row.name)[1:-1][:80] for row in rows])


def test_there_are_more_than_600_and_no_two_are_alike(outcomes: dict[str, Outcome]) -> None:
    assert [name for name, count in Counter(row.name for row in CORPUS).items() if count > 1] == []
    assert len(REFUSED) > 600
    seen = Counter(outcome.fingerprint for outcome in outcomes.values())
    assert [name for name, outcome in outcomes.items() if seen[outcome.fingerprint] > 1] == []


def test_the_documents_give_the_corpus_s_numbers() -> None:
    security = " ".join((Path(__file__).parents[2] / "docs/security.md").read_text().split())
    *most, (last, rows) = KINDS.items()
    counted = ", ".join(f"{len(rows)} {kind}" for kind, rows in most)
    assert f"The corpus has {counted}, and {len(rows)} {last}; no two" in security
    refused = f"{len(REFUSED)} malformed inputs"
    assert f"{refused}, each with its exit code and words of its line; {len(ACCEPTED)} that only" in security


@by_row(REFUSED)
def test_refused_in_one_line(row: Hostile, outcomes: dict[str, Outcome]) -> None:
    ended = outcomes[row.name].ended
    assert ended.code == row.code, ended
    assert ended.cpu < row.times * CPU_SECONDS
    assert ended.stdout == ""
    *warnings, line = ended.stderr.splitlines(keepends=True)
    assert all(warning.startswith("noisytune: warning: ") for warning in warnings)
    assert [word for word in row.words if word not in line] == []
    assert _ONE_LINE.fullmatch(line)
    assert line[:-1].isprintable()
    assert len(line) < _LONGEST_LINE
    assert not outcomes[row.name].changed


@pytest.mark.parametrize("command", ["average", "perturb"])
def test_other_commands_refuse_the_same(command: str, outcomes: dict[str, Outcome]) -> None:
    wrong = {}
    for row in CORPUS:
        ended = outcomes[row.name].others.get(command)
        if ended is None:
            continue
        # What is well formed may still hold nothing to average or to perturb.
        codes = {row.code} if row.refused else {0, 3}
        *_, line = ["", *ended.stderr.splitlines(keepends=True)]
        told = _ONE_LINE.fullmatch(line) and line[:-1].isprintable() and len(line) < _LONGEST_LINE
        sources = 2 if command == "average" else 1
        if ended.code not in codes or not (ended.code == 0 or told) or ended.cpu >= sources * CPU_SECONDS:
            wrong[row.name] = ended
    assert wrong == {}


@by_row(ACCEPTED)
def test_what_only_looks_wrong_is_taken(row: Hostile, outcomes: dict[str, Outcome]) -> None:
    ended = outcomes[row.name].ended
    assert ended.code == 0, ended
    assert all(line.isprintable() for line in (ended.stdout + ended.stderr).splitlines())
    assert all(len(line) < _LONGEST_LINE for line in ended.stderr.splitlines())
    assert not outcomes[row.name].changed


def test_a_run_that_is_killed_fails_alone(tmp_path: Path) -> None:
    good = tree(output())(tmp_path)
    with Limited() as limited:
        assert limited.run(["verify", str(good)]).code == 0
        limited._process.kill()
        assert limited.run(["verify", str(good)]).code == -signal.SIGKILL
        assert limited.run(["verify", str(good)]).code == 0


#: A few whole processes, from Python's start on.
SAMPLE = ("safetensors: N is 2^63", "shards: a FIFO", "quantised: GPTQ")


@pytest.mark.parametrize("command", ["inspect", "perturb"])
def test_whole_processes_end_alike(command: str, tmp_path: Path) -> None:
    rows = [row for row in REFUSED if row.name in SAMPLE and command in ("perturb", row.command)]
    assert len(rows) == len(SAMPLE) - (command == "inspect")
    running = []
    for number, row in enumerate(rows):
        root = tmp_path / str(number)
        root.mkdir()
        argv = [command, str(row.lay(root)), *(["-o", str(root / "out")] if command == "perturb" else [])]
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "noisytune_cli", *argv],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for row, process in zip(rows, running, strict=True):
        stdout, stderr = process.communicate()
        assert (process.returncode, stdout) == (row.code, "")
        assert _ONE_LINE.fullmatch(stderr)
        assert [word for word in row.words if word not in stderr] == []
