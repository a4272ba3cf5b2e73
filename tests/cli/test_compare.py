"""compare on the command line: every format, hostile names, files and exit codes."""

from __future__ import annotations

import csv
import html.parser
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
from checkpoints import Tensor, Tensors, save, weights
from typer.testing import CliRunner, Result

from noisytune_cli.cli import show_compare
from noisytune_cli.cli.app import app
from noisytune_cli.commands.compare import compare
from noisytune_cli.commands.heat_map import HeatMap
from noisytune_cli.errors import OutputUnsafe
from noisytune_cli.output.reports import write_new

A = {
    "layers.0.mlp.up_proj.weight": weights("F32", 30, 8, seed=1),
    "layers.1.mlp.up_proj.weight": weights("F32", 30, 8, seed=2),
    "norm.weight": weights("F32", 8, seed=3, centre=1.0),
}
B = {**A, "layers.1.mlp.up_proj.weight": weights("F32", 30, 8, seed=4), "extra": weights("F32", 2)}
HOSTILE = [
    "<script>alert(1)</script>",
    "<!--",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred",
    "line\nbreak",
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2",
    "@SUM(A1)",
    "{{ 7 * 7 }}",
    "</td></table>",
    "\u202ereversed",
]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(folder: Path, a: Tensors = A, b: Tensors = B) -> tuple[Path, Path]:
    return save(folder / "a.safetensors", a), save(folder / "b.safetensors", b)


