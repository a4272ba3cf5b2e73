"""The engine of a Ray cluster, or of one that is started on this machine for as long as it takes.

How far a share is, its task tells an actor on this node, which is asked now and then.

Ray is kept from what is not its own: standard output, which its processes write to, is led to standard error
while it is connected; the handlers of signals that it replaces are put back; it sends no statistics.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from noisytune_cli.commands.engines import Answer, Call, Report, Run, Task
from noisytune_cli.errors import HubError, PackageMissing
from noisytune_cli.version import __version__

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds between two looks at how far the shares are, and between two words of a task on that.
_LOOK = 0.5

#: CPUs that a share takes unless told: a cluster has as many shares at work as CPUs.
_CPUS = 1


@contextmanager
def started(address: str | None, threads: int | None) -> Iterator[Run]:
    """Join the cluster at HOST:PORT, or start one here; PackageMissing without Ray, HubError without it."""
    # Whoever wants them sets the variable.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise PackageMissing(
            "--engine=ray needs ray",
            why="it is not installed",
            next_step="Install it: pip install '.[ray]' in a clone of noisytune",
        ) from error
    handlers = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    with _stdout_apart():
        try:
            # Without an address "auto" would join what a file from an earlier cluster names, dead or not.
            settings: dict[str, Any] = {} if address else {"include_dashboard": False}
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **settings)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise HubError(
                "cannot join Ray" if address else "cannot start Ray",
                path=address,
                why=str(error).partition("\n")[0] or type(error).__name__,
                next_step="Check the address (HOST:PORT of the head), and that this machine is a node of it"
                if address
                else "See its logs, or use --engine=local",
            ) from error
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        try:
            yield lambda call, tasks, report: _run(ray, call, tasks, report, threads or _CPUS)
        finally:
            ray.shutdown()


def _run(
    ray: Any, call: Call, tasks: Sequence[Task], report: Report, cpus: int
) -> Iterator[tuple[int, Answer]]:
    # A task that is lost is tried again by who asked for it, as is one that failed.
    remote = ray.remote(max_retries=0, num_cpus=cpus, scheduling_strategy="SPREAD")(_do)
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    waiting = {
        remote.remote(call, {"threads": cpus, **task}, number, board): number
        for number, task in enumerate(tasks)
    }
    shown = [0] * len(tasks)

    def show(number: int, nbytes: int) -> None:
        report(nbytes - shown[number])
        shown[number] = nbytes

    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK)
        if not ready:
            for number, nbytes in _look(ray, board).items():
                if number in waiting.values() and nbytes > shown[number]:
                    show(number, min(nbytes, tasks[number]["nbytes"]))
            continue
        done = ready[0]
        number = waiting.pop(done)
        try:
            answer = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if "No module named 'noisytune_cli" not in str(error):
                raise  # a bug, of which the traceback tells
            raise PackageMissing(
                "a node of the cluster lacks noisytune",
                why="it cannot import noisytune_cli",
                next_step=f"Install noisytune {__version__} on every node",
            ) from error
        except ray.exceptions.RayError as error:
            answer = {"died": str(error).partition("\n")[0] or type(error).__name__}
        show(number, 0 if answer.get("error") or "died" in answer else tasks[number]["nbytes"])
        yield number, answer


def _look(ray: Any, board: Any) -> dict[int, int]:
    """Return how far tasks are; nothing where that cannot be told now."""
    try:
        found: dict[int, int] = ray.get(board.read.remote(), timeout=_LOOK)
    except ray.exceptions.RayError:
        return {}
    return found


class _Board:
    """How many bytes of each task are done."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def write(self, number: int, nbytes: int) -> None:
        self._done[number] = nbytes

    def read(self) -> dict[int, int]:
        return self._done


def _do(call: Call, task: Task, number: int, board: Any) -> Answer:
    """Do a task where Ray has put it, and say now and then how far it is."""
    lock = threading.Lock()
    done, told = 0, 0.0

    def report(nbytes: int) -> None:
        nonlocal done, told
        with lock:
            done += nbytes
            if time.monotonic() >= told + _LOOK:
                told = time.monotonic()
                board.write.remote(number, done)

    answer = call(task, report)
    return answer() if callable(answer) else answer


@contextmanager
def _stdout_apart() -> Iterator[None]:
    """Lead what is written to descriptor 1 to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
