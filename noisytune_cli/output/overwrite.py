"""What --overwrite replaces: what noisytune wrote, and weights under a file's name.

A folder's replacement takes with it all that the folder holds, so neither a name mistyped nor what was added
since may cost anything but an output. A folder is one where a manifest lies with the weights that it records,
and nothing that it does not; a manifest without them is a recipe, which may have been put beside anything.
What a killed run left counts for nothing. A single file needs no manifest: weights that were saved by other
means are most often what is to be replaced, in whichever format they are. What is in the manifest's place has
to be one. A recipe replaces a recipe only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from noisytune_cli.checkpoint.formats._signatures import HEAD
from noisytune_cli.checkpoint.layout import METADATA
from noisytune_cli.errors import InputInvalid, InputUnreadable, OutputUnsafe, unwritable
from noisytune_cli.escape import list_some
from noisytune_cli.manifest.previous import begins_a_manifest
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX, manifest_beside
from noisytune_cli.output.staging import remains
from noisytune_cli.records import Manifest

#: How many of the entries that would be lost an error names.
_SHOWN = 3

#: Type, inode, and for what is no directory size and times, by the name in what was looked at.
Look = Mapping[str, tuple[int, ...]]

#: What stands at an output's place, and what has the name of its manifest where it is a file.
Seen = tuple[Look | None, Look | None]


def contents(folder: Path) -> set[str]:
    """Return the names in an output's folder, without what a killed run to it left."""
    try:
        return set(os.listdir(folder)) - remains(folder, folder)
    except OSError as error:
        raise unwritable(error, folder) from error


def check_folder_replaceable(output: Path, names: Collection[str]) -> None:
    """Raise OutputUnsafe if the folder `output`, which holds `names`, is none that noisytune wrote.

    So it is too if it holds more than that.
    """
    if not names:
        return
    others = sorted(set(names) - {MANIFEST})
    loss = f"and with it would go {list_some(others or sorted(names), _SHOWN)}"
    if not _is_file(output / MANIFEST):
        raise _kept(output, f"it has no manifest of noisytune, {loss}")
    if not others:
        check_recipe_replaceable(output / MANIFEST)
        return
    try:
        recorded = _read(output / MANIFEST)
    except (InputInvalid, InputUnreadable) as error:
        raise _kept(output, f"its manifest cannot be used ({error.why}), {loss}") from error
    if not _weights_of(recorded, output):
        raise _kept(output, f"its manifest is a recipe, without weights, {loss}")
    if added := _added(output, names, recorded):
        raise _kept(
            output,
            f"it holds more than its manifest records, and with it would go {list_some(added, _SHOWN)}",
            "Move that elsewhere, or choose another output with -o",
        )


def check_file_replaceable(output: Path) -> None:
    """Raise OutputUnsafe if the file `output` has no manifest, holds no weights and is not empty.

    What has the name of its manifest must be one: it would be replaced too.
    """
    from noisytune_cli.checkpoint.formats import safetensors, torch

    check_manifest_replaceable(output)
    head = _head(output)
    if head and not (safetensors.recognise(head) or torch.recognise(head) or _is_recorded(output)):
        raise _kept(output, "it holds no weights, and no manifest of noisytune beside it records it")


def check_manifest_replaceable(output: Path) -> None:
    """Raise OutputUnsafe if what has the name of a file's manifest is none of noisytune, and not empty."""
    beside = manifest_beside(output)
    if _is_file(beside) and (head := _head(beside)) and not begins_a_manifest(head):
        raise _kept(beside, "it has the name of the output's manifest, and is none")


def _is_recorded(output: Path) -> bool:
    """Tell whether the manifest beside a file records one file, of this size; it may have any name."""
    beside = manifest_beside(output)
    try:
        files = _read(beside).output_files if _is_file(beside) else ()
        return len(files) == 1 and files[0].size == output.stat().st_size
    except (InputInvalid, InputUnreadable, OSError):
        return False


