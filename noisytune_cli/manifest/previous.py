"""What an earlier run of noisytune left with a source's weights: the manifest of noise, or of an average.

Noise on noise is rarely meant, so `perturb` asks for --again where a manifest says, or may say, that there
was noise. A file that merely has a manifest's name says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from noisytune_cli.errors import InputInvalid, InputUnreadable
from noisytune_cli.escape import list_some
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX, MAX_BYTES, manifest_beside
from noisytune_cli.reading import is_there, read_chunks

#: Why a file is left out that has a manifest's name and is none.
NAMESAKE = "it has the name of a manifest of noisytune, and is none"

#: What a manifest says it was written by, whatever its version, reformatted too.
_TOOL = rb'"tool"\s*:\s*\{\s*"name"\s*:\s*"noisytune"'

#: How a manifest begins.
_BEGINNING = re.compile(rb'\s*\{\s*"schema"\s*:[^{}]{,40}' + _TOOL)

#: The longest that is looked for across two chunks of a file.
_LONGEST = 256


class PreviousRun(NamedTuple):
    """A manifest that lies with the weights: `what` it makes of the source, `why`, and what to do about it.

    `why` may hold text from files, not yet escaped. `files` are the weight files that it records, None where
    it cannot be read.
    """

    what: str
    why: str
    files: frozenset[str] | None
    next_step: str = "Give the original checkpoint, or pass --again to add noise to this one"


def begins_a_manifest(content: bytes) -> bool:
    """Tell whether these are the first bytes of a manifest of noisytune, whatever its version."""
    return _BEGINNING.match(content) is not None


def _names_the_tool(path: Path) -> bool:
    """Tell whether a file says anywhere that noisytune wrote it: other programs sort the members of JSON."""
    before = b""
    with closing(read_chunks(path, MAX_BYTES)) as chunks:
        for chunk in chunks:
            if re.search(_TOOL, before + chunk):
                return True
            before = (before + chunk)[-_LONGEST:]
    return False


def read_previous(path: Path) -> PreviousRun | None:
    """Return what the file at `path` says of its source, or None where it is no manifest of noisytune."""
    # Most sources have no manifest, and should not wait for its readers to be imported.
    from noisytune_cli.manifest.average import RecordedAverage, read_any_manifest

    name = path.name
    try:
        if not _names_the_tool(path):
            return None
    except InputInvalid:
        return None
    except InputUnreadable:
        return PreviousRun("the source may have been noised before", f"{name} cannot be read", None)
    try:
        recorded = read_any_manifest(path)
    except (InputInvalid, InputUnreadable) as error:
        why = f"its manifest {name} cannot be used ({error.why})"
        return PreviousRun("the source may have been noised before", why, None)
    files = frozenset(file.name for file in recorded.manifest.output_files)
    if isinstance(recorded, RecordedAverage):
        members = list_some([source.id for _, source in recorded.average.members])
        why = f"its manifest {name} has the mean of {members}, and does not say whether these were noised"
        return PreviousRun("the source is an average", why, files, "Pass --again to add noise to it")
    why = f"its manifest {name} says so, and noise on noise is rarely meant"
    return PreviousRun("the source was noised before", why, files)


def of_folder(
    root: Path, names: Iterable[str], weights: Collection[str]
) -> tuple[PreviousRun | None, frozenset[str]]:
    """Return what the files with a manifest's name say of a folder's weights, and which are no manifests.

    `noisytune.json` is about the folder, `NAME.noisytune.json` about a weight file of that name.
    """
    found = {name: read_previous(root / name) for name in names}
    about = {MANIFEST, *(name + MANIFEST_SUFFIX for name in weights)}
    earlier = next((said for name, said in found.items() if said is not None and name in about), None)
    return earlier, frozenset(name for name, said in found.items() if said is None)


def of_file(path: Path) -> PreviousRun | None:
    """Return what a manifest beside a weight file says of it: its own, or the folder's that records it."""
    own, folder = manifest_beside(path), path.with_name(MANIFEST)
    # Asked first: `is_file` raises where the file's name is so long that no manifest's has room.
    if is_there(own) and own.is_file() and (said := read_previous(own)) is not None:
        return said
    said = read_previous(folder) if folder.is_file() else None
    return said if said is not None and path.name in (said.files or ()) else None
