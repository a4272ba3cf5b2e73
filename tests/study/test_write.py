"""What a study leaves: files that agree and are replaced, figures that open and are the same twice."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from noisytune_cli.errors import ResourceExhausted
from noisytune_cli.study.report import plots, results, write

from .records import run, runs, study

KINDS = ("embeddings", "attention", "mlp")


def with_everything() -> list[dict[str, Any]]:
    drift = {kind: {"norm_change": 0.001, "change_norm": 0.02} for kind in KINDS}
    made = [*runs("plain", [0.40, 0.42, 0.39], drift=drift)]
    for lam in (0.1, 0.15, 0.2):
        made += runs("noisytune", [0.41, 0.42 + lam / 10, 0.40], lam=lam, drift=drift)
    made += runs("noisytune", [0.38, 0.41, 0.42], noise="gaussian", scope="global", drift=drift)
    made += runs("mixout", [0.43, 0.42, 0.45]) + runs("noisytune+mixout", [0.44, 0.41, 0.46])
    made += runs("plain", [0.2, 0.25, 0.22], share=0.2)
    return made + runs("noisytune", [0.22, 0.24, 0.26], share=0.2)


def summarise(made: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    return results.summarise(study(made, **others), made)


def test_a_whole_study_has_every_figure_as_png_and_svg(tmp_path: Path) -> None:
    drawn = write.draw(summarise(with_everything()), tmp_path / "figures")
    assert drawn == list(plots.PLOTS)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in drawn for kind in ("png", "svg")
    }
    for name in drawn:
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            image.load()
            assert image.width >= 900
            # Not an empty canvas: it has dark ink and light ground.
            assert image.convert("L").getextrema() == (0, 255)
        svg = (tmp_path / "figures" / f"{name}.svg").read_text()
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "<dc:date>" not in svg


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    summary = summarise([*runs("plain", [0.4, 0.5]), *runs("noisytune", [0.5, 0.5])])
    for folder in ("one", "other"):
        assert write.draw(summary, tmp_path / folder) == ["methods"]
    for kind in ("png", "svg"):
        one, other = ((tmp_path / folder / f"methods.{kind}").read_bytes() for folder in ("one", "other"))
        assert one == other


@pytest.mark.parametrize(
    ("made", "drawn"),
    [
        ([], []),
        (runs("plain", [0.4, 0.5]), []),
        ([run("plain"), run("noisytune")], ["methods"]),
        ([run("noisytune", lam=0.1), run("noisytune", lam=0.2)], ["lambda"]),
        ([run("noisytune"), run("noisytune", noise="gaussian")], ["noise"]),
        ([run("r3f"), run("noisytune+r3f")], ["combinations"]),
        ([run("r3f"), run("r3f", share=0.5)], ["share"]),
        ([run("r3f", drift={"mlp": {"norm_change": 0.0, "change_norm": 0.1}})], ["drift"]),
    ],
)
def test_a_figure_is_there_where_runs_have_what_it_shows(
    made: list[dict[str, Any]], drawn: list[str]
) -> None:
    summary = summarise(made)
    assert [name for name, (plot, _) in plots.PLOTS.items() if plot(summary) is not None] == drawn


def test_figures_say_what_they_are_of() -> None:
    summary = summarise([*runs("plain", [0.40, 0.44]), *runs("noisytune", [0.45, 0.47])])
    figure = plots.methods(summary)
    assert figure is not None
    left, right = figure.axes
    assert left.get_xlabel() == "Matthews correlation × 100, dev"
    assert right.get_xlabel() == "paired difference from plain"
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "plain",
        "noisytune, λ 0.15",
        "vote of 2 plain",
    ]
    assert figure.get_supxlabel() == "minilm on cola; n = 2 seeds; bars: 95 % bootstrap intervals"
    # The mean of the two paired differences, in points, on the row of noisytune.
    means = [line.get_xydata().tolist() for line in right.lines if line.get_marker() == "s"]
    assert means == [[[pytest.approx(4.0), 1.0]]]


def test_names_with_markup_are_drawn_as_they_are(tmp_path: Path) -> None:
    model = {"id": r"$\frac{", "revision": None, "parameters": 1}
    summary = summarise([run("plain"), run("r3f")], model=model)
    assert write.draw(summary, tmp_path) == ["methods"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(ResourceExhausted, match="cannot write"):
        write.draw(summarise([run("plain"), run("r3f")]), tmp_path / "figures")


def test_no_method_is_left_out_or_looks_like_another() -> None:
    made = [
        run(f"method{number}", share=share, dev=0.4 + number / 100)
        for number in range(9)
        for share in (1.0, 0.5)
    ]
    figure = plots.shares(summarise(made))
    assert figure is not None
    (axes,) = figure.axes
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == 9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"method{n}" for n in range(9)]
    assert list(axes.get_xticks()) == [500, 1000]


def test_results_figures_and_report_agree(tmp_path: Path) -> None:
    made = [*runs("plain", [0.40, 0.42]), *runs("noisytune", [0.45, 0.43])]
    results = write.write_outputs(tmp_path, study(made), made)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    report = (tmp_path / "report.md").read_text()
    assert "noisytune (λ 0.15) against plain: +3.00" in report
    for path in ("figures/methods.png", "figures/methods.svg"):
        assert (tmp_path / path).stat().st_size > 1000
    assert "](figures/methods.png)" in report


def test_they_are_replaced_when_more_runs_are_done(tmp_path: Path) -> None:
    made = [*runs("plain", [0.40, 0.42]), *runs("noisytune", [0.45, 0.43])]
    write.write_outputs(tmp_path, study(made), made[:3])
    assert "not finished" in (tmp_path / "report.md").read_text()
    write.write_outputs(tmp_path, study(made), made)
    assert "not finished" not in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.md", "results.json"]
