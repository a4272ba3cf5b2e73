"""Fuzzing of the readers: a few seconds in every run, for FUZZ_SECONDS where that is set (`make fuzz`).

An input that breaks a property is written to FUZZ_FAILURES (the folder `fuzz-failures`), made as small as
hypothesis can, and the test fails; `FUZZ_REPLAY=FILE pytest tests/fuzz -k TARGET` runs one again.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from fuzz import guided, properties
from fuzz.targets import TARGETS

_SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
_REPLAY = os.environ.get("FUZZ_REPLAY")

#: Examples of one batch: what an ordinary run tries.
_EXAMPLES = 100


@pytest.mark.alone
@pytest.mark.timeout(_SECONDS + 300)
@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_refused_or_read(target: str, tmp_path: Path) -> None:
    check, inputs, bounds = TARGETS[target]
    if _REPLAY is not None:
        properties.holds(check, Path(_REPLAY).read_bytes(), tmp_path, bounds)
        return
    accepted = tried = 0

    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(inputs())
    def batch(content: bytes) -> None:
        nonlocal accepted, tried
        tried += 1
        try:
            accepted += properties.holds(check, content, tmp_path, bounds)
        except Exception as error:
            failed = guided.failures() / f"{target}-{type(error).__name__}"
            failed.write_bytes(content)
            error.add_note(f"the input is in {failed}")
            raise

    end = time.monotonic() + _SECONDS / len(TARGETS)
    batch()
    while time.monotonic() < end:
        batch()
    print(f"{target}: {tried:,} inputs, {accepted:,} accepted")
    # A config that is none is another program's, and no reason to refuse the weights.
    assert 0 < accepted <= tried if target == "config" else 0 < accepted < tried
