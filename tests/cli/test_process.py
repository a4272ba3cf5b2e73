"""noisytune as a process: descriptors, locales, signals, the hub."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from checkpoints import safetensors_bytes, save, weights
from hub_server import Repository, serve
from runs import run

from noisytune_cli import __main__ as program
from noisytune_cli.commands.verify import verify


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(
        tmp_path / "in.safetensors", {"w": weights("F32", 30, 10), "embeddings.weight": weights("F32", 9, 9)}
    )


def process(*arguments: object, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run noisytune as a process of its own, under a shell that redirects its descriptors."""
    kept = {key: os.environ[key] for key in ("PATH", "TMPDIR", "VIRTUAL_ENV") if key in os.environ}
    return subprocess.run(
        ["sh", "-c", f'"$0" -m noisytune_cli "$@" {redirect}', sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=kept | environment,
        check=False,
        timeout=120,
    )


def test_without_a_home_in_a_c_locale(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "ä.safetensors"
    result = process("perturb", source, "-o", out, "--lambda", "0.2", LANG="C", LC_ALL="C", PYTHONUTF8="0")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.startswith("perturbed 2 of 2")
    assert out.exists()


def test_closed_descriptors(source: Path, tmp_path: Path) -> None:
    result = process("perturb", source, "-o", tmp_path / "a", redirect="<&- >&- 2>&-")
    assert result.returncode == 0
    run(source, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_descriptor_that_cannot_be_looked_at_is_taken_for_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int) -> NoReturn:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    opened: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", fails)
        patched.setattr(os, "open", lambda path, flags: opened.append(path) or 0)
        program._hold_standard_descriptors()
    assert opened == []


def test_output_that_is_lost_is_an_error(source: Path) -> None:
    result = process("perturb", source, "--dry-run", redirect=">&-")
    assert result.returncode == 6
    assert result.stderr.startswith("noisytune: error: ")
    assert result.stderr.endswith("then run again.\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_of_which_the_system_takes_only_a_part_is_an_error(
    unbuffered: str, source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "out.safetensors")
    begun = tmp_path / "begun"
    for command in (
        ["--version"],
        ["--help"],
        ["inspect", source, "--format", "csv"],
        ["verify", tmp_path / "out.safetensors", "--json"],
    ):
        begun.write_bytes(bytes(1020))  # of the 1,024 that a file may have
        limited = f'ulimit -f 1; "$0" -m noisytune_cli "$@" >>{begun}'
        arguments = ["bash", "-c", limited, sys.executable, *map(str, command)]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 6, (command, result)
        assert result.stderr.startswith("noisytune: error: cannot write the result: standard output: ")
        assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_a_result_that_is_lost_after_publishing_says_what_is_there(
    redirect: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    for command in (["perturb", source], ["average", source, source]):
        result = process(*command, "-o", out, "--overwrite", "--json", redirect=redirect)
        assert result.returncode == 6
        assert f"; the output is complete at {out}. " in result.stderr
        assert result.stderr.endswith("do not run again.\n")
        assert result.stderr.count("\n") == 1
        assert verify(str(out)).ok
    result = process("perturb", source, "--seed", "0-2", "-o", f"{out}-{{seed}}", "--json", redirect=redirect)
    assert f"complete at {out}-0 and 2 more places. " in result.stderr


@pytest.fixture
def slow_source(tmp_path: Path) -> Path:
    """A checkpoint of many tensors, each of which `_SLOWLY` takes its time for."""
    tensors = {f"w{i}": weights("F32", 16) for i in range(1000)}
    return save(tmp_path / "in.safetensors", tensors)


#: Runs the command line with tiles that take their time, and says when it is in the middle.
_SLOWLY = """
import os, time
from noisytune_cli.noise.devices import cpu
noise = cpu.Cpu.add_noise
def slow(*a, **k):
    os.write(1, b"noise\\n")
    time.sleep(0.05)
    return noise(*a, **k)
cpu.Cpu.add_noise = slow
from noisytune_cli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_nothing_behind(signum: int, code: int, slow_source: Path, tmp_path: Path) -> None:
    arguments = ["perturb", str(slow_source), "-o", str(tmp_path / "deep/er/out"), "--threads", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", _SLOWLY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "noise\n"
            assert (tmp_path / "deep/er").is_dir()
            child.send_signal(signum)
            _, stderr = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == code
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == [slow_source.name]


_STOPPED_IN_A_CLASS = """
import os, signal
from noisytune_cli.cli import app as cli
class Hook:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)
def stop():
    class Made:
        hook = Hook()
cli.run = stop
from noisytune_cli.__main__ import main
main()
"""


def test_a_signal_while_a_class_is_made_is_a_signal_all_the_same() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _STOPPED_IN_A_CLASS], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "", "")


_STOPPED_WHILE_AN_OBJECT_GOES = """
import os, signal, sys, time, weakref
from noisytune_cli.cli import app
set_timer = signal.setitimer
def set_slowly(*arguments):
    set_timer(*arguments)
    until = time.monotonic() + {slow}
    while time.monotonic() < until: pass
signal.setitimer = set_slowly
class Object: pass
def stop(reference):
    os.kill(os.getpid(), signal.{signum})
    for _ in range(10): pass
def run():
    thing = Object()
    kept = {reference}
    del thing
    time.sleep(50)
app.run = run
from noisytune_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("reference", ["weakref.ref(thing, stop)", "weakref.finalize(thing, stop, None)"])
@pytest.mark.parametrize(("signum", "code", "said"), [("SIGTERM", 143, ""), ("SIGINT", 130, "interrupted")])
@pytest.mark.parametrize("slow", [0.0, 0.02])  # of a busy machine, which is still there after the timer
def test_a_signal_while_an_object_goes_is_a_signal_all_the_same(
    reference: str, signum: str, code: int, said: str, slow: float
) -> None:
    program = _STOPPED_WHILE_AN_OBJECT_GOES.format(signum=signum, reference=reference, slow=slow)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=40
    )
    assert (ended.returncode, ended.stderr) == (code, f"noisytune: stopped: {said}\n" if said else "")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    files = {
        "config.json": b'{"model_type": "bert"}',
        "model.safetensors": safetensors_bytes({"w": weights("F32", 99)}),
        "pytorch_model.bin": b"pickle",
    }
    with serve(owner__name=Repository(files)) as served:
        yield served


def test_a_model_of_the_hub(hub: Any, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    result = process("perturb", "owner/name", "-o", tmp_path / "out", "--lambda", "0.15", **environment)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "out/noisytune.json").read_bytes())
    assert (manifest["source"]["id"], manifest["source"]["revision"]) == ("owner/name", Repository({}).commit)
    assert hub.fetched() == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "noisytune.json"]
    (cached,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    assert cached.read_bytes() == hub.repositories["owner/name"].files["model.safetensors"]
    assert (tmp_path / "out/model.safetensors").read_bytes() != cached.read_bytes()
    into_the_cache = process(
        "perturb", "owner/name", "-o", cached.parent / "noisy", HF_HUB_OFFLINE="1", **environment
    )
    assert into_the_cache.returncode == 5


def on_terminal(*arguments: object, **environment: str) -> tuple[int, str]:
    """Run noisytune with stderr on a terminal; its exit code, and all that the terminal was sent."""
    leader, follower = os.openpty()
    kept = {key: os.environ[key] for key in ("PATH", "TMPDIR") if key in os.environ}
    command = [sys.executable, "-m", "noisytune_cli", *map(str, arguments)]
    environment = kept | {"TERM": "xterm", "COLUMNS": "80"} | environment
    running = subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL, env=environment)
    os.close(follower)
    sent = b""
    with contextlib.suppress(OSError):  # that of a terminal whose other end was closed
        while data := os.read(leader, 1 << 16):
            sent += data
    os.close(leader)
    return running.wait(60), sent.decode()


