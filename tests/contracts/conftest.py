"""What the contracts are tried on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from levels import LEVELS, cpu_at

from noisytune_cli.errors import NoisytuneError
from noisytune_cli.noise import devices
from noisytune_cli.noise.devices import Device


@pytest.fixture(scope="module", params=[*devices.names(), *(f"cpu at {level}" for level in LEVELS[:-1])])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Yield every device that is here, and the CPU at each lower level of its instructions."""
    if request.param.startswith("cpu at "):
        with cpu_at(request.param.removeprefix("cpu at ")) as cpu:
            yield cpu
        return
    try:
        yield devices.load(request.param).open_device(request.param)
    except (ImportError, NoisytuneError) as error:
        pytest.skip(f"{request.param} is not here: {error}")
