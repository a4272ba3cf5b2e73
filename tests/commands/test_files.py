"""The verbs as Python functions: the command line's bytes, plain answers, warnings that Python can filter."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import numbers, save, weights
from typer.testing import CliRunner

import noisytune_cli
from noisytune_cli.cli import options, perturb
from noisytune_cli.cli.app import app
from noisytune_cli.commands import engines
from noisytune_cli.errors import NoisytuneWarning, OutputUnsafe, PackageMissing, UsageError
from noisytune_cli.noise import devices
from noisytune_cli.plan.arguments import in_python


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {"layer.10.weight": weights("F32", 30, 10), "layer.9.weight": weights("BF16", 9, 9)}
    return save(tmp_path / "in.safetensors", tensors)


def test_perturb_makes_the_command_lines_bytes(source: Path, tmp_path: Path) -> None:
    options = [
        "--lambda",
        "0.2",
        "--seed",
        "7",
        "--noise",
        "gaussian",
        "--exclude",
        "*9*",
        "--dtype",
        "float16",
    ]
    run = CliRunner().invoke(app, ["perturb", str(source), "-o", str(tmp_path / "a.safetensors"), *options])
    assert run.exit_code == 0, run.output
    made = noisytune_cli.perturb(
        source, tmp_path / "b.safetensors", lam=0.2, seed=7, noise="gaussian", exclude="*9*", dtype="float16"
    )
    for ending in ("", ".noisytune.json"):
        a, b = ((tmp_path / f"{name}.safetensors{ending}").read_bytes() for name in "ab")
        assert a == b
    assert repr(made) == f"<Perturbed: 1 of 2 tensors -> {tmp_path / 'b.safetensors'}>"
    told = made.to_dict()
    assert told["manifest"] == json.loads((tmp_path / "b.safetensors.noisytune.json").read_bytes())
    json.dumps(told)


def test_what_is_there_is_refused_or_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    noisytune_cli.perturb(source, out)
    with pytest.raises(OutputUnsafe, match="another with out=, or pass overwrite=True"):
        noisytune_cli.perturb(source, out)
    assert noisytune_cli.perturb(source, out, skip_existing=True).skipped
    with pytest.raises(UsageError, match="threads"):
        noisytune_cli.perturb(source, out, threads=0)
    with pytest.raises(UsageError, match="dtype='half'"):
        noisytune_cli.perturb(source, out, dtype="half")


@pytest.mark.parametrize(
    "wrong",
    [{"percentiles": [500]}, {"percentiles": [-1, 50]}, {"percentiles": 50}, {"limit": 0}, {"limit": -1}],
)
def test_numbers_that_the_command_line_refuses_are_refused(wrong: dict[str, Any], source: Path) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}=.* it is not a "):
        noisytune_cli.inspect(source, **wrong)


def test_verify_replay_and_compare(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    noisytune_cli.perturb(source, out, sigma=0.01)
    assert noisytune_cli.verify(out, base=source).ok
    again = noisytune_cli.replay(out, tmp_path / "again.safetensors", base=source)
    assert again.output.read_bytes() == out.read_bytes()
    difference = noisytune_cli.compare(source, out)
    assert difference.differs
    assert repr(difference).endswith("2 rows by tensor: they differ>")
    assert not noisytune_cli.compare(out, again.output).differs
    content = out.read_bytes()
    out.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    answer = noisytune_cli.verify(out)
    assert not answer.ok
    assert answer.to_dict()["ok"] is False
    assert answer.to_dict()["mismatches"][0]["tensor"] == "layer.9.weight"
    assert repr(answer).endswith("2 tensors: 1 mismatches>")


def test_inspect_is_plain_data(source: Path) -> None:
    found = noisytune_cli.inspect(source, percentiles=(50,), include=["layer.*"])
    assert [row.name for row in found.tensors] == ["layer.9.weight", "layer.10.weight"]
    assert repr(found) == "<Inspection: in.safetensors, 2 tensors, 381 parameters>"
    told = found.to_dict()
    assert told["totals"]["parameters"] == 381
    assert told["tensors"][1]["percentiles"]["p50"] == found.tensors[1].percentiles["p50"]


def test_rows_become_a_data_frame(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = noisytune_cli.inspect(source)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: rows))
    rows: Any = found.to_frame()
    assert [row["name"] for row in rows] == ["layer.9.weight", "layer.10.weight"]
    assert all(math.isfinite(row["std"]) for row in rows)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PackageMissing, match="pip install pandas"):
        found.to_frame()


def test_what_the_command_line_warns_of_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save(tmp_path / "x.safetensors", {"a": numbers("F32", 1.0, np.nan), "b": weights("F32", 4, 4)})
    with pytest.warns(NoisytuneWarning, match="NaN or infinite") as caught:
        noisytune_cli.perturb(broken, tmp_path / "y.safetensors")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noisytune_cli.inspect(broken)
    assert capsys.readouterr() == ("", "")


def test_subnormal_numbers_stay_though_they_are_flushed_around_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tiny = save(
        tmp_path / "x.safetensors", {"w": weights("F64", 9, 9, width=1e-42), "v": weights("F32", 9, 9)}
    )
    noisytune_cli.perturb(tiny, tmp_path / "a.safetensors", dtype="float32")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormal numbers")
    try:
        noisytune_cli.perturb(tiny, tmp_path / "b.safetensors", dtype="float32")
        assert noisytune_cli.verify(tmp_path / "b.safetensors", base=tiny).ok
    finally:
        torch.set_flush_denormal(False)
    for ending in ("", ".noisytune.json"):
        a, b = ((tmp_path / f"{name}.safetensors{ending}").read_bytes() for name in "ab")
        assert a == b


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Widen --include or drop an --exclude; --dry-run", "Widen include= or drop an exclude=; --dry-run"),
        ("--lambda: nan is none", "lam=: nan is none"),
        ("--sigma-for=x: nan is none", "rules='x': nan is none"),
        ("Add --granularity=matrix, or leave --split out", "Add granularity='matrix', or leave splits= out"),
        ("such as --split='a.*=0:/2'.", "such as splits={'a.*': '0:/2'}."),
        ("use --device=cpu.", "use device='cpu'."),
        ("with --exclude=a.b --exclude='c d*' and 2 more", "with exclude=['a.b', 'c d*'] and 2 more"),
        ("choose it with --weights always", "choose it with weights= always"),
        ("for several, repeat --include or --exclude", "for several, give a list as include= or exclude="),
        ("or pass --follow-links if it is meant", "or pass follow_links=True if it is meant"),
        ("a place with -o that is not mounted", "a place with out= that is not mounted"),
        *[
            (same, same)
            for same in (
                "with: noisytune inspect SOURCE --headers-only",
                "noisytune replay noisytune.json --base b -o out",
                "inspect --headers-only lists the shapes",
                "noise--seed",
            )
        ],
    ],
)
def test_an_option_is_told_as_the_argument_that_it_is(said: str, meant: str) -> None:
    assert in_python(noisytune_cli.perturb, said) == meant


def _messages() -> Iterator[str]:
    """Yield every text in the code that Python's functions reach, {} for what is put into it."""
    commands = {"card.py", "provenance.py", "build.py"}  # to be copied, and no messages
    for path in sorted(Path(noisytune_cli.__file__).parent.rglob("*.py")):
        if {"cli", "study"} & set(path.parts) or path.name in commands:
            continue
        tree = ast.parse(path.read_text())
        pieces = {
            id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
                yield node.value


def test_every_message_has_an_option_and_its_value_in_one() -> None:
    """So that a word after an option is never its value, nor a value a word."""
    kinds = (
        kind for module in (options, perturb) for kind in vars(module).values() if type(kind) is EnumType
    )
    values = {*devices.names(), *engines.names(), *(str(choice) for kind in kinds for choice in kind)}
    assert {"matrix", "safetensors", "cpu", "ray"} <= values
    found = [
        (message, word)
        for message in _messages()
        for word in re.findall(r"(?<![\w-])(?:--[a-z-]+|-o) (\S+)", re.sub("noisytune [a-z].*", "", message))
    ]
    assert len(found) > 40
    for message, word in found:
        assert re.fullmatch("([a-z]+|--[a-z-]+)[,.;:)]?", word), message
        assert word.rstrip(",.;:)") not in values, message


def test_errors_and_warnings_name_arguments(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Add granularity='matrix', or leave splits= out") as caught:
        noisytune_cli.perturb(source, tmp_path / "a", splits={"layer.9.weight": "0:/3"})
    assert caught.value.what == "splits={'layer.9.weight': '0:/3'}"
    noisytune_cli.perturb(source, tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="base= is missing"):
        noisytune_cli.replay(tmp_path / "b.safetensors", tmp_path / "c")
    doubtful = save(tmp_path / "d.safetensors", {"a": weights("F32", 4, 4), "b.mean": weights("F32", 4)})
    with pytest.warns(NoisytuneWarning, match=r"to keep it: exclude='b\.mean'"):
        noisytune_cli.perturb(doubtful, tmp_path / "e.safetensors")


def test_the_package_shows_its_public_names_alone() -> None:
    assert dir(noisytune_cli) == sorted(noisytune_cli.__all__)
    for name in noisytune_cli.__all__:
        if not name.startswith("__"):
            assert callable(getattr(noisytune_cli, name))
