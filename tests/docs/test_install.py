"""Lines that install noisytune without torch name all else that it depends on."""

from __future__ import annotations

import re
import tomllib

import pytest
from pages import PAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = {re.split(r"[><=]", requirement)[0] for requirement in PROJECT["dependencies"]} - {"torch"}
LINES = [
    (page, found[1].split())
    for page, path in PAGES.items()
    for found in re.finditer(
        r"pip install (?:--no-cache-dir )?(safetensors[\w ]*)$",
        path.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
]


@pytest.mark.parametrize(("page", "named"), LINES)
def test_every_package_but_torch_is_named(page: str, named: list[str]) -> None:
    assert set(named) == NEEDED
    assert len(named) == len(NEEDED)


def test_such_lines_are_found() -> None:
    assert {page for page, _ in LINES} == {"README.md", "containers.md"}
