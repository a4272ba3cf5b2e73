"""`docs/methods.md` names every method and every option, with the default that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from noisytune_cli.study import methods

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_every_method_has_a_section() -> None:
    assert set(SECTIONS) - {"ensemble", "Cost"} == set(methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_the_options_are_those_of_the_code(name: str) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`([^`]*)`|\(none\)) \|", SECTIONS[name], re.MULTILINE)
    defaults = methods.load(name).defaults
    expected = [(f"{name}.{key}", str(value)) for key, value in defaults.items()]
    assert rows == [(key, value.lower() if value in ("True", "False") else value) for key, value in expected]
