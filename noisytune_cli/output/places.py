"""The outputs of one run of perturb: where they go, all of them or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.output.convert import OutputFile, resolve_rewritten
from noisytune_cli.output.destination import (
    check_distinct,
    check_folder,
    check_output,
    check_recipe,
    resolve_folder,
    resolve_recipe,
)


def check_places(
    source: Checkpoint,
    files: Sequence[OutputFile],
    outs: Sequence[str],
    *,
    recipe_only: bool,
    overwrite: bool,
) -> list[Path]:
    """Return where the outputs go; raises unless all of them may be written there.

    `files` are their weight files where they are not like the source's.
    """
    if recipe_only:
        outputs = [resolve_recipe(out) for out in outs]
    else:
        outputs = [resolve_rewritten(out, source, files, convertible=True) for out in outs]
    for output in outputs:
        (check_recipe if recipe_only else check_output)(output, source, overwrite=overwrite)
    check_distinct(outputs)
    return outputs


def check_places_of_download(outs: Sequence[str], *, recipe_only: bool, overwrite: bool) -> None:
    """Raise what `check_places` would for outputs of a hub's model, a folder, before that is downloaded."""
    outputs = [(resolve_recipe if recipe_only else resolve_folder)(out) for out in outs]
    for output in outputs:
        (check_recipe if recipe_only else check_folder)(output, overwrite=overwrite)
    check_distinct(outputs)
