"""Runs in several processes at once, or in this one.

Each process loads the model and the rows once, is handed one run at a time over a pipe, and sends back how
many steps it has done and then the run's record. The parent alone writes the journal. A worker that dies is
noticed, for its pipe ends; one whose parent dies notices too, and ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

from noisytune_cli.checkpoint.formats._system import free_memory
from noisytune_cli.errors import NoisytuneError, ResourceExhausted
from noisytune_cli.study.design import Run
from noisytune_cli.study.settings import Material, Recipe
from noisytune_cli.study.training.training import Bench

#: Seconds between two messages of how far a run is.
_EVERY = 0.5

#: Bytes that a process takes beside its tensors: Python, torch, the rows.
_PROCESS_BYTES = 700 << 20

#: Tensors as large as the model that a run holds on the host: the loaded one, its copy, gradients, Adam's
#: two moments, and the weights that it started from.
_COPIES = 6

#: Those of each further member: weights and Adam's moments; gradients are one member's at a time.
_MEMBER_COPIES = 3


@dataclass(frozen=True)
class Place:
    """Where runs are carried out: the device, the processes, and the threads of each."""

    device: str
    jobs: int
    threads: int


def carry_out(
    material: Material, recipe: Recipe, runs: Sequence[Run], place: Place, report: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Yield the record of each run as it is finished; `report` is called with the steps just done.

    Raises what a run raises; ResourceExhausted where a device is out of memory or a process died.
    """
    if place.jobs == 1 or len(runs) == 1:
        bench = Bench(material, recipe, place.device, place.threads)
        with _enough_memory(place.device):
            bench.check(runs)
        for run in runs:
            with _enough_memory(place.device):
                record = bench.carry_out(run, lambda: report(1))
            yield record
        return
    yield from _in_processes(material, recipe, runs, place, report)


def check_memory(parameters: int, jobs: int, members: int = 1) -> None:
    """Refuse more processes than fit into what memory is free; ResourceExhausted, with what would fit.

    `members` is how many models a run trains at once.
    """
    if jobs <= 1:
        return
    needed = (_COPIES + _MEMBER_COPIES * (members - 1)) * 4 * parameters + _PROCESS_BYTES
    free = free_memory()
    if free is not None and jobs * needed > free:
        raise ResourceExhausted(
            f"--jobs {jobs}",
            why=f"each takes about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
            next_step=f"Use --jobs {max(1, free // needed)}",
        )


def _in_processes(
    material: Material, recipe: Recipe, runs: Sequence[Run], place: Place, report: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(runs))
    processes: dict[Connection, BaseProcess] = {}
    try:
        for number in range(min(place.jobs, len(runs))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                # One of them looks at all before its first.
                target=_work,
                args=(theirs, material, recipe, place, () if number else runs),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes[ours] = process
            ours.send(waiting.pop())
        while processes:
            for pipe in cast(list[Connection], wait(list(processes))):
                kind, content = _receive(pipe)
                if kind == "steps":
                    report(content)
                elif kind == "error":
                    raise content
                elif kind == "bug":
                    raise RuntimeError(content)
                else:
                    if waiting:
                        pipe.send(waiting.pop())
                    else:
                        pipe.close()
                        processes.pop(pipe).join()
                    yield content
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _receive(pipe: Connection) -> tuple[str, Any]:
    """Return a worker's next message; ResourceExhausted where the worker is gone."""
    try:
        message: tuple[str, Any] = pipe.recv()
        return message
    except (EOFError, OSError):
        raise ResourceExhausted(
            "a process of the study died",
            why="most likely the system was out of memory; finished runs are kept",
            next_step="Run again with fewer --jobs: the study continues where it stopped",
        ) from None


def _work(pipe: Connection, material: Material, recipe: Recipe, place: Place, checked: Sequence[Run]) -> None:
    """See that runs can be, then carry out those that come over the pipe, until it ends."""
    # Whoever stops the study stops the parent, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone, or has no more runs
        try:
            bench = Bench(material, recipe, place.device, place.threads)
            with _enough_memory(place.device):
                bench.check(checked)
            while True:
                run = pipe.recv()
                steps = _Steps(pipe)
                with _enough_memory(place.device):
                    record = bench.carry_out(run, steps)
                steps.send()
                pipe.send(("done", record))
        except NoisytuneError as error:
            pipe.send(("error", error))
        except (EOFError, OSError):
            raise
        except Exception:  # the parent ends with it, as it would without processes
            pipe.send(("bug", traceback.format_exc()))


class _Steps:
    """Counts a run's steps, and sends now and then how many there were since the last time."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._count, self._sent = pipe, 0, time.monotonic()

    def __call__(self) -> None:
        self._count += 1
        if time.monotonic() - self._sent >= _EVERY:
            self.send()

    def send(self) -> None:
        """Send what was counted since the last time."""
        self._pipe.send(("steps", self._count))
        self._count, self._sent = 0, time.monotonic()


@contextlib.contextmanager
def _enough_memory(device: str) -> Iterator[None]:
    """Turn running out of memory, on the host or a device, into the error the user sees."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise ResourceExhausted(
            f"cannot train on {device}",
            why="it is out of memory; finished runs are kept",
            next_step="Use a smaller --batch-size or --max-length, or fewer --jobs",
        ) from error
