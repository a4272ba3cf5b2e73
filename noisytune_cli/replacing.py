"""What --overwrite replaces: what noisytune wrote, and weights under a file's name.

A folder's replacement takes with it all that the folder holds, so a name mistyped must not cost anything but
an output. A folder is one where a manifest lies with weights; a manifest without them is a recipe, which may
have been put beside anything. What a killed run left counts for nothing. A single file needs no manifest:
weights that were saved by other means are most often what is to be replaced, in whichever format they are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from noisytune_cli.errors import OutputUnsafe, unwritable
from noisytune_cli.layout import CHUNKS_SUFFIX, MANIFEST, MANIFEST_SUFFIX, WEIGHTS_SUFFIXES
from noisytune_cli.signatures import HEAD
from noisytune_cli.staging import remains

#: How many of the entries that would be lost an error names.
_SHOWN = 3


def contents(folder: Path) -> set[str]:
    """Return the names in an output's folder, without what a killed run to it left."""
    try:
        return set(os.listdir(folder)) - remains(folder, folder)
    except OSError as error:
        raise unwritable(error, folder) from error


def check_folder_replaceable(output: Path, names: Collection[str]) -> None:
    """Raise OutputUnsafe if the folder `output`, which holds `names`, is none that noisytune wrote."""
    others = sorted(set(names) - {MANIFEST})
    if not others:
        return
    shown = ", ".join(others[:_SHOWN])
    if len(others) > _SHOWN:
        shown += f" and {len(others) - _SHOWN:,} more"
    if not _is_file(output / MANIFEST):
        raise _kept(output, f"it has no manifest of noisytune, and with it would go {shown}")
    if not _has_weights(output):
        raise _kept(output, f"its manifest is a recipe, without weights, and with it would go {shown}")


def check_file_replaceable(output: Path) -> None:
    """Raise OutputUnsafe if the file `output` has no manifest, holds no weights and is not empty."""
    from noisytune_cli.formats import safetensors, torch

    if _is_file(output.with_name(output.name + MANIFEST_SUFFIX)):
        return
    try:
        with open(output, "rb", buffering=0) as file:
            head = file.read(HEAD)
    except OSError as error:
        raise unwritable(error, output) from error
    if head and not (safetensors.recognise(head) or torch.recognise(head)):
        raise _kept(output, "it holds no weights, and there is no manifest of noisytune beside it")


def _has_weights(folder: Path) -> bool:
    suffixes = (*WEIGHTS_SUFFIXES, CHUNKS_SUFFIX)
    return any(name.endswith(suffixes) for _, _, files in os.walk(folder) for name in files)


def _is_file(path: Path) -> bool:
    """Tell whether there is a regular file, not a link to one: noisytune writes none."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _kept(output: Path, why: str) -> OutputUnsafe:
    return OutputUnsafe(
        "cannot replace what noisytune did not write",
        path=output,
        why=why,
        next_step="Choose another output with -o, or remove it yourself",
    )
