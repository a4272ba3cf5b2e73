"""Runs of noisytune under limits on memory and CPU time, in a process apart.

`Limited` starts a server, which imports what a run needs and then runs the command line for each request. A
run may take 256 MB of address space beyond what the server has by then: beyond that an allocation fails (exit
code 6). It may take two seconds of CPU time, which is measured, and the kernel kills what never ends. Not
counted is what every run costs, Python and its imports. Kernels count, not clocks: a busy machine changes
nothing. A run that is killed takes its server along: what it ended by is its exit code, and the next run has
a new server.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

MEMORY_BYTES = 256 << 20
CPU_SECONDS = 2


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (-n: signal n), what it printed, its CPU seconds, and its growth."""

    code: int
    stdout: str
    stderr: str
    cpu: float
    grown: int


class Limited:
    """The server of runs; use as a context. It runs `warm_up` itself first, without limits."""

    def __init__(self, warm_up: Sequence[Sequence[str]] = ()) -> None:
        self._warm_up = [list(argv) for argv in warm_up]

    def __enter__(self) -> Limited:
        """Start the server and wait until it is warm."""
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), json.dumps(self._warm_up)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        if self._hear() != "ready":
            raise RuntimeError("the server of limited runs did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, argv: Sequence[str], times: int = 1) -> Ended:
        """Run `noisytune ARGV` under the limits: `times` the CPU time, where it reads as many sources."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([times, *argv]) + "\n")
        heard = self._hear()
        if heard:
            return Ended(**json.loads(heard))
        self.__exit__(None, None, None)
        code = self._process.returncode or 1
        self.__enter__()
        return Ended(code, "", "no answer: the run was killed, or ended its server", math.inf, 0)

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def serve(warm_up: list[list[str]]) -> None:
    """Warm up, then answer requests until stdin ends."""
    verbs = [f"commands.{verb}" for verb in ("inspect", "perturb", "verify")]
    shown = ["cli.show_inspect", "cli.show_perturb"]
    for module in (*verbs, *shown, "checkpoint.formats.torch"):
        importlib.import_module(f"noisytune_cli.{module}")
    command = _command()
    for argv in warm_up:
        _run(command, argv)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    while line := sys.stdin.readline():
        print(json.dumps(_answer(command, *json.loads(line))), flush=True)


def _command() -> Any:
    import typer.main

    from noisytune_cli.cli.app import app

    return typer.main.get_command(app)


def _answer(command: Any, times: int, *argv: str) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before, started = _memory("VmRSS"), time.process_time()
    # Beyond what runs before this one have left behind, which no process of its own would find.
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + MEMORY_BYTES, resource.RLIM_INFINITY))
    # In whole seconds, so that one more has to be granted; soft, so that the next run can have a new one.
    resource.setrlimit(resource.RLIMIT_CPU, (int(started) + times * CPU_SECONDS + 1, resource.RLIM_INFINITY))
    answer = _run(command, list(argv))
    return {**answer, "cpu": time.process_time() - started, "grown": _memory("VmHWM") - before}


def _run(command: Any, argv: list[str]) -> dict[str, Any]:
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            command.main(args=argv, prog_name="noisytune")
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = 1
            traceback.print_exc()
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


def _memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
