"""Names from files are printed escaped, wherever they are printed, and never become paths.

One checkpoint bears the hostile names: a tensor, a file beside it, its config and its folder. Every command
runs on it, and on what is wrong with it, and nothing that a terminal would obey comes out.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from checkpoints import Tensor, numbers, save, save_sharded, weights
from typer.testing import CliRunner, Result

from noisytune_cli.cli import show
from noisytune_cli.cli.app import app
from noisytune_cli.output.staging import create

#: What a name may try: the screen, the title, a line of its own, the reading order, markup, a path.
HOSTILE = (
    "\x1b[2J",
    "\x1b]0;owned\x07",
    "a\nnoisytune: error: b",
    "a\r\x9b31mb",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "[red]x[/red]",
    "a\0b",
    "../../../etc/passwd",
    "/etc/passwd",
    "\u2028\u2029\x85",
    "\U000e0041",
    "%s%n{0}",
)

#: As a file's name: no slash, no NUL; and bytes that are not UTF-8.
FILES = (
    *(name for name in HOSTILE if "/" not in name and "\0" not in name),
    os.fsdecode(b"\xff\x9b"),
)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    for line in (result.stdout + result.stderr).split("\n"):
        assert line.isprintable(), line
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder whose tensors, other files and own name are hostile."""
    root = tmp_path / "\x1b[2Jmodel\u202e"
    tensors: dict[str, Tensor] = {name: weights("F32", 8, 4, seed=i) for i, name in enumerate(HOSTILE)}
    tensors |= {f"nan {name}": numbers("F32", 1.0, float("nan")) for name in HOSTILE}
    save(root / "model.safetensors", tensors, {"\x1b[2J": "\x1b[2J"})
    for name in FILES:
        (root / name).write_text("x")
    (root / "\x1b[31m.fp16.safetensors").write_text("x")
    os.mkfifo(root / "\x07pipe")
    return root


@pytest.mark.parametrize("format", ["table", "json", "jsonl", "csv"])
@pytest.mark.parametrize("options", [(), ("--headers-only",)])
def test_inspect(source: Path, format: str, options: tuple[str, ...]) -> None:
    text = run("inspect", source, "--format", format, *options).stdout
    if format == "json":
        assert {row["name"] for row in json.loads(text)["tensors"]} >= set(HOSTILE)
    elif format == "jsonl":
        assert {json.loads(line).get("name") for line in text.splitlines()} >= set(HOSTILE)
    elif format == "csv":
        assert len(list(csv.reader(io.StringIO(text)))) == 1 + 2 * len(HOSTILE)
    else:
        assert "[red]x[/red]" in text
        assert "\\x1b]0;owned\\x07" in text


def test_perturb_and_what_follows(source: Path, tmp_path: Path) -> None:
    assert "[red]x[/red]" in run("perturb", source, "--dry-run").stdout
    run("perturb", source, "--dry-run", "--json")
    out = tmp_path / "out\x1b[2J\u202e[red]"
    written = run("perturb", source, "-o", out)
    assert "that are NaN or infinite" in written.stderr
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, out.name])
    run("verify", out)
    run("verify", out, "--json")
    run("replay", out / "noisytune.json", "--base", source, "-o", tmp_path / "again\x07")
    (out / FILES[0]).write_text("another")
    (out / "\x1b[2J.safetensors").write_text("a stray")
    assert "\\x1b[2J" in run("verify", out, code=8).stderr
    run("verify", out, "--json", code=8)
    again = run("replay", out / "noisytune.json", "--base", out, "-o", tmp_path / "third", code=8)
    assert again.stderr.count("\n") == 1
    run("perturb", source, "-o", out, code=5)


def test_perturb_json_and_left_overs(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out\x1b]0;x\x07"
    _, lock = create(tmp_path, out)
    os.close(lock)  # as when its run is killed
    result = run("perturb", source, "-o", out, "--json")
    assert "killed" in result.stderr
    assert json.loads(result.stdout)["output"] == str(out)


@pytest.mark.parametrize("name", HOSTILE)
def test_error_lines(name: str, tmp_path: Path) -> None:
    broken = save(tmp_path / "f.safetensors", {name: weights("F32", 4)})
    broken.write_bytes(broken.read_bytes().replace(b"F32", b"F33"))
    assert run("inspect", broken, code=3).stderr.count("\n") == 1
    shards = save_sharded(tmp_path / "s", {"a": weights("F32", 4)}, {name: weights("F32", 4)})
    index = shards / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["a"] = name
    index.write_text(json.dumps(document))
    assert run("inspect", shards, code=3).stderr.count("\n") == 1
    document["weight_map"] = {"a": "model-00001-of-00002.safetensors"}
    document["metadata"] = {"total_size": name}
    index.write_text(json.dumps(document))
    assert "total_size" in run("inspect", shards, "--headers-only").stderr
    quantized = save(tmp_path / "q" / "model.safetensors", {"w": weights("F32", 4)}).parent
    (quantized / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": name}}))
    assert run("perturb", quantized, "--dry-run", code=3).stderr.count("\n") == 1
    run("inspect", quantized)


@pytest.mark.parametrize("name", [name for name in HOSTILE if "\0" not in name])
def test_usage_errors(source: Path, name: str) -> None:
    result = CliRunner().invoke(app, ["perturb", str(source), "--include", f"no {name}", "-o", "x"])
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stderr
    assert "\u202e" not in result.stderr


class Terminal(io.StringIO):
    """A terminal that remembers what it was shown."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", HOSTILE)
def test_the_bar(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show.progress(1 << 20, name) as advance:
        advance(1 << 20)
    shown = terminal.getvalue()
    assert not any(sequence in shown for sequence in ("\x1b[2J", "\x1b]", "\x9b"))
    # What is left without the bar's own colours and movements of the cursor is text.
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", "", shown).isprintable()
    assert "[red]x[/red]" in shown or name != "[red]x[/red]"


def test_the_table_on_a_terminal(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        app(["inspect", str(source), "--headers-only"])
    shown = terminal.getvalue()
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert "[red]x[/red]" in shown
