"""Where output may go: asked before any weight is read.

Refused are an output that exists (unless it is to be replaced, and `output/overwrite.py` allows it), one that
is, holds or lies in the input or the hub's cache (compared by device and inode, so that links, `..` and bind
mounts do not hide it), and one that is no regular file or directory. Whether it fits, `output/space.py` asks.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from noisytune_cli.checkpoint.address import Address, Place, has_scheme, is_address
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.formats.safetensors import SafetensorsSource
from noisytune_cli.checkpoint.ids import cache_folder
from noisytune_cli.checkpoint.layout import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from noisytune_cli.errors import OutputUnsafe, UsageError, unwritable
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX, manifest_beside
from noisytune_cli.output.convert import OutputFile, check_names, output_name
from noisytune_cli.output.overwrite import (
    check_file_replaceable,
    check_folder_replaceable,
    check_manifest_replaceable,
    check_recipe_replaceable,
    contents,
)
from noisytune_cli.output.publish import exists
from noisytune_cli.output.staging import remains
from noisytune_cli.records import Conversion

#: Device and inode.
_Identity = tuple[int, int]

#: A repository's folder in the hub's cache.
_CACHED_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.")


def check_places(
    source: Checkpoint,
    files: Sequence[OutputFile],
    outs: Sequence[str],
    *,
    recipe_only: bool,
    overwrite: bool,
) -> list[Place]:
    """Return where the outputs go; raises unless all of them may be written there.

    `files` are their weight files where they are not like the source's.
    """
    check_names(source, files)
    outputs = [find_place(out, source, files, recipe_only=recipe_only) for out in outs]
    for output in outputs:
        (check_recipe if recipe_only else check_output)(output, source, overwrite=overwrite)
    check_distinct(outputs)
    return outputs


def find_place(out: str, source: Checkpoint, files: Sequence[OutputFile], *, recipe_only: bool) -> Place:
    """Return the absolute path of an output that a user names `out`."""
    return resolve_recipe(out) if recipe_only else resolve_rewritten(out, source, files, convertible=True)


def check_places_of_download(
    outs: Sequence[str], *, is_file: bool, recipe_only: bool, overwrite: bool
) -> list[Place]:
    """Do as `check_places` for outputs of what is fetched, before it is.

    Where that `is_file`, an output in a folder is not asked about: its name is known when the file is.
    """
    if is_file and not recipe_only:
        outs = [out for out in outs if not out.endswith("/")]
    outputs = [(resolve_recipe if recipe_only else resolve_folder)(out) for out in outs]
    check = check_recipe if recipe_only else check_file if is_file else check_folder
    for output in outputs:
        check(output, overwrite=overwrite)
    check_distinct(outputs)
    return outputs


def resolve_rewritten(
    out: str, source: Checkpoint, files: Sequence[OutputFile] = (), *, convertible: bool = False
) -> Place:
    """Return the output's absolute path (`resolve_output`); a single file keeps a fitting name.

    UsageError where the name of a single file promises the other format; `convertible` tells that the verb
    has --to.
    """
    if not source.single_file:
        return resolve_output(out, source)
    (file,) = source.sources
    if files or isinstance(file, SafetensorsSource):
        if out.endswith(PICKLE_SUFFIXES):
            raise _wrong_ending(out, "safetensors", f"Give a name that ends in {SAFETENSORS_SUFFIX}")
    elif out.endswith(SAFETENSORS_SUFFIX):
        own = file.path.suffix if file.path.suffix in PICKLE_SUFFIXES else PICKLE_SUFFIXES[0]
        advice = "Add --to=safetensors, or give" if convertible else "Give"
        raise _wrong_ending(out, "a pickle, as the source is", f"{advice} a name that ends in {own}")
    if not files:
        return resolve_output(out, source)
    return resolve_output(out, source, output_name(file.path.name, Conversion(format="safetensors")))


def resolve_output(out: str, source: Checkpoint, name_in_folder: str | None = None) -> Place:
    """Return the output's absolute path; for a single file and an `out` that ends in `/`, a file in it.

    That bears the source's name, or `name_in_folder`.
    """
    path = resolve_folder(out)
    if source.single_file and out.endswith("/"):
        return path / (name_in_folder or source.sources[0].path.name)
    return path


def check_name(out: str) -> None:
    """Raise UsageError for a name that is empty, or the address of a store that there is none of."""
    if not out:
        raise UsageError(
            "the output's name is empty",
            why="it names no file or folder",
            next_step="Give one; . is this folder",
        )
    if has_scheme(out) and not is_address(out):
        raise UsageError(
            "cannot write there",
            path=out,
            why="addresses begin with s3://, gs:// or az://",
            next_step="Write it so, or put ./ before the name of a folder here",
        )


def resolve_folder(out: str) -> Place:
    """Return the absolute path of an output whose name is `out`, whatever it ends in; or its address."""
    check_name(out)
    if is_address(out):
        return Address(out)
    expanded = os.path.expanduser(out)
    folder, name = os.path.split(expanded.rstrip("/"))
    # Links in the folder are resolved as the kernel would (`link/..` is not `.`), the last name is kept.
    plain = name not in ("", ".", "..")
    try:
        return Path(os.path.realpath(folder or ".")) / name if plain else Path(os.path.realpath(expanded))
    except FileNotFoundError as error:  # the current directory was removed
        raise unwritable(error, out) from error


def resolve_recipe(out: str) -> Place:
    """Return a recipe's absolute path: `out` itself, or a manifest in it where it names a folder."""
    folder = out.endswith("/") or os.path.isdir(os.path.expanduser(out))
    return resolve_folder(os.path.join(out, MANIFEST) if folder else out)


