"""What engines are given to do in tests: functions of a module, as they ask for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def square(task: dict[str, Any], report: Any) -> dict[str, Any]:
    """Answer with a square."""
    report(task["nbytes"])
    return {"error": None, "square": task["of"] ** 2}


def halves(task: dict[str, Any], report: Any) -> dict[str, Any]:
    """Report one half, and the other when somebody has seen that."""
    report(task["nbytes"] // 2)
    until = time.monotonic() + 60
    while not Path(task["seen"]).exists() and time.monotonic() < until:
        time.sleep(0.01)
    report(task["nbytes"] // 2)
    return {"error": None}
