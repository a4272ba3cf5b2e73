"""`noisytune`, and `python -m noisytune_cli`: prepare the process, run the command line, end it.

Descriptors 0 to 2 are made sure of before anything is opened: with one of them closed, the first file opened
would take its number, and what is meant for the terminal would land in it. Their number is raised as far as
the process may: a checkpoint that many processes saved is as many files, each open twice. A run on a small
model takes little longer than Python takes to start, so what would slow that is kept away.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from typing import NoReturn, cast

#: Enough for 4,000 files, and what every system allows.
_MOST_DESCRIPTORS = 8192


def _hold_standard_descriptors() -> None:
    """Occupy closed descriptors such that using them still fails."""
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError as error:
            if error.errno != errno.EBADF:  # it is open, and what is said through it is not lost
                continue
            opened = os.open(os.devnull, mode)
            if opened != fd:  # the lower ones are taken, so this cannot be
                os.dup2(opened, fd)


def _write_whole() -> None:
    """Let stdout have a buffer, which `python -u` and PYTHONUNBUFFERED take from it.

    Without one a write that the system takes only a part of is cut short, and nobody is told.
    """
    out = sys.stdout
    if out is not None and isinstance(out, io.TextIOWrapper) and isinstance(out.buffer, io.RawIOBase):
        encoding, errors, raw = out.encoding, out.errors, out.detach()
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(cast(io.RawIOBase, raw)), encoding, errors, line_buffering=True
        )


def _print_in_any_encoding() -> None:
    """Have what Typer prints, the help above all, spelt where the terminal's encoding lacks a symbol."""
    from noisytune_cli.escape import SPELLED

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SPELLED)


def _raise_their_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
        with contextlib.suppress(OSError, ValueError):  # as it is, it is enough for most
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _start_quickly() -> None:
    # Python looks for cycles all over what is imported, again and again while more is.
    gc.set_threshold(100_000)
    # NumPy's BLAS starts a thread for each CPU, which spins while it waits; only a study multiplies matrices.
    if "study" not in sys.argv:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> NoReturn:
    """Run noisytune as a process."""
    if os.name != "posix":
        from noisytune_cli.cli import show
        from noisytune_cli.errors import not_supported

        error = not_supported()
        show.fail(error.line())
        sys.exit(error.exit_code)
    _hold_standard_descriptors()
    _write_whole()
    _print_in_any_encoding()
    _raise_their_limit()
    _start_quickly()
    from noisytune_cli.errors import Stopped
    from noisytune_cli.output import signals

    try:
        signals.install()  # from the first of them on, one may come
        from noisytune_cli.cli.app import run

        try:
            run()
        finally:
            signals.ignore()
    except (Stopped, RuntimeError) as error:
        # Python 3.11 wraps what is raised while a class is made, so also a signal during an import.
        stopped = error if isinstance(error, Stopped) else error.__cause__
        if not isinstance(stopped, Stopped):
            raise
        # Not sys.exit: that would wait for threads that are still in the middle of a transfer.
        signals.ignore()
        if stopped.left is not None or stopped.signum == signal.SIGINT:
            from noisytune_cli.cli import show

            show.note(f"noisytune: stopped: {stopped.left or 'interrupted'}")
        _flush()
        os._exit(stopped.exit_code)
    sys.exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                continue


if __name__ == "__main__":
    main()
