"""The documented differences from the safetensors package, read from `docs/differences.md`.

The document is the list: each row of its table gives, in its first column, words of the line with which
noisytune refuses what the package accepts. A refusal without any of them is a difference nobody decided on.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

_DOCUMENT = Path(__file__).parents[2] / "docs" / "differences.md"
_ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


@functools.cache
def words() -> tuple[str, ...]:
    """The words of every documented refusal."""
    return tuple(_ROW.findall(_DOCUMENT.read_text(encoding="utf-8")))


def documented(line: str) -> bool:
    """Whether an error line is that of a documented difference."""
    return any(word in line for word in words())