def test_a_download_shows_one_bar_which_goes_away(hub: Any, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    code, sent = on_terminal("perturb", "owner/name", "-o", tmp_path / "out", **environment)
    assert code == 0, sent
    for name in hub.fetched():  # the config is looked at before the weights are asked for
        size = len(hub.repositories["owner/name"].files[name])
        assert f"{size}/{size} bytes" in sent
    assert not re.search(r"Fetching|config\.json|\d%|it/s", sent)
    # A bar's line is gone back to and erased; at most one is there at a time.
    lines = re.split(r"\n\x1b\[1A\x1b\[2K", re.sub(r"\x1b\[\?25[hl]|\x1b\[\d*m|\r", "", sent))
    words = [line.split("\x1b[2K")[-1].split()[0] for line in lines]
    assert words == ["download", "download", "perturb", "perturbed"]
    code, sent = on_terminal("perturb", "owner/name", "-q", "-o", tmp_path / "quiet", **environment)
    assert (code, sent) == (0, "")


def test_a_signal_while_the_handlers_are_installed_is_a_signal_all_the_same() -> None:
    code = (
        "import os, signal\n"
        "from noisytune_cli import __main__; from noisytune_cli.output import signals\n"
        "install = signals.install\n"
        "def installed():\n"
        "    install()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "signals.install = installed\n"
        "__main__.main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (143, "")


@pytest.mark.parametrize(
    "code",
    [
        "sys.argv = ['noisytune', '--version']\nfrom noisytune_cli.__main__ import main\nmain()",
        "import noisytune_cli\ntry:\n noisytune_cli.perturb\nexcept ImportError as error:\n"
        " print('noisytune: error:', error, file=sys.stderr)\n sys.exit(error.exit_code)",
    ],
)
def test_a_system_that_is_not_posix_is_told_in_one_line(code: str) -> None:
    windows = "import os, sys\nos.name = 'nt'\nsys.modules['fcntl'] = sys.modules['resource'] = None\n"
    ended = subprocess.run([sys.executable, "-c", windows + code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (6, "")
    assert ended.stderr == (
        "noisytune: error: this system is not supported: files are written safely on Linux and macOS alone. "
        "On Windows, install noisytune in WSL.\n"
    )
