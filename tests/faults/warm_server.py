"""A warm process that forks one noisytune run after another.

Starting Python and loading the kernels takes most of a small run's second; a fork of a process that has done
both takes 40 ms. A child is a whole run: it calls the console script's `main`, with its own arguments and
standard streams, and ends with its exit code. Only the interpreter's own teardown is skipped.

Spoken on stdin and stdout, a line each: a JSON request (`argv`, `stdout`, `stderr`) is answered by the
child's pid; the child waits until `go`, so that it can be traced from its first instruction; then comes
its status as `waitpid` gave it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from noisytune_cli.__main__ import main


def serve(warm_up: list[list[str]]) -> None:
    """Run each of `warm_up` once, then answer requests until stdin ends."""
    _load_modules()
    for argv in warm_up:
        _run_here(argv)
    gc.collect()
    gc.freeze()  # otherwise every child's first collection copies the whole heap
    _say("ready")
    while line := sys.stdin.readline():
        _answer(json.loads(line))


def _load_modules() -> None:
    """Import what a run imports late, the way to an error included."""
    for module in ("cli.app", "cli.show_perturb", "commands.perturb"):
        importlib.import_module(f"noisytune_cli.{module}")


def _run_here(argv: list[str]) -> None:
    """Run noisytune in this process, its output thrown away."""
    from noisytune_cli.cli.app import app

    real = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        app(args=argv, prog_name="noisytune", standalone_mode=False)
    except SystemExit:
        pass  # a run that fails warms the way to an error
    finally:
        os.dup2(real, 2)
        os.close(real)
        os.close(nowhere)


def _answer(request: dict[str, Any]) -> None:
    gate, opener = os.pipe()
    ready, arrived = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(opener)
        os.close(ready)
        _run_child(request, gate, arrived)
    os.close(gate)
    os.close(arrived)
    os.read(ready, 1)  # a signal while it is forked would be Python's, and said where nobody looks
    os.close(ready)
    _say(str(pid))
    sys.stdin.readline()
    with contextlib.suppress(BrokenPipeError):  # killed while it waited
        os.write(opener, b"\n")
    os.close(opener)
    _, status = os.waitpid(pid, 0)
    _say(str(status))


def _run_child(request: dict[str, Any], gate: int, arrived: int) -> NoReturn:
    """Take on the request's streams, wait at the gate, and be noisytune."""
    for fd, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, fd)
        with contextlib.suppress(OSError):  # a fault is injected into the first call of every thread
            os.close(opened)
    sys.argv = ["noisytune", *request["argv"]]
    count = (lambda: 0) if request["short"] is None else shorten_transfers(request["short"])
    os.close(arrived)
    # readv, because reads are counted: this one may begin before the tracer looks, or after.
    if not os.readv(gate, [bytearray(1)]):
        os._exit(0)  # the server ended: nobody waits for this run any more
    os.close(gate)
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # the latter where Python's own signal came while stdout was changed
        code = 120  # as the interpreter ends when it cannot flush
    if request["short"] is not None:
        with open(request["shortened"], "w") as file:
            file.write(str(count()))
    os._exit(code)


def shorten_transfers(seed: int) -> Callable[[], int]:
    """Let half of this process's transfers move a part of what they are asked to; return what counts them.

    POSIX allows that of every read and write; signals, network file systems and full disks do it.
    """
    choose = random.Random(seed)
    shortened = 0

    def part(length: int) -> int:
        nonlocal shortened
        if length < 2 or choose.random() < 0.5:
            return length
        shortened += 1
        return choose.randrange(1, length)

    read, pread, preadv, write, pwrite = os.read, os.pread, os.preadv, os.write, os.pwrite

    def short_preadv(fd: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        (buffer,) = buffers
        view = memoryview(buffer).cast("B")
        return preadv(fd, [view[: part(len(view))]], offset, flags)

    def short_write(fd: int, data: Any) -> int:
        view = memoryview(data).cast("B")
        return write(fd, view[: part(len(view))])

    def short_pwrite(fd: int, data: Any, offset: int) -> int:
        view = memoryview(data).cast("B")
        return pwrite(fd, view[: part(len(view))], offset)

    os.read = lambda fd, length: read(fd, part(length))
    os.pread = lambda fd, length, offset: pread(fd, part(length), offset)
    os.preadv, os.write, os.pwrite = short_preadv, short_write, short_pwrite
    return lambda: shortened


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
