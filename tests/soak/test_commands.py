"""A few random commands in every run of the tests; `make soak` tries them by the thousand."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest


@pytest.mark.parametrize("seed", range(12))
def test_a_random_command_does_what_the_reference_does(seed: int, tmp_path: Path) -> None:
    assert commands.try_case(seed, tmp_path, commands.Commands()) == []
