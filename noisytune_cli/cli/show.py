"""What the user sees: data on stdout, everything else on stderr.

The only file that prints. Data is whole or an error: output that a full disk or a closed descriptor would
lose is exit 6, a closed pipe ends quietly. Lines on stderr are a courtesy: where nobody can read them, they
are dropped. Nothing that comes from a checkpoint reaches a terminal unescaped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from noisytune_cli.checkpoint.address import Place
from noisytune_cli.errors import PipeClosed, ResourceExhausted
from noisytune_cli.escape import SPELLED, escape, list_some

#: What told that a tensor is a buffer, in words; None where a record does not say.
TOLD_BY: dict[str | None, str] = {
    "checkpoint": "the checkpoint",
    "model": "the model",
    "structure": "its siblings",
    "values": "its values",
    "names": "its name",
    None: "an earlier run",
}

#: Seconds between two updates of the progress bar.
_UPDATE_EVERY = 0.1

#: How many files that are left out the summary names; the manifest and JSON have all.
_MOST_LEFT_OUT = 3

#: Characters of a warning: those of the longest that noisytune means to give.
_LONGEST_WARNING = 1500


#: Whether lines that are no errors are left out, whichever thread says them.
_errors_alone = False


@contextmanager
def errors_alone(wanted: bool) -> Iterator[None]:
    """Keep all that is no error off stderr, where that is `wanted`."""
    global _errors_alone
    before, _errors_alone = _errors_alone, wanted
    try:
        yield
    finally:
        _errors_alone = before


def write_out(text: str | Iterable[str], published: Sequence[Place] = (), *, spelled: bool = False) -> None:
    """Write data, whole or in chunks, to stdout and flush it; `spelled` is text that people read.

    Raises PipeClosed where the reader has gone, ResourceExhausted where the data cannot be written; that says
    of what is `published` that it is complete all the same.
    """
    out = sys.stdout
    if out is None or out.closed:
        raise _lost("it is closed", published)
    try:
        for chunk in (text,) if isinstance(text, str) else text:
            out.write(_encodable(chunk, out, SPELLED if spelled else "backslashreplace"))
        out.flush()
    except BrokenPipeError:
        _abandon(out)
        raise PipeClosed from None
    except OSError as error:
        raise lost_out(error, published) from error


def write_report(chunks: Iterable[str], out: str | None, *, spelled: bool) -> None:
    """Print a report, which `spelled` says is text that people read, or write it to the new file `out`."""
    if out is None:
        write_out(chunks, spelled=spelled)
    else:
        from noisytune_cli.output.reports import write_new  # most reports are printed

        warn_all(*write_new(out, chunks))


def lost_out(error: OSError, published: Sequence[Place] = ()) -> ResourceExhausted:
    """Return what it is that stdout failed with this error, and give it up."""
    if sys.stdout is not None:
        _abandon(sys.stdout)
    return _lost(os.strerror(error.errno) if error.errno else str(error), published)


def note(text: str) -> None:
    """Write one line to stderr, if it is wanted and anybody is there to read it."""
    if not _errors_alone:
        _tell(text)


def fail(text: str) -> None:
    """Write the line of an error to stderr."""
    _tell(f"noisytune: error: {text}")


def _tell(text: str) -> None:
    if sys.stderr is not None and not sys.stderr.closed:
        try:
            sys.stderr.write(_encodable(f"{_printable(text)}\n", sys.stderr, SPELLED))
            sys.stderr.flush()
        except OSError:
            _abandon(sys.stderr)


def warn(text: str) -> None:
    """Write one warning to stderr, cut where what it quotes is too long to be read."""
    cut = f"{text[:_LONGEST_WARNING]}…" if len(text) > _LONGEST_WARNING else text
    note(f"noisytune: warning: {cut}")


def warn_all(warnings: Iterable[str], cleared: Iterable[str] = ()) -> None:
    """Say what a run that was killed had left and this one `cleared`, then warn of the rest."""
    for name in cleared:
        note(f"noisytune: removed {escape(name)}, which a run that was killed had left")
    for warning in warnings:
        warn(warning)


def note_left_out(left_out: Sequence[tuple[str, str]]) -> None:
    """Name the first files that are not in an output, each with the reason, on a line of stderr."""
    if left_out:
        shown = [f"{escape(name)} ({why})" for name, why in left_out]
        note(f"left out: {list_some(shown, _MOST_LEFT_OUT)}")


def size_of(nbytes: int) -> str:
    """Return a size in the unit that suits it, such as 256 bytes, 90.9 MB or 140.5 GB."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "KB")):
        if nbytes >= 10**power:
            return f"{nbytes / 10**power:,.1f} {unit}"
    return f"{nbytes} byte{'' if nbytes == 1 else 's'}"


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a person looks at `stream`."""
    return stream is not None and not stream.closed and stream.isatty()


@contextmanager
def progress(total: int, description: str, *, of_steps: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes, or of steps, and the time left on stderr; yield what to call with those just done.

    It may be called from any thread. Nothing is shown without a terminal, or where errors are shown alone.
    """
    if _errors_alone or not (total and is_terminal(sys.stderr)):
        yield lambda done: None
        return
    from rich import progress as bars
    from rich.console import Console

    if of_steps:
        columns: list[bars.ProgressColumn] = [bars.MofNCompleteColumn(), bars.TextColumn("steps")]
        columns += [bars.TimeElapsedColumn(), bars.TextColumn("left")]
    else:
        columns = [bars.DownloadColumn(), bars.TransferSpeedColumn()]
    lock = threading.Lock()
    completed, next_update = 0, 0.0
    bar = bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        *columns,
        bars.TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        # A run's first steps say little about those of other methods, so look far back.
        speed_estimate_period=600.0 if of_steps else 30.0,
        redirect_stdout=False,
        redirect_stderr=False,
    )

    def advance(done: int) -> None:
        nonlocal completed, next_update
        with lock:
            completed += done
            now = time.monotonic()
            if now >= next_update or completed >= total:
                next_update = now + _UPDATE_EVERY
                bar.update(task, completed=completed)

    with bar:
        task = bar.add_task(_printable(description), total=total)
        yield advance


def _printable(text: str) -> str:
    """Escape what is not printable; a backslash stays, so that text with names escaped before keeps them."""
    return "\\".join(escape(part, None) for part in text.split("\\"))


def _encodable(text: str, stream: TextIO, errors: str) -> str:
    """Replace what the stream's encoding lacks: by escapes, or SPELLED by words where there are any."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors).decode(encoding)


def _abandon(stream: TextIO) -> None:
    """Lead what is left in the stream's buffer nowhere: the flush at exit would fail on it once more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


def _lost(why: str, published: Sequence[Place]) -> ResourceExhausted:
    if published:
        more = f" and {len(published) - 1:,} more places" if len(published) > 1 else ""
        return ResourceExhausted(
            "cannot write the result",
            path="standard output",
            why=f"{why}; the output is complete at {published[0]}{more}",
            next_step="The manifest there says what was done: do not run again",
        )
    return ResourceExhausted(
        "cannot write the result",
        path="standard output",
        why=why,
        next_step="Send it to where there is room, then run again",
    )
