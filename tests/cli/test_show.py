"""Where results go: data whole on stdout or an error, everything else on stderr, nothing raw."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from noisytune_cli.cli import show
from noisytune_cli.errors import PipeClosed, ResourceExhausted

#: Runs one call the way the command line does, and exits with the error's code.
SCRIPT = """
import sys
from noisytune_cli.cli import show
from noisytune_cli.errors import NoisytuneError, Stopped
try:
    {call}
except (NoisytuneError, Stopped) as error:
    if isinstance(error, NoisytuneError):
        show.note(error.line())
    sys.exit(error.exit_code)
"""

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


def run(call: str, redirect: str) -> subprocess.CompletedProcess[str]:
    """Run a call in a process of its own, under a shell that redirects it."""
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirect}', sys.executable, SCRIPT.format(call=call)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_writes_text_and_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    show.write_out("one\n")
    show.write_out(line for line in ("two\n", "three\n"))
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


@needs_full
@pytest.mark.parametrize("size", [10, 1_000_000], ids=["buffered", "large"])
def test_a_full_device_is_exit_6_and_one_line(size: int) -> None:
    done = run(f"show.write_out('x' * {size})", ">/dev/full")
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1
    assert "standard output: No space left on device" in done.stderr


def test_a_closed_stdout_is_exit_6_and_one_line() -> None:
    done = run("show.write_out('x')", ">&-")
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1
    assert "it is closed" in done.stderr


def test_a_closed_stream_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(ResourceExhausted, match="it is closed"):
        show.write_out("x")


def test_a_closed_pipe_ends_quietly() -> None:
    done = run("show.write_out(str(i) + '\\n' for i in range(10**6))", '| head -1; exit "${PIPESTATUS[0]}"')
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


def test_a_pipe_closed_before_the_first_byte_ends_quietly() -> None:
    done = run("show.write_out('x')", '| true; exit "${PIPESTATUS[0]}"')
    assert done.returncode in (0, 141)  # 0 where the write was faster
    assert done.stderr == ""


def test_a_broken_pipe_is_no_ordinary_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(PipeClosed) as raised:
        show.write_out("x")
    assert raised.value.exit_code == 141
    assert not isinstance(raised.value, Exception)


def test_what_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show.write_out("λ = ±1\n")
    assert raw.getvalue() == b"\\u03bb = \\xb11\n"


def test_notes_are_one_escaped_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    show.note("a\x1b[2J\nb\u202e[red]c[/red]")
    show.warn("name \\x1b stays")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "a\\x1b[2J\\x0ab\\u202e[red]c[/red]\nnoisytune: warning: name \\x1b stays\n"


@needs_full
def test_a_full_stderr_is_no_failure() -> None:
    done = run("show.warn('x'); show.write_out('data')", "2>/dev/full")
    assert (done.returncode, done.stdout) == (0, "data")


def test_a_closed_stderr_is_no_failure() -> None:
    done = run("show.warn('x'); show.write_out('data')", "2>&-")
    assert (done.returncode, done.stdout) == (0, "data")


class Terminal(io.StringIO):
    """A terminal that remembers what it was shown."""

    def isatty(self) -> bool:
        return True


def test_the_bar_shows_on_a_terminal_and_counts_from_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show.progress(4 << 20, "reading\x1b[2J [red]") as advance:
        threads = [threading.Thread(target=advance, args=(1 << 20,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shown = terminal.getvalue()
    assert "reading\\x1b[2J [red]" in shown
    assert "4.2/4.2 MB" in shown  # as in summaries
    assert "/s" in shown


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (4368, "4.4 KB"), (141_107_412_992, "141.1 GB")],
)
def test_sizes_have_a_unit_that_suits_them(nbytes: int, said: str) -> None:
    assert show.size_of(nbytes) == said


def test_a_bar_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show.progress(4, "study", of_steps=True) as advance:
        advance(1)
        advance(3)
    assert "4/4" in terminal.getvalue()
    assert "steps" in terminal.getvalue()


@pytest.mark.parametrize(("quiet", "total"), [(True, 10), (False, 0)])
def test_no_bar_when_quiet_or_without_work(monkeypatch: pytest.MonkeyPatch, quiet: bool, total: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show.errors_alone(quiet), show.progress(total, "reading") as advance:
        advance(10)
    assert terminal.getvalue() == ""


def test_quiet_is_for_every_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with show.errors_alone(True):
        thread = threading.Thread(target=show.warn, args=("from another thread",))
        thread.start()
        thread.join()
    assert capsys.readouterr().err == ""
    show.warn("afterwards")
    assert capsys.readouterr().err == "noisytune: warning: afterwards\n"


def test_no_bar_and_no_rich_without_a_terminal(tmp_path: Path) -> None:
    call = "with show.progress(10, 'reading') as advance: advance(10)\n    assert 'rich' not in sys.modules"
    done = run(call, f"2>{tmp_path / 'err'}")
    assert done.returncode == 0
    assert (tmp_path / "err").read_text() == ""
