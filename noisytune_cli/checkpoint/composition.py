"""Folders that hold several models which work as one: sentence-transformers' modules, diffusers' pipelines.

Each component lies in a folder of its own (the first of sentence-transformers in the root), with weights that
know nothing of the others. Opened together they are one checkpoint: a tensor of a component in a folder is
called FOLDER/KEY, and its noise is named so. A sentence-transformers model is used whole, and is taken whole;
of a pipeline the user says which components.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from noisytune_cli.checkpoint.formats import Sink, Source
from noisytune_cli.checkpoint.index import ShardIndex
from noisytune_cli.checkpoint.layout import Listing, is_no_model, is_plain_name, is_weights
from noisytune_cli.checkpoint.weights import Choice, choose, choose_weights
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.escape import list_some
from noisytune_cli.reading import Reach, read_json
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    from noisytune_cli.checkpoint.formats._direct import Room

#: What lists the components of a sentence-transformers model, and of a pipeline of diffusers.
_MODULES, _PIPELINE = "modules.json", "model_index.json"
#: The files that make a folder a composition, which is all that has to be fetched to know its components.
COMPOSED_BY = (_MODULES, _PIPELINE)

_MAX_BYTES = 1 << 20

#: What a user calls the component in the root, and all of them.
ROOT, ALL = ".", "all"


class Composition(NamedTuple):
    """The folders of the components that have weights ("" is the root), and whether they are used as one."""

    folders: tuple[str, ...]
    whole: bool


def find_composition(root: Path, listing: Listing, reach: Reach | None = None) -> Composition | None:
    """Return what a folder is composed of, None where it is a model of its own."""
    for name, whole in ((_MODULES, True), (_PIPELINE, False)):
        if name in listing.files:
            folders = _listed(root / name, reach, whole)
            found = tuple(folder for folder in sorted(folders) if _has_weights(listing, folder))
            if any(found):
                return Composition(found, whole)
    return None


def choose_components(composition: Composition | None, asked: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the folders of the components that get noise; none where the folder is to be taken as a model.

    `asked` is what --component names.
    """
    if composition is None:
        if asked:
            raise UsageError(
                "--component cannot be used",
                path=where,
                why=f"it has no {' and no '.join(COMPOSED_BY)} that lists components with weights",
                next_step="Leave --component out; --weights chooses among the files of one model",
            )
        return ()
    names = [folder or ROOT for folder in composition.folders]
    if not asked and not composition.whole:
        raise InputInvalid(
            "a pipeline of several models",
            path=where,
            why=f"its components with weights are {list_some(names, len(names))}",
            next_step=f"Name those that are to get noise, with --component={shlex.quote(names[0])} or "
            f"--component={ALL}",
        )
    if not asked or ALL in asked:
        return composition.folders
    for name in asked:
        if name not in names:
            raise UsageError(
                f"--component={shlex.quote(name)}",
                path=where,
                why="there is no such component with weights",
                next_step=f"Choose from {list_some(names, len(names))}, or {ALL}",
            )
    return tuple(folder for folder in composition.folders if (folder or ROOT) in asked)


def inside(listing: Listing, folder: str) -> Listing:
    """Return the listing of a component's folder alone, names relative to it."""
    home = f"{folder}/" if folder else ""

    def names(of: Sequence[str]) -> list[str]:
        return [name[len(home) :] for name in of if posixpath.dirname(name) == folder]

    special = {name: listing.special[home + name] for name in names(tuple(listing.special))}
    return Listing(tuple(names(listing.files)), special)


def choose_inside(listing: Listing, folder: str, where: str, read: Callable[[str], ShardIndex]) -> Choice:
    """Choose the weights of a component, as if its folder were a checkpoint's."""
    name = choose_weights(inside(listing, folder), None, f"{where}/{folder}")
    return choose(listing, posixpath.join(folder, name), where, read)


class Model(NamedTuple):
    """One of the models that a checkpoint holds: its tensors under their own names, and what is said of them.

    `prefix` is what comes before its names in a composition, `folder` where it lies.
    """

    prefix: str
    folder: str
    tensors: tuple[TensorSpec, ...]
    config: Mapping[str, Any] | None