def check_recipe_replaceable(output: Path) -> None:
    """Raise OutputUnsafe unless the file `output` is empty, or a manifest whose output is not there.

    Weights whose manifest is replaced have lost their seed and every std.
    """
    head = _head(output)
    if not head:
        return
    if not begins_a_manifest(head):
        raise _kept(output, "it is no manifest of noisytune")
    there = []
    if output.name == MANIFEST:
        try:
            there = _weights_of(_read(output), output.parent)
        except (InputInvalid, InputUnreadable) as error:
            raise _kept(output, f"what it records cannot be told ({error.why})") from error
    elif output.name.endswith(MANIFEST_SUFFIX):
        beside = output.with_name(output.name.removesuffix(MANIFEST_SUFFIX))
        there = [beside.name] if os.path.lexists(beside) else []
    if there:
        raise OutputUnsafe(
            "cannot replace the manifest of an output",
            path=output,
            why=f"what it records lies with it: {list_some(there, _SHOWN)}",
            next_step="Choose another output with -o",
        )


def _read(path: Path) -> Manifest:
    """Return the manifest at `path`; raises as `read_any_manifest`."""
    # Most outputs are new, and should not wait for its readers to be imported.
    from noisytune_cli.manifest.average import read_any_manifest

    return read_any_manifest(path).manifest


def _weights_of(recorded: Manifest, folder: Path) -> list[str]:
    """Return which of the recorded weight files lie in the folder."""
    return [file.name for file in recorded.output_files if _is_file(folder / file.name)]


def _added(output: Path, names: Collection[str], recorded: Manifest) -> list[str]:
    """Return what the folder holds, `names` at its top, that the manifest does not record.

    Of a folder in it that holds nothing recorded, only the folder's own name is given.
    """
    files = {MANIFEST, *(file.name for file in recorded.output_files), *recorded.others}
    files.update(chunk for file in recorded.output_files for chunk in _chunks(output, file.name))
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    added = []
    pending = list(names)
    while pending:
        name = pending.pop()
        try:
            if not stat.S_ISDIR(os.lstat(output / name).st_mode):
                known = name in files
            elif known := name in folders:
                pending += (f"{name}/{inner}" for inner in os.listdir(output / name))
        except OSError as error:
            raise unwritable(error, output) from error
        if not known:
            added.append(name)
    return sorted(added)


def _chunks(folder: Path, name: str) -> tuple[str, ...]:
    """Return the files that a recorded `.metadata` names: the manifest records it in their place."""
    from noisytune_cli.checkpoint.formats import open_source

    if PurePosixPath(name).name != METADATA:
        return ()
    try:
        source = open_source(folder / name, name, mmap=False)
    except (InputInvalid, InputUnreadable):
        return ()
    source.close()
    return source.files


def _head(path: Path) -> bytes:
    """Return a file's first bytes."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(HEAD)
    except OSError as error:
        raise unwritable(error, path) from error


def _is_file(path: Path) -> bool:
    """Tell whether there is a regular file, not a link to one: noisytune writes none."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _kept(
    output: Path, why: str, next_step: str = "Choose another output with -o, or remove it yourself"
) -> OutputUnsafe:
    return OutputUnsafe(
        "cannot replace what noisytune did not write", path=output, why=why, next_step=next_step
    )


def look_at(output: Path) -> Seen:
    """Return what stands at an output's place now: it is asked whether that may be replaced after this."""
    try:
        return look(output), look(manifest_beside(output))
    except OSError as error:
        raise unwritable(error, output) from error


def look(path: Path) -> Look | None:
    """Return what stands at `path`, with all that is in it; None where nothing does.

    An exchange of names cannot ask what it moves. So what is to be replaced is looked at before, and again
    once it is out of the way: it is swapped back if somebody has changed it meanwhile.
    """
    try:
        status = os.lstat(path)
        # A rename changes the ctime of what it renames, and of nothing in it.
        top = _status(status)[:-1] if not stat.S_ISDIR(status.st_mode) else _status(status)
        return {"": top, **dict(_inner(path, "") if stat.S_ISDIR(status.st_mode) else ())}
    except FileNotFoundError:
        return None


def is_top(seen: Look, folder: int) -> bool:
    """Tell whether an open directory is the one that was looked at."""
    return seen[""] == _status(os.fstat(folder))


def _inner(root: Path, folder: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in os.listdir(root / folder):
        path = f"{folder}{name}"
        status = os.lstat(root / path)
        yield path, _status(status)
        if stat.S_ISDIR(status.st_mode):
            yield from _inner(root, f"{path}/")


def _status(status: os.stat_result) -> tuple[int, ...]:
    identity = (stat.S_IFMT(status.st_mode), status.st_ino)
    if stat.S_ISDIR(status.st_mode):
        return identity
    return (*identity, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
