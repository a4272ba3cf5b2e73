"""noisytune and the safetensors package agree on every file, but for the documented differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
from corpus import SAFETENSORS
from differences import documented, words
from malformed import Case, one

from noisytune_cli.checkpoint.formats.safetensors import open_source
from noisytune_cli.errors import NoisytuneError

#: Examples of differences that no row of the corpus is.
_MORE: tuple[Callable[[], bytes], ...] = (one(extra=',"x":"' + "y" * 66_000 + '"'),)


def accepts(content: bytes) -> bool:
    """Whether the package reads the file."""
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def refusal(path: Path, content: bytes) -> str | None:
    """The line with which noisytune refuses the file, or None."""
    path.write_bytes(content)
    try:
        open_source(path, "f", False).close()
    except NoisytuneError as error:
        return error.line()
    return None


@pytest.mark.parametrize(
    "case", [case for case in SAFETENSORS if case.lax is not None], ids=lambda case: ascii(case.name)
)
def test_every_disagreement_is_documented(case: Case, tmp_path: Path) -> None:
    content = case.build()
    line, accepted = refusal(tmp_path / "f", content), accepts(content)
    assert accepted == (case.lax or not case.refused)
    if line is None:
        assert accepted
    elif accepted:
        assert documented(line), line


def test_every_documented_difference_is_one(tmp_path: Path) -> None:
    contents = [case.build() for case in SAFETENSORS if case.lax] + [build() for build in _MORE]
    lines = [refusal(tmp_path / "f", content) or "" for content in contents if accepts(content)]
    assert [word for word in words() if not any(word in line for line in lines)] == []