class Parsed(html.parser.HTMLParser):
    """What is in a page: its elements with attributes, and the text of each cell of the rows."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._inside = self._cell = False
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._inside = dict(attrs).get("id") == "rows"
        if self._inside and tag == "tr":
            self.rows.append([])
        if self._inside and tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def page(folder: Path, a: Tensors, b: Tensors, *options: object) -> str:
    result = invoke("compare", *files(folder, a, b), "--format", "html", *options)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table_lists_rows_and_what_has_none(tmp_path: Path) -> None:
    result = invoke("compare", *files(tmp_path))
    assert result.exit_code == 0, result.output
    head, *rows, total, lone = result.stdout.splitlines()
    assert head.split()[:2] == ["name", "dtype"]
    assert [row.split()[0] for row in rows] == list(A)
    assert total.startswith("3 compared")
    assert lone == "only in B (1): extra"


def test_json_and_jsonl_have_all(tmp_path: Path) -> None:
    document = json.loads(invoke("compare", *files(tmp_path), "--format", "json").stdout)
    assert [row["name"] for row in document["rows"]] == list(A)
    assert (document["differs"], document["by"], document["renamed"]) == (True, "tensor", None)
    assert document["only_b"] == [{"name": "extra", "dtype": "F32", "shape": [2]}]
    lines = [
        json.loads(line)
        for line in invoke("compare", *files(tmp_path), "--format", "jsonl").stdout.split("\n")
        if line
    ]
    assert lines[:3] == document["rows"]
    assert lines[3] == {"only_b": document["only_b"][0]}
    assert lines[4] == {"totals": document["totals"]}


def test_json_has_a_short_word(tmp_path: Path) -> None:
    a, b = files(tmp_path)
    assert invoke("compare", a, b, "--json").stdout == invoke("compare", a, b, "--format", "json").stdout
    for verb in (["inspect", a], ["compare", a, b]):
        refused = invoke(*verb, "--json", "--format", "csv")
        assert refused.exit_code == 2
        assert "--json and --format csv" in refused.stderr


def test_csv_has_a_status_for_each_row(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(invoke("compare", *files(tmp_path), "--format", "csv").stdout)))
    assert [(row["status"], row["name"]) for row in rows] == [
        *(("compared", name) for name in A),
        ("only-b", "extra"),
        ("total", "TOTAL"),
    ]
    assert float(rows[0]["equal"]) == 1.0


def test_names_in_csv_are_no_formulas_unless_raw(tmp_path: Path) -> None:
    tensors = {name: weights("F32", 4) for name in HOSTILE}
    for options, first in (((), "'"), (("--raw",), "")):
        shown = invoke("compare", *files(tmp_path, tensors, tensors), "--format", "csv", *options).stdout
        names = [row["name"] for row in csv.DictReader(io.StringIO(shown))]
        assert f"{first}=1+1" in names
        assert f"{first}@SUM(A1)" in names
        assert len(names) == len(HOSTILE) + 1


def test_names_stay_text_in_a_page_and_on_a_terminal(tmp_path: Path) -> None:
    tensors = {name: weights("F32", 4) for name in HOSTILE}
    content = page(tmp_path, tensors, {**tensors, "<b>more": weights("F32", 1)})
    parsed = Parsed(content)
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert not {"img", "b"} & {tag for tag, _ in parsed.elements}
    assert all(not key.startswith("on") for _, attributes in parsed.elements for key in attributes)
    names = {row[0] for row in parsed.rows}
    assert {
        "<script>alert(1)</script>",
        "{{ 7 * 7 }}",
        "=1+1",
        r"\x1b[31mred",
        r"line\nbreak".replace("\\n", "\\x0a"),
    } <= names
    table = invoke("compare", *files(tmp_path, tensors, tensors)).stdout
    assert "\x1b" not in table
    assert "\u202e" not in table
    assert len(table.splitlines()) == len(HOSTILE) + 2


def test_a_page_asks_for_nothing_and_stands_alone(tmp_path: Path) -> None:
    content = page(tmp_path, A, B)
    parsed = Parsed(content)
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.elements}
    assert not {"src", "href"} & {key for _, attributes in parsed.elements for key in attributes}
    assert "http" not in content.replace("http-equiv", "")
    assert "url(" not in content
    (policy,) = [a["content"] for tag, a in parsed.elements if a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[\w+/=]+'", policy)
    assert "prefers-color-scheme: dark" in content


def test_the_policy_names_the_very_script(tmp_path: Path) -> None:
    import base64
    import hashlib

    content = page(tmp_path, A, B)
    script = content[content.index("<script>") + len("<script>") : content.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"sha256-{digest}" in content


def test_a_page_has_rows_with_what_they_are_sorted_by(tmp_path: Path) -> None:
    content = page(tmp_path, A, B)
    parsed = Parsed(content)
    head, *rows = parsed.rows
    assert head[0] == "name"
    assert [row[0] for row in rows] == list(A)
    numbers = [a["data-n"] for tag, a in parsed.elements if tag == "td" and "data-n" in a]
    assert "1.0" in numbers
    assert ("td", True) in [(tag, "data-tip" in a) for tag, a in parsed.elements]


def test_ten_thousand_rows_make_a_page(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w": Tensor("F32", weights("F32", 2, seed=1).values) for i in range(10_000)}
    parsed = Parsed(page(tmp_path, tensors, tensors))
    assert len(parsed.rows) == 10_001


def test_every_format_says_whose_noise_the_change_is(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", {"w": weights("F32", 90, 90)})
    assert invoke("perturb", a, "-o", tmp_path / "b.safetensors", "--seed", 7, "-q").exit_code == 0
    said = {}
    for kind in ("table", "json", "jsonl", "csv", "html"):
        asked = invoke("compare", a, tmp_path / "b.safetensors", "--seed", "7-8", "--format", kind)
        assert asked.exit_code == 0, asked.output
        said[kind] = asked.stdout
    lines = said["table"].splitlines()[-2:]
    assert lines[0].startswith("seed 7  yes  λ 0.15")
    assert lines[1].startswith("seed 8  no ")
    entries = json.loads(said["json"])["seeds"]
    assert [(one["seed"], one["found"]) for one in entries] == [("7", True), ("8", False)]
    told = [json.loads(line) for line in said["jsonl"].splitlines()]
    assert [line["seed"] for line in told if "seed" in line] == entries
    rows = [row for row in csv.DictReader(io.StringIO(said["csv"])) if row["status"] == "seed"]
    assert [(row["name"], row["noise"]) for row in rows] == [("7", "uniform"), ("8", "")]
    assert re.search(r"noise of</dt><dd>seed 7  yes  λ 0\.15", said["html"])
    assert "no noise of</dt><dd>seed 8<" in said["html"]


def test_symbols_are_spelt_where_the_encoding_lacks_them(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", {"w": weights("F32", 90, 90)})
    b = tmp_path / "b.safetensors"
    assert invoke("perturb", a, "-o", b, "--seed", 7, "--dtype", "bfloat16", "-q").exit_code == 0
    told = {
        "F32 -> BF16": ["compare", a, b],
        "lambda 0.1": ["detect", b, "--seed", "7"],
        "########": ["inspect", a, "--histogram", "w"],
    }
    for words, arguments in told.items():
        asked = CliRunner(charset="ascii").invoke(app, [str(argument) for argument in arguments])
        assert words in asked.stdout
        assert "\\u" not in asked.stdout


def test_out_is_a_new_file_in_the_format_of_its_ending(tmp_path: Path) -> None:
    out = tmp_path / "report.csv"
    result = invoke("compare", *files(tmp_path), "-o", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert out.read_text().startswith("status,name,")
    again = invoke("compare", *files(tmp_path), "-o", out)
    assert again.exit_code == 5
    assert "a report replaces nothing" in again.stderr


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> object:
        yield "begun"
        raise MemoryError

    with pytest.raises(MemoryError):
        write_new(str(tmp_path / "x"), chunks())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").write_text("mine")
    with pytest.raises(OutputUnsafe):
        write_new(str(tmp_path / "x"), b"theirs")
    assert (tmp_path / "x").read_text() == "mine"


def test_exit_code_8_where_anything_differs(tmp_path: Path) -> None:
    a, b = files(tmp_path)
    assert invoke("compare", a, a, "--exit-code").exit_code == 0
    result = invoke("compare", a, b, "--exit-code")
    assert result.exit_code == 8
    assert "only in B (1): extra" in result.stdout
    assert "the checkpoints differ: b.safetensors: only B has extra" in result.stderr
    assert invoke("compare", a, b, "--exit-code", "--exclude", "extra", "--tolerance", "1").exit_code == 0
    moved = invoke("compare", a, b, "--exit-code", "--exclude", "extra")
    assert "the largest change is 0.0" in moved.stderr


def test_a_prefix_that_was_found_is_said(tmp_path: Path) -> None:
    result = invoke(
        "compare", *files(tmp_path, A, {f"bert.{name}": t for name, t in A.items()}), "--exit-code"
    )
    assert result.exit_code == 0
    assert result.stderr == "names of B are those of A with bert. before\n"


def test_blocks_grow_with_the_change() -> None:
    heat_map = HeatMap(("layers.0", "layers.1"), ("mlp", "norm"), ((0.0, 0.25), (1.0, None)))
    assert list(show_compare.draw_blocks(heat_map)) == [
        "\nchange_norm  mlp  norm\n",
        "layers.0     ···  ░░░░\n",
        "layers.1     ███\n",
        "· no change, ░ to 0.25, ▒ to 0.5, ▓ to 0.75, █ to 1\n",
    ]


def test_a_terminal_gets_blocks_by_layer(tmp_path: Path) -> None:
    found = compare(*map(str, files(tmp_path)), by="layer")
    shown = "".join(show_compare.render(found, "table", blocks=True))
    first, second, _ = shown.splitlines()[-3:]
    assert (first.split()[0], second.split()[0]) == ("layers.0", "layers.1")
    assert "█" in shown
    assert "█" not in "".join(show_compare.render(found, "table"))


@pytest.mark.parametrize(("ending", "beginning"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_plot_is_a_figure(tmp_path: Path, ending: str, beginning: bytes) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        result = invoke("compare", *files(tmp_path), "--plot", tmp_path / f"{name}.{ending}")
        assert result.exit_code == 0, result.output
    content = (tmp_path / f"one.{ending}").read_bytes()
    assert content.startswith(beginning)
    assert content == (tmp_path / f"two.{ending}").read_bytes()


def test_of_many_layers_the_bars_and_the_scale_stay_at_the_top(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from noisytune_cli.cli import plots

    deep = {f"layers.{i}.mlp.up_proj.weight": weights("F32", 4, 4, seed=i) for i in range(80)}
    figure = plots.draw_comparison(compare(*map(str, files(tmp_path, deep, deep))))
    plots.write(str(tmp_path / "deep.png"), figure)  # lays it out
    heat_map, bars, scale = (axes.get_position() for axes in figure.axes)
    assert bars.height < 0.2 * heat_map.height
    assert scale.height < 0.7 * heat_map.height
    assert bars.y1 == pytest.approx(heat_map.y1)
    assert scale.y1 == pytest.approx(heat_map.y1)


def test_a_plot_needs_an_ending_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("compare", *files(tmp_path), "--plot", tmp_path / "x.jpg")
    assert result.exit_code == 2
    assert ".png, .svg or .pdf" in " ".join(result.stderr.split())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = invoke("compare", *files(tmp_path), "--plot", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "pip install '.[plots]' in a clone" in " ".join(result.stderr.split())