def check_output(output: Place, *sources: Checkpoint, overwrite: bool, manifest: Path | None = None) -> None:
    """Raise OutputUnsafe unless `output` can be written without touching anything that must stay.

    It is a file where the first of `sources` is one, else a directory. What --overwrite cannot replace is
    told before that something is there. A file's `manifest` may lie there, where it will be that very one.
    """
    if sources[0].single_file:
        check_file(output, *sources, overwrite=overwrite, manifest=manifest)
    else:
        check_folder(output, *sources, overwrite=overwrite)


def check_file(output: Place, *sources: Checkpoint, overwrite: bool, manifest: Path | None = None) -> None:
    """Raise OutputUnsafe unless the file `output` can be written, as `check_folder` does."""
    if isinstance(output, Address):
        _check_in_store(output, sources, is_file=True, overwrite=overwrite)
        return
    mode = _mode(output)
    _check_kind(output, mode, single_file=True)
    _check_apart(output, sources, replaces=False, single_file=True)
    _check_old_file(output, mode, overwrite, manifest)


def check_folder(output: Place, *sources: Checkpoint, overwrite: bool) -> None:
    """Raise OutputUnsafe unless the directory `output` can be written, as far as these sources tell.

    They need not be there yet: what is downloaded goes to the hub's cache, where no output may lie.
    """
    if isinstance(output, Address):
        _check_in_store(output, sources, is_file=False, overwrite=overwrite)
        return
    mode = _mode(output)
    _check_kind(output, mode, single_file=False)
    names = contents(output) if mode is not None else set()
    replaces = mode is not None and (overwrite or bool(names))
    _check_apart(output, sources, replaces=replaces, single_file=False)
    if replaces:
        if os.path.ismount(output):
            raise _unsafe(output, "it is a mount point, which cannot be replaced")
        check_folder_replaceable(output, names)
        if not overwrite:
            raise exists(output)


def _check_apart(output: Path, sources: Sequence[Checkpoint], *, replaces: bool, single_file: bool) -> None:
    """Raise OutputUnsafe if `output`, a file where `single_file`, is or lies in what must stay.

    Nor must it hold any of that where it is a folder and `replaces` another.
    """
    inputs, caches = _protected(sources)
    cache = cache_folder()
    for ancestor in _ancestors(output):
        if _identity(ancestor) in inputs:
            raise _unsafe(output, "it is the input, or lies in the input")
        # By its name too: the cache need not be there yet.
        if ancestor == cache or _identity(ancestor) in caches:
            raise _unsafe(output, "it is the hub's cache, or lies in it")
    if replaces and not single_file:
        ours = _identity(output)
        for what, path in (*_inhabited(), *(("the input", path) for path in _paths(sources))):
            if _identity(path) is not None and any(_identity(above) == ours for above in _ancestors(path)):
                raise _unsafe(output, f"{what} lies in it")
    if not single_file:
        return
    files = {_identity(file.path) for source in sources for file in source.sources}
    for path in (output, manifest_beside(output)):
        if _identity(path) in files:
            raise _unsafe(output, "it is the input, or a link to it")


def check_recipe(output: Place, *sources: Checkpoint, overwrite: bool) -> None:
    """Raise OutputUnsafe unless the manifest `output` can be written alone, as `check_folder` does."""
    if isinstance(output, Address):
        _check_in_store(output, sources, is_file=True, overwrite=overwrite)
        return
    mode = _mode(output)
    if mode is not None and not stat.S_ISREG(mode):
        raise _unsafe(output, "it is not a regular file")
    _check_apart(output, sources, replaces=False, single_file=True)
    for source in sources:
        if source.single_file and _identity(output.parent) == _identity(source.root):
            weights = source.sources[0].path
            if output.name in (MANIFEST, weights.name + MANIFEST_SUFFIX):
                raise _unsafe(output, "there it would say that the input was noised")
    if mode is not None:
        check_recipe_replaceable(output)
        if not overwrite:
            raise exists(output)


