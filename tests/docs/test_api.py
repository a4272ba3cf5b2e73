"""The reference of the Python API: what its page names is there, and what is public is on it."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from pages import PAGES

import noisytune_cli
from noisytune_cli import errors

NAMED = re.findall(r"^::: (\S+)$", PAGES["api.md"].read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_is_there_and_documented(name: str) -> None:
    pytest.importorskip("transformers")
    module, _, own = name.rpartition(".")
    assert inspect.getdoc(getattr(importlib.import_module(module), own))


def test_every_public_name_is_on_the_page() -> None:
    public = {f"noisytune_cli.{name}" for name in noisytune_cli.__all__} - {"noisytune_cli.__version__"}
    assert public <= set(NAMED)
    raised = {
        f"{errors.__name__}.{name}"
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.NoisytuneError)
    }
    assert raised <= set(NAMED)
