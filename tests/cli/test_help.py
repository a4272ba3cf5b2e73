"""Help: headings, examples, and no trouble on any terminal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import save, weights
from typer.main import get_command
from typer.testing import CliRunner

from noisytune_cli.cli.app import app

VERBS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, prog_name="noisytune")
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_ends_with_examples_that_can_be_typed(verb: str) -> None:
    before, examples = shown(verb, "--help").split("\nExamples:\n")
    assert "Examples" not in before
    lines = [line for line in examples.splitlines() if line.startswith("  ")]
    assert lines
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    firsts = []
    for line in lines:
        program, first, *arguments = shlex.split(line)
        assert program == "noisytune"
        firsts.append(first)
        if first == verb:
            words = [word for word in arguments if word != ">"][: -1 if ">" in line else None]
            command.make_context(verb, words)
    # What has to come before it may be another verb's, which tests of the pages run.
    assert firsts[-1] == verb
    assert set(firsts) == {verb} or verb in ("work", "finish", "status")


@pytest.mark.parametrize("verb", VERBS)
def test_only_help_has_no_heading_of_its_own(verb: str) -> None:
    last = re.split(r"\n(?=\S)", shown(verb, "--help").split("\nExamples:\n")[0])[-1].rstrip()
    assert last == "Options:\n  -h, --help  Show this message and exit."


def test_help_is_a_word_too() -> None:
    assert shown("help") == shown("--help")
    assert shown("help", "verify") == shown("verify", "--help")
    assert shown("-V") == shown("--version")
    assert CliRunner().invoke(app, ["help", "nothing"]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["perturb", "x", "-o"], "Error: Option '-o' requires an argument."),
        (["--debug=3"], "Error: Option '--debug' does not take a value."),
        (["perturb", "x", "y"], "The output goes after -o, and patterns stand in quotes."),
        (["work", "x", "y"], "extra argument(s) (y)"),
        (["compare", "x", "y", "z"], "extra argument(s) (z)"),
    ],
)
def test_whatever_is_refused_is_shown_with_usage(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, words, prog_name="noisytune")
    assert result.exit_code == 2
    assert re.match(r"Usage: noisytune .*\nTry 'noisytune( \w+)? -h' for help.\n\nError: ", result.stderr)
    assert result.stderr.rstrip().endswith(said)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["per"], ["perturb"]),
        (["perturb", "--lambda"], ["--lambda", "--lambda-for"]),
        (["inspect", "--format", "j"], ["json", "jsonl"]),
        (["inspect", "x", "--hist"], ["--histogram"]),
        (["--ver"], ["--version"]),
    ],
)
def test_a_shell_completes_what_is_typed(words: list[str], found: list[str]) -> None:
    asked = {"_NOISYTUNE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["noisytune", *words])}
    environment = os.environ | asked | {"COMP_CWORD": str(len(words))}
    command = [sys.executable, "-m", "noisytune_cli"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert (result.stdout.split(), result.stderr) == (found, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_is_installed_by_one_option(tmp_path: Path) -> None:
    def typed(option: str, shell: str = "bash", home: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        command = [shell, "-c", f'"$0" -m noisytune_cli {option}; exit $?', sys.executable]
        environment = os.environ | {"HOME": str(home)}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=120
        )

    shown = typed("--show-completion")
    assert "complete -o default -F _noisytune_completion noisytune" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    done = typed("--install-completion")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    script = tmp_path / ".bash_completions/noisytune.sh"
    assert script.read_text() == shown.stdout.rstrip("\n")
    assert str(script) in (tmp_path / ".bashrc").read_text()
    (blocked := tmp_path / "file").touch()
    lost = typed("--install-completion", home=blocked)
    assert (lost.returncode, lost.stderr.count("\n")) == (6, 1), lost.stderr
    assert "--show-completion" in lost.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp437", "ascii"])
def test_no_terminal_is_too_poor(encoding: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 30, 10)})
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for arguments in (
        ["perturb", "--help"],
        ["perturb", source, "--dry-run"],
        ["perturb", source, "--lambda", "15", "-o", tmp_path / f"{encoding}.safetensors"],
        ["perturb", source, "--lambda", "λ", "-o", tmp_path / "no"],
        ["inspect", source, "--sigma", "0.1"],
    ):
        command = [sys.executable, "-m", "noisytune_cli", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=120)
        assert result.returncode == (2 if "λ" in arguments else 0), result.stderr
        assert b"Traceback" not in result.stderr
        if "--dry-run" in arguments:
            assert b"perturb lambda=0.15" in result.stdout
        if "15" in arguments:
            assert b"warning: lambda 15 gives" in result.stderr
        if encoding != "ascii" and "--help" in arguments:  # for ASCII Typer takes UTF-8
            assert b"--lambda lambda," in result.stdout


def test_an_interrupt_says_one_line() -> None:
    script = (
        "import os, signal\n"
        "from noisytune_cli.cli import app as cli\n"
        f"cli.run = lambda: os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "from noisytune_cli.__main__ import main\nmain()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "noisytune: stopped: interrupted\n"