def _check_in_store(
    output: Address, sources: Sequence[Checkpoint], *, is_file: bool, overwrite: bool
) -> None:
    from noisytune_cli.output.remote import check_in_store  # most outputs are here

    check_in_store(output, *sources, is_file=is_file, overwrite=overwrite)


def check_distinct(outputs: Sequence[Place]) -> None:
    """Raise OutputUnsafe where one of a run's outputs is, or lies in, another."""
    places: set[Place] = set()
    for output in outputs:
        if output in places:
            raise _unsafe(output, "two outputs of this run would be written there")
        places.add(output)
    for output in outputs:
        if holder := next((place for place in output.parents if place in places), None):
            raise _unsafe(output, f"it lies in {holder}, another output of this run")


def _mode(path: Path) -> int | None:
    """Return the mode of what is there, a link itself; None where nothing is."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unwritable(error, path) from error


def _check_kind(output: Path, mode: int | None, single_file: bool) -> None:
    """Raise OutputUnsafe if what is there, of `mode`, is of a kind that is never replaced."""
    if single_file and (beside := _mode(manifest_beside(output))) is not None and stat.S_ISDIR(beside):
        raise _unsafe(manifest_beside(output), "it is a directory, and the manifest's place")
    if mode is None:
        return
    if stat.S_ISLNK(mode):
        raise _unsafe(output, "it is a symbolic link, which would be replaced or followed")
    if stat.S_ISDIR(mode):
        if single_file:
            raise _unsafe(output, "it is a directory; --out=DIR/ writes a file inside one")
    elif not stat.S_ISREG(mode):
        raise _unsafe(output, "it is neither a regular file nor a directory")
    elif not single_file:
        raise _unsafe(output, "it is a file; a directory is to be written")


def _check_old_file(output: Path, mode: int | None, overwrite: bool, manifest: Path | None) -> None:
    """Raise OutputUnsafe unless the file that is there, or its manifest, may be replaced, and is to be.

    Where its manifest alone is there, and is `manifest`, it stays.
    """
    there = output
    if mode is None:
        there = manifest_beside(output)
        if manifest is not None and not os.path.islink(there) and _identity(there) == _identity(manifest):
            return
        check_manifest_replaceable(output)
    elif output.name in remains(output.parent, output):
        return
    else:
        check_file_replaceable(output)
    if not overwrite and os.path.lexists(there):
        raise exists(there)


def _protected(sources: Sequence[Checkpoint]) -> tuple[set[_Identity], set[_Identity]]:
    """Return the identities of the directories that no output may lie in: inputs, and the hub's caches.

    Beside the cache that the environment names these are the repositories that a source lies in, wherever
    they are.
    """
    inputs = {source.root for source in sources if not source.single_file}
    cache = cache_folder()
    caches = set() if cache is None else {cache}
    for path in _paths(sources):
        for spelling in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
            caches.update(p for p in spelling.parents if _CACHED_REPOSITORY.match(p.name))
    return _identities(inputs), _identities(caches)


def _paths(sources: Sequence[Checkpoint]) -> Iterator[Path]:
    """Yield the folder and the weight files of each source."""
    for source in sources:
        yield source.root
        yield from (file.path for file in source.sources)


def _inhabited() -> Iterator[tuple[str, Path]]:
    """Yield what is never replaced with the folder it lies in, as far as there is any."""
    with contextlib.suppress(FileNotFoundError):
        yield "the current directory", Path.cwd()
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        yield "the home directory", Path(home)
    cache = cache_folder()
    if cache is not None:
        yield "the hub's cache", cache


def _ancestors(path: Path) -> Iterator[Path]:
    """Yield the path with its links resolved, and every directory above it."""
    real = Path(os.path.realpath(path))
    yield from (real, *real.parents)


def _identity(path: Path) -> _Identity | None:
    """Return (device, inode) of what the path leads to, or None."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _identities(paths: Iterable[Path]) -> set[_Identity]:
    return {identity for path in paths if (identity := _identity(path)) is not None}


def _wrong_ending(out: str, written: str, next_step: str) -> UsageError:
    return UsageError(
        "--out has the wrong ending",
        path=out,
        why=f"what is written is {written}, and loaders go by the name",
        next_step=next_step,
    )


def _unsafe(output: Place, why: str) -> OutputUnsafe:
    return OutputUnsafe("cannot write there", path=output, why=why, next_step="Choose another output with -o")
