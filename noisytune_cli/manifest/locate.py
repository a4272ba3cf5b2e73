"""Where an output's manifest lies, and which output a manifest is that of: each is found from the other.

`noisytune.json` is that of the folder it lies in, `NAME.noisytune.json` that of NAME beside it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from noisytune_cli.errors import InputInvalid, InputUnreadable, UsageError, unreadable
from noisytune_cli.manifest.average import read_any_manifest
from noisytune_cli.manifest.previous import begins_a_manifest, of_file
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX, manifest_beside
from noisytune_cli.reading import is_folder, is_there, open_regular


@dataclass(frozen=True)
class Location:
    """Where an output lies, a folder or a file, and where its manifest does."""

    output: Path
    is_folder: bool
    manifest: Path

    def path(self, name: str) -> Path:
        """Return where a recorded file is; a single weight file may bear any name."""
        return self.output / name if self.is_folder else self.output


def place_of(path: str) -> Location:
    """Find the output that a user names by its path or by its manifest's.

    Raises InputUnreadable where there is none, InputInvalid for a manifest that belongs to no output.
    """
    found = _named(path)
    if is_folder(found):
        return Location(found, True, found / MANIFEST)
    beside = manifest_beside(found)
    if is_there(beside) or found.suffix != ".json":
        return Location(found, False, _require_own(found))
    if found.name == MANIFEST:
        return Location(found.parent, True, found)
    if found.name.endswith(MANIFEST_SUFFIX):
        output = found.with_name(found.name.removesuffix(MANIFEST_SUFFIX))
        if not is_there(output):
            raise InputUnreadable(
                "nothing to verify",
                path=output,
                why="its manifest is there, the output is not",
                next_step="Make it from the manifest with replay",
            )
        return Location(output, is_folder(output), found)
    read_any_manifest(found).require_files()
    raise InputInvalid(
        "cannot tell which output the manifest belongs to",
        path=found,
        why=f"it is named neither {MANIFEST} nor NAME{MANIFEST_SUFFIX}",
        next_step="Put it into the output's folder, or beside its file, under such a name",
    )


def manifest_of(path: str) -> Path:
    """Return the path of the manifest that a user names by its path or its output's."""
    found = _named(path)
    if is_folder(found):
        return require_manifest(found / MANIFEST)
    if not is_there(manifest_beside(found)) and (found.suffix == ".json" or _is_manifest(found)):
        return found
    return require_manifest(_require_own(found))


def require_manifest(path: Path) -> Path:
    """Return the path of a manifest; InputUnreadable where nothing lies there."""
    if not is_there(path):
        raise InputUnreadable(
            "no manifest",
            path=path,
            why="noisytune writes it last, so an output without one is unfinished or not noisytune's",
            next_step="Perturb or replay again, or name what has a manifest",
        )
    return path


def _named(path: str) -> Path:
    """Return the path of what a user names; UsageError for an address, and for an empty name."""
    if not path:
        raise UsageError(
            "no output is named", why="its name is empty", next_step="Give one; . is this folder"
        )
    if "://" in path and not is_there(path):
        raise UsageError(
            "a manifest has to be here",
            path=path,
            why="it is an address, and no file or folder here",
            next_step="Copy it here, and name that",
        )
    return Path(os.path.expanduser(path))


def _require_own(file: Path) -> Path:
    """Return where a file's own manifest lies; InputUnreadable where its folder's records it instead."""
    beside = manifest_beside(file)
    if not is_there(beside) and of_file(file) is not None:
        raise InputUnreadable(
            "no manifest of its own",
            path=file,
            why=f"{MANIFEST} beside it records it as one file of the output",
            next_step=f"Name the whole output: {file.parent}",
        )
    return beside


def _is_manifest(file: Path) -> bool:
    """Tell whether a file is a manifest by what it begins with: a recipe may have any name."""
    fd = open_regular(file)
    try:
        return begins_a_manifest(os.read(fd, 4096))
    except OSError as error:
        raise unreadable(error, file) from error
    finally:
        os.close(fd)
