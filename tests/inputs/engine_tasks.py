"""What engines are given to do in tests: functions of a module, as they ask for."""

from __future__ import annotations

from typing import Any


def square(task: dict[str, Any], report: Any) -> dict[str, Any]:
    """Answer with a square."""
    report(task["nbytes"])
    return {"error": None, "square": task["of"] ** 2}
