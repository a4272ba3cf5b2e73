"""perturb, as tests call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from noisytune_cli.commands.perturb import Perturbed, Request, perturb
from noisytune_cli.records import NoiseSpec


def run(
    source: Path, out: Path | str | None = None, noise: NoiseSpec | None = None, **options: Any
) -> Perturbed:
    """Perturb, by default to `out` beside the source; options are those of the request and of perturb."""
    asked = {key: options.pop(key) for key in ("weights", "mmap", "again", "conversion") if key in options}
    request = Request(str(source), noise or NoiseSpec(), **asked)
    return perturb(request, str(out or source.parent / "out"), **options)
