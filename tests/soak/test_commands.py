"""A few random commands in every run of the tests; `make soak` tries them by the thousand."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest

#: One whose mixture could overflow on the way, though what it comes to could not.
OVERFLOWING = 230001000234


@pytest.mark.parametrize("seed", [*range(12), OVERFLOWING])
def test_a_random_command_does_what_the_reference_does(seed: int, tmp_path: Path) -> None:
    assert commands.try_case(seed, tmp_path, commands.Commands()) == []


def test_who_stops_the_long_runs_stops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that ends with the code of SIGINT has broken nothing."""

    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("noisytune_cli.commands.inspect.inspect", stopped)
    with pytest.raises(KeyboardInterrupt):
        commands.Commands().run("inspect", "nothing")