def models_of(
    tensors: Sequence[TensorSpec],
    config: Mapping[str, Any] | None,
    configs: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> tuple[Model, ...]:
    """Return the models whose tensors these are: each is judged by itself, as nobody names them together.

    `configs` are those of the components in folders, by folder; without one there is one model.
    """
    configs = configs or {}
    held: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        folder = posixpath.dirname(tensor.file)
        held.setdefault(folder if folder in configs else "", []).append(tensor)
    return tuple(
        Model(
            prefix := f"{folder}/" if folder else "",
            folder,
            tuple(replace(tensor, name=tensor.name[len(prefix) :]) for tensor in found),
            configs.get(folder, config),
        )
        for folder, found in held.items()
    )


def within(prefix: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what the metadata of all says of one of the models, as its own files say it."""
    end = len(prefix)
    return {
        name[end:]: other[end:] if other.startswith(prefix) else other
        for name, other in metadata.items()
        if name.startswith(prefix)
    }


def in_component(folder: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what metadata of a component says, under the names that its tensors have in the composition."""
    return {f"{folder}/{name}": f"{folder}/{other}" for name, other in metadata.items()}


def judge_of(homes: Sequence[str]) -> Callable[[str], str]:
    """Return what tells which component judges a file (to copy, or a twin): its own, else the first."""

    def judge(name: str) -> str:
        folder = posixpath.dirname(name)
        return folder if folder in homes else homes[0]

    return judge


def _listed(path: Path, reach: Reach | None, whole: bool) -> set[str]:
    """Return the folders that the file lists as components; none where it is another program's."""
    try:
        document = read_json(path, _MAX_BYTES, reach, lenient=True)
    except InputInvalid:
        return set()
    if whole and isinstance(document, list):
        paths = (entry.get("path") for entry in document if isinstance(entry, dict))
        return {path for path in paths if isinstance(path, str) and (path == "" or is_plain_name(path))}
    if whole or not isinstance(document, dict):
        return set()
    return {name for name, value in document.items() if isinstance(value, list) and is_plain_name(name)}


def _has_weights(listing: Listing, folder: str) -> bool:
    names = (*listing.files, *listing.special)
    return any(posixpath.dirname(n) == folder and is_weights(n) and not is_no_model(n) for n in names)


class Component:
    """One weight file of a component, its tensors called FOLDER/KEY (see `formats.Source`)."""

    def __init__(self, inner: Source, folder: str, metadata: Mapping[str, str] | None = None) -> None:
        """`metadata` is what an index says beside the file."""
        prefix = f"{folder}/"
        self._inner, self._prefix = inner, prefix
        self.path, self.name, self.size, self.mode = inner.path, inner.name, inner.size, inner.mode
        self.warnings, self.beside = inner.warnings, inner.beside
        self.tensors = tuple(replace(tensor, name=prefix + tensor.name) for tensor in inner.tensors)
        said = inner.declared
        self.declared = replace(
            said,
            buffers=frozenset(prefix + name for name in said.buffers),
            parameters=frozenset(prefix + name for name in said.parameters),
            pairs=tuple((prefix + a, prefix + b) for a, b in said.pairs),
        )
        self.metadata: Mapping[str, str] = in_component(folder, {**(metadata or {}), **inner.metadata})

    @property
    def files(self) -> tuple[str, ...]:
        """The file's own."""
        return self._inner.files

    @property
    def header_digest(self) -> str:
        """The file's own."""
        return self._inner.header_digest

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """The file's own, under the names here."""
        return tuple(tuple(self._prefix + name for name in names) for names in self._inner.ties)

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        """Return the `len(buffer)` bytes from byte `start` of `tensor`."""
        return self._inner.read(_own(tensor, self._prefix), start, buffer)

    def create_sink(self, path: Path, mode: int = 0o666, room: Room | None = None) -> Sink:
        """Create the file at `path`, which must not exist, with this file's header and empty slots."""
        return _ComponentSink(self._inner.create_sink(path, mode, room), self._prefix)

    def check_unchanged(self) -> None:
        """Raise Mismatch if the file is not what it was at open."""
        self._inner.check_unchanged()

    def check_sums(self) -> None:
        """Raise InputInvalid if what was read so far does not fit the file's checksums."""
        self._inner.check_sums()

    def close(self) -> None:
        """Close the file."""
        self._inner.close()


class _ComponentSink:
    """The sink of such a file (see `formats.Sink`)."""

    def __init__(self, inner: Sink, prefix: str) -> None:
        self._inner, self._prefix = inner, prefix

    def space(self, tensor: TensorSpec, start: int, nbytes: int) -> memoryview | None:
        """Return memory to make in what is written next from byte `start` of `tensor`, None for none."""
        return self._inner.space(_own(tensor, self._prefix), start, nbytes)

    def write(self, tensor: TensorSpec, start: int, buffer: bytes | memoryview) -> None:
        """Write `buffer` from byte `start` of `tensor`."""
        self._inner.write(_own(tensor, self._prefix), start, buffer)

    def finish(self) -> None:
        """Flush and close."""
        self._inner.finish()

    def abort(self) -> None:
        """Close without a promise."""
        self._inner.abort()


def _own(tensor: TensorSpec, prefix: str) -> TensorSpec:
    return replace(tensor, name=tensor.name[len(prefix) :])
