"""Every engine against the contract of `commands/engines`: what is run, answered, tried again and left."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from namespaces import in_namespace

from noisytune_cli.commands.engines import Answer, Call, Later, Report, Task, complete, load, names
from noisytune_cli.errors import (
    HubError,
    InputInvalid,
    Mismatch,
    NoisytuneError,
    ResourceExhausted,
    UsageError,
    to_plain,
)

#: The error of each kind that a share may answer with, and whether it is tried again.
PASSING = {ResourceExhausted: True, HubError: True, InputInvalid: False, Mismatch: False, UsageError: False}


def error_of(kind: type[NoisytuneError]) -> Answer:
    return {"error": to_plain(kind("what", why="why", next_step="next", path="/p", tensor="t"))}


class Scripted:
    """An engine whose tasks answer in turn what they are told to."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.tried: list[Task] = []

    def __call__(self, call: Call, tasks: Sequence[Task], report: Report) -> Iterator[tuple[int, Answer]]:
        for number, task in enumerate(tasks):
            self.tried.append(task)
            yield number, self.answers.pop(0)


def nothing(task: Task, report: Report) -> Answer:
    raise AssertionError


@pytest.mark.parametrize("kind", PASSING)
def test_what_may_pass_is_tried_three_times(kind: type[NoisytuneError]) -> None:
    done = {"error": None}
    run = Scripted(done, error_of(kind), error_of(kind), done)
    tasks: list[Task] = [{"share": 0}, {"share": 1}]
    if PASSING[kind]:
        assert complete(run, nothing, tasks, lambda n: None) == [done, done]
        assert [task["share"] for task in run.tried] == [0, 1, 1, 1]
        run = Scripted(*[error_of(kind)] * 3)
    with pytest.raises(kind, match=r'what: /p: tensor "t": why\. next\.'):
        complete(run, nothing, tasks[:1] if PASSING[kind] else tasks, lambda n: None)
    assert len(run.tried) == (3 if PASSING[kind] else 2)


def test_a_process_that_dies_is_tried_again() -> None:
    run = Scripted({"died": "killed"}, {"error": None})
    assert complete(run, nothing, [{"share": 0}], lambda n: None) == [{"error": None}]
    with pytest.raises(ResourceExhausted, match="ended without a word: killed"):
        complete(Scripted(*[{"died": "killed"}] * 3), nothing, [{}], lambda n: None)


def test_the_local_engine_knows_no_address() -> None:
    with pytest.raises(UsageError, match="--engine=ray"):
        load("local", "127.0.0.1:1")


def test_what_waits_does_so_beside_the_next_task() -> None:
    begun: list[threading.Event] = [threading.Event() for _ in range(3)]

    def call(task: Task, report: Report) -> Answer | Later:
        number = task["share"]
        begun[number].set()

        def rest() -> Answer:
            # All but the last wait for the next task to be begun.
            assert number == 2 or begun[number + 1].wait(60)
            return {"error": None, "number": number}

        return rest

    with load("local")(None, None) as run:
        answers = complete(run, call, [{"share": number} for number in range(3)], lambda n: None)
    assert [answer["number"] for answer in answers] == [0, 1, 2]


def test_what_is_begun_ends_before_the_error_of_another_is_told() -> None:
    ended = []

    def call(task: Task, report: Report) -> Answer | Later:
        if task["share"] == 1:
            return error_of(Mismatch)

        def rest() -> Answer:
            time.sleep(0.05)
            ended.append(task["share"])
            return {"error": None}

        return rest

    with load("local")(None, None) as run, pytest.raises(Mismatch):
        complete(run, call, [{"share": number} for number in range(3)], lambda n: None)
    assert ended == [0, 2]


def test_an_engine_that_is_none() -> None:
    assert names() == ("local", "ray")
    with pytest.raises(UsageError, match="Use one of: local, ray"):
        load("slurm")


#: Run in a process of its own, where an engine cannot disturb the tests: it prints what it saw as JSON.
_PROGRAM = """
import json, os, signal
from engine_tasks import square
from noisytune_cli.commands.engines import complete, load
def stop(number, frame): pass
signal.signal(signal.SIGTERM, stop)
done = []
with load({engine!r})(None, None) as run:
    answers = complete(run, square, [{{"of": n, "nbytes": n}} for n in range(5)], done.append)
    if {engine!r} == "ray":
        os.write(1, b"of Ray's own processes, as it were\\n")
kept = signal.getsignal(signal.SIGTERM) is stop
print(json.dumps({{"answers": answers, "done": sorted(done), "kept": kept}}))
"""


#: A task that does not end before half of it was reported.
_HALVES = """
import json, pathlib, sys
from engine_tasks import halves
from noisytune_cli.commands.engines import complete, load
seen = pathlib.Path(sys.argv[1])
done = []
def report(nbytes):
    done.append(nbytes)
    seen.touch()
with load({engine!r})(None, None) as run:
    complete(run, halves, [{{"seen": str(seen), "nbytes": 10}}], report)
print(json.dumps(done))
"""


@pytest.mark.parametrize("engine", names())
def test_how_far_a_share_is(engine: str, tmp_path: Path) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    done = in_namespace([sys.executable, "-c", _HALVES.format(engine=engine), str(tmp_path / "seen")])
    assert json.loads(done) == [5, 5]


@pytest.mark.parametrize("engine", names())
def test_an_engine(engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    found = in_namespace([sys.executable, "-c", _PROGRAM.format(engine=engine)])
    # Whatever the engine's processes say goes to stderr: stdout is the document alone.
    assert json.loads(found) == {
        "answers": [{"error": None, "square": n * n} for n in range(5)],
        "done": [0, 1, 2, 3, 4],
        "kept": True,
    }
