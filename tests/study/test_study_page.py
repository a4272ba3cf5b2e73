"""A study as a page: all that report.md says, its figures inside, and names that stay text."""

from __future__ import annotations

import base64
import html
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser

from noisytune_cli.cli import show_study
from noisytune_cli.cli.study_page import study_page
from noisytune_cli.study.report import write

from .records import run, runs, study
from .test_write import with_everything

HOSTILE = "<script>alert(1)</script> [x](https://example.org) ![y](https://example.org/y.png) $z$ |"


def page(folder: Path, made: list[dict[str, Any]], **others: Any) -> str:
    """Write a study's outputs and return its page."""
    results = write.write_outputs(folder, study(made, **others), made)
    return "".join(study_page(results, folder, show_study.COLUMNS, show_study.study_rows(results)))


def test_a_page_has_the_report_and_its_figures(tmp_path: Path) -> None:
    content = page(tmp_path, with_everything())
    report = (tmp_path / "report.md").read_text()
    shown = html.unescape(re.sub(r"<[^>]+>", "", content))
    for heading in re.findall(r"^## (.+)$", report, re.MULTILINE):
        assert f"<h2>{heading}</h2>" in content
    for line in report.splitlines():
        if line.startswith("- "):
            assert line[2:].replace("\\", "").replace("**", "") in shown
    images = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)">', content)
    assert len(images) == len(list((tmp_path / "figures").glob("*.svg"))) == report.count("![")
    for caption, data in images:
        assert "n = " in caption or "L1" in caption
        assert ET.fromstring(base64.b64decode(data)).tag == "{http://www.w3.org/2000/svg}svg"


def test_rows_have_the_numbers_that_they_are_sorted_by(tmp_path: Path) -> None:
    content = page(tmp_path, [*runs("plain", [0.40, 0.42]), *runs("noisytune", [0.35, 0.33])])
    (row,) = re.findall(r'<tr><td class="name">noisytune</td>.*?</tr>', content)
    numbers = [float(number) for number in re.findall(r'data-n="([^"]+)"', row)]
    assert numbers[:4] == [0.15, 2.0, 34.0, -7.0]
    many = [*runs("plain", [0.4] * 16), *runs("noisytune", [0.5] * 16)]
    (row,) = re.findall(r'<tr><td class="name">noisytune</td>.*?</tr>', page(tmp_path, many))
    assert re.findall(r'data-n="([^"]+)"[^>]*>&lt; 0.0001<', row) == ["0.0001"] * 2


def test_a_page_asks_for_nothing_and_names_stay_text(tmp_path: Path) -> None:
    made = [run("plain"), run("noisytune", dev=0.6)]
    for one in made:
        one["options"] = {"m.x": HOSTILE}
    content = page(tmp_path, made, task=HOSTILE)
    without_images = re.sub(r'src="data:[^"]*"', "", content)
    assert len(re.findall(r"<script", content)) == 1
    assert not re.search(r"(?:src|href)\s*=", without_images)
    assert "default-src 'none'; img-src data:;" in content
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in content


def test_html_in_a_report_is_not_passed_on(tmp_path: Path) -> None:
    page(tmp_path, [run("plain")])
    (tmp_path / "report.md").write_text(
        "# a\n\n<b>bold</b> ![lost](figures/../../x.png)\n\n<script>x</script>\n"
    )
    results = write.summarise(study([run("plain")]), [run("plain")])
    content = "".join(study_page(results, tmp_path, show_study.COLUMNS, iter(())))
    assert "&lt;b&gt;bold&lt;/b&gt; lost" in content
    assert "&lt;script&gt;x&lt;/script&gt;" in content


def test_a_study_without_runs_has_a_page(tmp_path: Path) -> None:
    made = [run("plain"), run("noisytune")]
    results = write.write_outputs(tmp_path, study(made), [])
    content = "".join(study_page(results, tmp_path, show_study.COLUMNS, show_study.study_rows(results)))
    assert "No run is finished." in content


def test_a_page_in_a_browser_sorts_filters_and_fits_400_pixels(tmp_path: Path) -> None:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium here (NOISYTUNE_BROWSER names one)")
    file = tmp_path / "report.html"
    file.write_text(page(tmp_path, with_everything()), encoding="utf-8")
    browser = Browser(path, tmp_path / "profile")
    try:
        browser.open(file)
        assert [one for one in browser.requests if not one.startswith("data:")] == [file.as_uri()]
        scores = "[...document.querySelectorAll('#rows tbody tr')].map(row => row.cells[3].dataset.n)"
        head = "[...document.querySelectorAll('#rows th')].find(th => th.textContent == 'mean ± std')"
        browser.evaluate(f"{head}.querySelector('button').click()")
        found = [float(score) for score in browser.evaluate(scores) if score is not None]
        assert found == sorted(found)
        assert len(found) > 3
        browser.evaluate("input.value = 'mixout against'; input.dispatchEvent(new Event('input'))")
        assert browser.evaluate("body.rows.length") == 1
        assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 100)")
        size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **size)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        assert len(browser.screenshot()) > 10_000
        assert browser.errors == []
    finally:
        browser.close()
