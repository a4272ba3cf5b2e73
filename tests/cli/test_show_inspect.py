"""An inspection in each format: nothing lost, nothing raw, and kind to pipelines."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import save, weights
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.cli.options import ReportFormat
from noisytune_cli.cli.show_inspect import render, show_inspections, std_map
from noisytune_cli.commands.inspect import Inspection, TensorReport, Totals, inspect
from noisytune_cli.errors import OutputUnsafe

ROW = TensorReport(
    name="layers.0.weight",
    file="model.safetensors",
    dtype="F32",
    shape=(2, 3),
    elements=6,
    bytes=24,
    mean=0.1 + 0.2,
    std=0.014999999664723873,
    min=-5e-324,
    max=1e300,
    l1=2.0,
    l2=1.5,
    zeros=1 / 3,
    nan=0,
    inf=0,
    action="perturb",
    reason=None,
    stream="layers.0.weight",
    low=-0.25,
    high=0.25,
)
COPY = replace(
    ROW, name="count", dtype="I64", shape=(), elements=1, bytes=8, mean=None, std=None, min=None, max=None,
    l1=None, l2=None, zeros=None, nan=None, inf=None, action="copy", reason="not-float", stream="count",
    low=None, high=None,
)  # fmt: skip
HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "line\nOK: all good",
    "\r\x00\u202ereversed",
    "[red]markup[/red] :smile: [/]",
    '=HYPERLINK("x"),"quoted"',
    "",
    "日本語 é",
    "back\\slash",
]


def inspection(*rows: TensorReport, **changes: object) -> Inspection:
    totals = Totals(len(rows), 1, 7, 32, 0, 0)
    return replace(Inspection("model", None, 0.15, None, rows, totals), **changes)


def shown(found: Inspection, format: str) -> str:
    return "".join(render([found], format))


def test_json_is_one_document_that_round_trips() -> None:
    document = json.loads(shown(inspection(ROW, COPY, revision="abc"), "json"))
    assert list(document) == ["id", "revision", "lambda", "quantized", "tensors", "totals"]
    assert (document["id"], document["revision"], document["lambda"]) == ("model", "abc", 0.15)
    first, second = document["tensors"]
    assert (first["mean"], first["min"], first["zeros"]) == (0.1 + 0.2, -5e-324, 1 / 3)
    assert first["shape"] == [2, 3]
    assert (second["shape"], second["std"], second["nan"]) == ([], None, None)
    assert document["totals"] == {
        "tensors": 2,
        "perturbed": 1,
        "parameters": 7,
        "bytes": 32,
        "nan": 0,
        "inf": 0,
    }


def test_jsonl_has_a_tensor_a_line_and_the_totals_apart() -> None:
    lines = [json.loads(line) for line in shown(inspection(ROW, COPY), "jsonl").splitlines()]
    assert [line.get("name") for line in lines] == ["layers.0.weight", "count", None]
    assert list(lines[-1]) == ["totals"]
    assert lines[0] == json.loads(shown(inspection(ROW), "json"))["tensors"][0]


def test_csv_has_a_header_and_rows() -> None:
    first, second = csv.DictReader(io.StringIO(shown(inspection(ROW, COPY), "csv")))
    assert [float(first[key]) for key in ("mean", "min", "zeros")] == [0.1 + 0.2, -5e-324, 1 / 3]
    assert (first["shape"], second["shape"], second["std"], second["reason"]) == (
        "[2, 3]",
        "[]",
        "",
        "not-float",
    )


def test_infinities_are_null_or_empty() -> None:
    row = replace(ROW, l1=math.inf, l2=math.inf, std=math.inf)
    assert json.loads(shown(inspection(row), "jsonl").splitlines()[0])["l1"] is None
    (first,) = csv.DictReader(io.StringIO(shown(inspection(row), "csv")))
    assert (first["l1"], first["l2"], first["std"]) == ("", "", "")


@pytest.mark.parametrize("format", ReportFormat)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_never_shown_raw(format: str, name: str) -> None:
    text = shown(inspection(replace(ROW, name=name, stream=name, file=name), COPY), format)
    assert all(c == "\n" or c.isprintable() for c in text)
    assert text.count("\n") == shown(inspection(ROW, COPY), format).count("\n")


@pytest.mark.parametrize("name", HOSTILE)
def test_json_has_names_verbatim_and_csv_escaped(name: str) -> None:
    found = inspection(replace(ROW, name=name))
    assert json.loads(shown(found, "json"))["tensors"][0]["name"] == name
    assert json.loads(shown(found, "jsonl").splitlines()[0])["name"] == name
    rows = list(csv.DictReader(io.StringIO("".join(render([found], "csv", raw=True)))))
    assert len(rows) == 1
    assert rows[0]["name"].encode().decode("unicode_escape" if name.isascii() else "utf-8") == name or (
        "\\u202e" in rows[0]["name"]
    )


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\uff1d", "'"])
def test_no_cell_of_csv_is_a_formula(begin: str) -> None:
    name = f'{begin}HYPERLINK("http://x";"y")'
    found = inspection(replace(ROW, name=name, file=name, stream=name, mean=-1.5, min=-2.0))
    row = next(csv.DictReader(io.StringIO(shown(found, "csv"))))
    assert (row["name"], row["file"], row["stream"]) == (f"'{name}",) * 3
    assert (row["mean"], row["min"]) == ("-1.5", "-2.0")
    row = next(csv.DictReader(io.StringIO("".join(render([found], "csv", raw=True)))))
    assert (row["name"], row["mean"]) == (name, "-1.5")
    assert json.loads(shown(found, "json"))["tensors"][0]["name"] == name


@pytest.mark.parametrize("begin", ["\t", "\r", "\n"])
def test_what_is_escaped_is_no_formula(begin: str) -> None:
    row = next(csv.DictReader(io.StringIO(shown(inspection(replace(ROW, name=f"{begin}=1+1")), "csv"))))
    assert row["name"].startswith("\\x")


def test_raw_is_an_option(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"=1+1": weights("F32", 3)})
    for options, name in ([], "'=1+1"), (["--raw"], "=1+1"):
        result = CliRunner().invoke(app, ["inspect", str(path), "--format", "csv", *options])
        assert next(csv.DictReader(io.StringIO(result.stdout)))["name"] == name


def test_a_page_has_the_rows_the_facts_and_the_std_by_layer_and_kind() -> None:
    bias = replace(ROW, name="layers.1.bias", std=3.0, elements=1)
    more = replace(ROW, name="layers.1.norm.bias", std=4.0, elements=1)
    content = shown(inspection(ROW, bias, more, replace(COPY, name="<script>x</script>")), "html")
    assert "&lt;script&gt;x&lt;/script&gt;" in content
    assert content.count("<script>") == 1
    assert 'data-tip="layers.1, bias: 3"' in content
    assert 'data-tip="layers.1, norm: 4"' in content
    assert "4 tensors" not in content
    assert "1 of 4 would be perturbed" in content


def test_the_std_of_a_layer_and_kind_is_the_root_mean_square() -> None:
    rows = [
        replace(ROW, name=f"layers.0.bias{i}.bias", std=std, elements=n)
        for i, std, n in ((0, 3.0, 3), (1, 1.0, 1))
    ]
    assert std_map(inspection(*rows)).values == ((math.sqrt(28 / 4),),)


def test_out_and_plot_are_new_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = inspection(ROW)
    page, figure = tmp_path / "page.html", tmp_path / "figure.svg"
    show_inspections([found], "html", out=str(page), plot=str(figure))
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert figure.read_bytes().startswith(b"<?xml")
    with pytest.raises(OutputUnsafe):
        show_inspections([found], "html", out=str(page))


def test_markup_stays_text() -> None:
    assert "[red]markup[/red] :smile: [/]" in shown(inspection(replace(ROW, name=HOSTILE[3])), "table")


def test_the_table_rounds_and_explains() -> None:
    broken = replace(ROW, name="broken", nan=3, action="copy", reason="non-finite", high=None)
    tied = replace(ROW, name="lm_head.weight")
    unread = replace(ROW, name="unread", stream="unread", unsure=("constant", "tied"))
    header, *rows, total = shown(inspection(ROW, COPY, broken, tied, unread), "table").splitlines()
    assert "dtype" in header
    assert "file" not in header  # there is only one
    assert "0.015" in rows[0]
    assert "33.33%" in rows[0]
    assert rows[0].endswith("±0.25  perturb")
    assert rows[1].endswith("not-float")
    assert rows[2].endswith("non-finite, noise of layers.0.weight")
    assert rows[3].endswith("perturb, noise of layers.0.weight")
    assert rows[4].endswith("perturb, unless constant or tied")
    assert total.startswith("5 tensors, 32 bytes")
    assert total.endswith("1 of 5")


def test_columns_without_a_value_are_left_out() -> None:
    header = shown(inspection(replace(COPY, name="a"), COPY, totals=Totals(2, 0, 2, 16, None, None)), "table")
    assert header.splitlines()[0].split() == ["name", "dtype", "shape", "elements", "action"]


def test_the_file_shows_where_there_are_several() -> None:
    table = shown(inspection(ROW, replace(ROW, file="model-2.safetensors")), "table")
    assert "model-2.safetensors" in table


def test_columns_line_up_by_width_on_screen() -> None:
    wide = replace(ROW, name="日本語", stream="日本語")
    first, second = shown(inspection(wide, ROW), "table").splitlines()[1:3]
    assert second.index("F32") - first.index("F32") == 3  # each of its characters takes two places


def test_a_pipe_gets_every_column_uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = shown(inspection(replace(ROW, name="n" * 200)), "table")
    assert "n" * 200 in text
    assert "l1" in text
    assert "\x1b" not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, **environment: str) -> str:
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    return shown(inspection(ROW, COPY), "table")


def test_a_narrow_terminal_drops_columns_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    header, first, *_, last = on_terminal(monkeypatch, 80, TERM="dumb").splitlines()
    assert max(len(header), len(first)) <= 80
    assert "l1" not in header
    assert {"name", "std", "noise", "action"} <= set(header.split())
    assert "l1" in last
    assert "--format csv" in last


def test_long_names_lose_their_middle_and_no_line_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    rows = inspection(
        replace(ROW, name=name),
        replace(COPY, name=name + "_scale", stream=name + "_scale", reason="one-element"),
    )
    for width in (70, 80, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, "stdout", Terminal())
        lines = re.sub(r"\x1b\[[0-9;]*m", "", shown(rows, "table")).splitlines()
        assert max(map(len, lines)) <= width
        assert lines[1].startswith("bert.enc")
        assert "…" in lines[1].split()[0]
        assert lines[1].split()[0].endswith("query.weight")
        assert lines[2].endswith("  one-element")
        assert lines[-1].endswith((" has all)", "columns more in --format csv)"))


def test_a_wide_terminal_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch, 300)
    assert "l1" in text
    assert "too narrow" not in text


def test_colour_only_on_a_terminal_and_unless_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    broken = replace(ROW, nan=1)
    assert "\x1b" in on_terminal(monkeypatch, 300)
    assert "\x1b[33m" in shown(inspection(broken), "table")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in shown(inspection(broken), "table")


def test_data_goes_to_stdout_and_warnings_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    show_inspections([inspection(ROW, warnings=("odd",), quantized="it is quantised: GPTQ")], "jsonl")
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()][-1].keys() == {"totals"}
    assert err.splitlines() == [
        "noisytune: warning: odd",
        "noisytune: warning: perturb would refuse this checkpoint: it is quantised: GPTQ",
    ]


def test_an_empty_checkpoint_in_every_format() -> None:
    empty = inspection(totals=Totals(0, 0, 0, 0, 0, 0))
    assert json.loads(shown(empty, "json"))["tensors"] == []
    assert len(shown(empty, "jsonl").splitlines()) == 1
    assert len(shown(empty, "csv").splitlines()) == 1
    assert shown(empty, "table").splitlines()[-1].startswith("0 tensors")


def test_of_several_checkpoints_every_row_says_whose_it_is() -> None:
    both = [inspection(ROW), inspection(COPY, id="other")]
    rows = list(csv.DictReader(io.StringIO("".join(render(both, "csv")))))
    assert [(row["id"], row["name"]) for row in rows] == [("model", ROW.name), ("other", COPY.name)]
    lines = [json.loads(line) for line in "".join(render(both, "jsonl")).splitlines()]
    assert [line["id"] for line in lines] == ["model", "model", "other", "other"]
    assert [document["id"] for document in json.loads("".join(render(both, "json")))] == ["model", "other"]
    table = "".join(render(both, "table"))
    assert table.startswith("model\n")
    assert "\n\nother\n" in table


def test_percentiles_are_columns_and_keys() -> None:
    found = inspection(replace(ROW, percentiles={"p1": -1.5, "p99.9": 2.5}), COPY)
    first, second = csv.DictReader(io.StringIO(shown(found, "csv")))
    assert (first["p1"], first["p99.9"], second["p1"]) == ("-1.5", "2.5", "")
    assert json.loads(shown(found, "json"))["tensors"][0]["percentiles"] == {"p1": -1.5, "p99.9": 2.5}
    header, row, *_ = shown(found, "table").splitlines()
    assert "2.5" in row
    assert "p99.9" in header
    assert "p99.9" in shown(found, "html")


def test_the_table_of_many_tensors_is_not_kept(tmp_path: Path) -> None:
    tensors = {f"layer.{n}.weight": weights("F32", 2, 2) for n in range(1000)}
    found = inspect(str(save(tmp_path / "many.safetensors", tensors)), headers_only=True)
    assert len("".join(render([found], "table")).splitlines()) == 1002  # and imports
    tracemalloc.start()
    try:
        for _ in render([found], "table"):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000
