"""A page in a real browser, where one is found: it loads, sorts, filters, and asks for nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser
from checkpoints import save, weights
from typer.testing import CliRunner

from noisytune_cli.cli.app import app

_HOSTILE = "<script>alert(1)</script>"
_CHANGED = "layers.12.mlp.34.w"

_NAMES = "[...document.querySelectorAll('#rows tbody tr')].map(row => row.cells[0].textContent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of ten thousand tensors."""
    if find_browser() is None:
        pytest.skip("no Chromium here (NOISYTUNE_BROWSER names one)")
    folder = tmp_path_factory.mktemp("page")
    same = weights("F32", 2, seed=1)
    tensors = {f"layers.{i // 100}.mlp.{i % 100}.w": same for i in range(9_999)} | {_HOSTILE: same}
    moved = {**tensors, _CHANGED: weights("F32", 2, seed=3), _HOSTILE: weights("F32", 2, seed=4)}
    a, b = save(folder / "a.safetensors", tensors), save(folder / "b.safetensors", moved)
    result = CliRunner().invoke(app, ["compare", str(a), str(b), "-o", str(folder / "page.html")])
    assert result.exit_code == 0, result.output
    return folder / "page.html"


@pytest.fixture(scope="module")
def opened(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = find_browser()
    assert path is not None
    found = Browser(path, tmp_path_factory.mktemp("profile"))
    try:
        found.open(page)
        yield found
    finally:
        found.close()


@pytest.fixture
def browser(opened: Browser) -> Iterator[Browser]:
    """The page, with nothing filtered; a test that leaves an error in the console fails."""
    opened.evaluate("most = step; input.value = ''; input.dispatchEvent(new Event('input'))")
    yield opened
    assert opened.errors == []


def sort(browser: Browser, column: str) -> str:
    """Click on a column's head, and return how it is sorted now."""
    head = f"[...document.querySelectorAll('#rows th')].find(th => th.textContent == '{column}')"
    browser.evaluate(f"{head}.querySelector('button').click()")
    return str(browser.evaluate(f"{head}.getAttribute('aria-sort')"))


def test_a_page_loads_without_a_word_and_asks_for_nothing(browser: Browser, page: Path) -> None:
    assert browser.requests == [page.as_uri()]
    assert browser.evaluate("rows.length") == 10_000
    assert browser.evaluate("document.scripts.length") == 1


def test_rows_sort_by_a_column_both_ways(browser: Browser) -> None:
    assert sort(browser, "l2") == "ascending"
    assert browser.evaluate(_NAMES)[0] == "layers.0.mlp.0.w"
    assert sort(browser, "l2") == "descending"
    assert set(browser.evaluate(_NAMES)[:2]) == {_CHANGED, _HOSTILE}
    assert sort(browser, "name") == "ascending"
    names = browser.evaluate(_NAMES)
    assert names.index("layers.0.mlp.9.w") + 1 == names.index("layers.0.mlp.10.w")


def test_the_filter_leaves_the_rows_that_have_every_word(browser: Browser) -> None:
    browser.evaluate("input.value = 'LAYERS.12.mlp .34.'; input.dispatchEvent(new Event('input'))")
    assert browser.evaluate(_NAMES) == [_CHANGED]
    assert browser.evaluate("count.textContent") == "1 of 10000 rows"


def test_rows_come_as_they_are_asked_for(browser: Browser) -> None:
    assert len(browser.evaluate(_NAMES)) == 500
    assert browser.evaluate("count.textContent") == "10000 of 10000 rows, the first 500 shown"
    browser.evaluate("more.click()")
    assert len(browser.evaluate(_NAMES)) == 1000


def test_a_cell_of_the_heat_map_tells_by_mouse_and_keyboard(browser: Browser) -> None:
    browser.evaluate("document.querySelector('[data-tip]').focus()")
    assert browser.evaluate("tip.hidden") is False
    assert browser.evaluate("tip.textContent").startswith("layers.0, mlp: ")
    assert browser.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.evaluate("document.activeElement.blur(); hide()")
    over = "dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
    browser.evaluate(f"document.querySelectorAll('[data-tip]')[1].{over}")
    assert browser.evaluate("tip.textContent").startswith("layers.1, mlp: ")


def test_a_narrow_window_and_the_dark_scheme(browser: Browser) -> None:
    images = pytest.importorskip("matplotlib.image")
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", **size)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.call("Emulation.setEmulatedMedia", features=features)
        seen[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        pixels = images.imread(io.BytesIO(browser.screenshot()), format="png")
        assert len({tuple(pixel) for row in pixels[::7, ::3] for pixel in row}) > 5
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}
