"""One sandbox and one warm server for all fault tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import strace
from scenarios import Expected, Scenario, learn, scenarios
from warm import Warm

NAMES = ("folder", "empty-folder", "replaced-folder", "file", "replaced-file")


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def all_scenarios(sandbox: Path) -> dict[str, Scenario]:
    return {scenario.name: scenario for scenario in scenarios(sandbox)}


@pytest.fixture(scope="session")
def warm(sandbox: Path, all_scenarios: dict[str, Scenario]) -> Iterator[Warm]:
    for scenario in all_scenarios.values():
        scenario.reset()
    with Warm(sandbox, [scenario.argv for scenario in all_scenarios.values()]) as server:
        yield server


@pytest.fixture(params=NAMES)
def scenario(request: pytest.FixtureRequest, all_scenarios: dict[str, Scenario]) -> Scenario:
    return all_scenarios[request.param]


@pytest.fixture
def expected(scenario: Scenario, warm: Warm) -> Expected:
    return learn(scenario, warm)


@pytest.fixture
def log(sandbox: Path, warm: Warm, all_scenarios: dict[str, Scenario]) -> Path:
    """Where strace writes; skips where there is no strace, or it may not attach."""
    if why := strace.available():
        pytest.skip(why)
    path = sandbox / "strace.log"
    try:
        strace.trace(warm, ["--version"], path)
    except RuntimeError as error:
        pytest.skip(str(error))
    return path
