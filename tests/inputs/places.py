"""Places for output, as tests try them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from noisytune_cli import __version__
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.errors import OutputUnsafe
from noisytune_cli.manifest.write import encode
from noisytune_cli.output.destination import check_output, resolve_output
from noisytune_cli.records import FileRecord, Manifest, NoiseSpec, SourceRecord


def refused(out: Path | str, source: Checkpoint, *, overwrite: bool = False) -> str:
    """Return the line with which an output is refused, after checking that nothing was touched."""
    with pytest.raises(OutputUnsafe) as caught:
        check_output(resolve_output(str(out), source), source, overwrite=overwrite)
    return str(caught.value)


def old_manifest(*weights: str, copied: Iterable[str] = ()) -> bytes:
    """Return a manifest that records these weight files, and others that were copied."""
    digest = f"blake3:{64 * '0'}"
    source = SourceRecord("old", None, tuple(FileRecord(name, 10, digest) for name in weights))
    others = tuple((name, digest) for name in copied)
    return encode(Manifest("noisytune", __version__, source, NoiseSpec(), (), others))


def old_output(folder: Path, *copied: str, weights: str = "model.safetensors") -> Path:
    """Make a folder that looks as if noisytune had written it, with `copied` in it."""
    for name in (weights, *copied):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "noisytune.json").write_bytes(old_manifest(weights, copied=copied))
    return folder


def accepted(out: Path | str, source: Checkpoint, *, overwrite: bool = False) -> Path:
    output = resolve_output(str(out), source)
    check_output(output, source, overwrite=overwrite)
    return output
