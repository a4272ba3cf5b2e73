"""Places for output, as tests try them."""

from __future__ import annotations

from pathlib import Path

import pytest

from noisytune_cli.checkpoint import Checkpoint
from noisytune_cli.errors import OutputUnsafe
from noisytune_cli.output import check_output, resolve_output


def refused(out: Path | str, source: Checkpoint, *, overwrite: bool = False) -> str:
    """Return the line with which an output is refused, after checking that nothing was touched."""
    with pytest.raises(OutputUnsafe) as caught:
        check_output(resolve_output(str(out), source), source, overwrite=overwrite)
    return str(caught.value)


def old_output(folder: Path, *more: str, weights: str = "model.safetensors") -> Path:
    """Make a folder that looks as if noisytune had written it, with `more` in it."""
    for name in ("noisytune.json", weights, *more):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def accepted(out: Path | str, source: Checkpoint, *, overwrite: bool = False) -> Path:
    output = resolve_output(str(out), source)
    check_output(output, source, overwrite=overwrite)
    return output
