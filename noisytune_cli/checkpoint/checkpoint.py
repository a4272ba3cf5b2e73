"""From what the user typed to an open checkpoint, local or on the hub.

What begins with `.`, `/` or `~`, or exists, is local and never reaches the hub. Both ways end in the same
place: a folder, the names in it, and the rules of `checkpoint/weights.py` and `checkpoint/layout.py`. Opening
reads headers and small files only; if anything is wrong all that was opened is closed again.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from noisytune_cli.checkpoint import hub
from noisytune_cli.checkpoint.composition import (
    Component,
    choose_components,
    choose_inside,
    find_composition,
    judge_of,
)
from noisytune_cli.checkpoint.config import CONFIG, ConfigCheck, look_at_config, read_adapter, read_config
from noisytune_cli.checkpoint.folder import list_folder
from noisytune_cli.checkpoint.formats import Source, open_source
from noisytune_cli.checkpoint.ids import no_source
from noisytune_cli.checkpoint.index import ShardIndex, check_tensors, read_index
from noisytune_cli.checkpoint.layout import (
    CHUNKS_SUFFIX,
    METADATA,
    OTHER_WEIGHTS,
    Listing,
    arrange,
    index_suffix,
    manifests,
)
from noisytune_cli.checkpoint.twins import sort_weights
from noisytune_cli.checkpoint.weights import Choice, choose
from noisytune_cli.errors import InputInvalid, InputUnreadable, UsageError, unreadable
from noisytune_cli.escape import escape
from noisytune_cli.manifest.previous import NAMESAKE, Earlier, EarlierCheck, of_file, of_folder
from noisytune_cli.reading import SNAPSHOT, Reach, changed, fingerprint, open_regular, reach_of
from noisytune_cli.records import Declared, TensorSpec

#: Why a file that is copied is refused in the end.
_ANOTHER = "its size or its times are others, or another file took its place"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its weight files, and the names of everything that lies beside them.

    `id` is a plain name or hub id, never a path of this machine; `revision` the hub's commit. `sources` are
    in the order of their names; `others` are to be copied (the index among them), `left_out` are not, each
    with its reason. File names are relative to `root`, with `/`. `earlier` is what a manifest that lies with
    the weights says of them; `reach` bounds where links may lead, and `seen` has what `others` were when all
    was opened.
    """

    id: str
    revision: str | None
    root: Path
    single_file: bool
    sources: tuple[Source, ...]
    index: ShardIndex | None
    config: Mapping[str, Any] | None
    others: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    earlier: Earlier | None
    reach: Reach | None = None
    seen: Mapping[str, os.stat_result] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The path of the weight file, or of the folder."""
        return self.sources[0].path if self.single_file else self.root

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors, file by file, in each file's order."""
        return tuple(tensor for source in self.sources for tensor in source.tensors)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The names of all files that the weights lie in; one source may be several."""
        return tuple(name for source in self.sources for name in source.files)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of index and weight files in one; where two disagree, the later file counts."""
        merged = {} if self.index is None else dict(self.index.metadata)
        for source in self.sources:
            merged.update(source.metadata)
        return merged

    @property
    def declared(self) -> Declared:
        """What the weight files say of their tensors."""
        said = [source.declared for source in self.sources]
        return Declared(
            buffers=frozenset().union(*(one.buffers for one in said)),
            parameters=frozenset().union(*(one.parameters for one in said)),
            pairs=tuple(pair for one in said for pair in one.pairs),
            lightning=any(one.lightning for one in said),
        )

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """The config of the adapter that lies with the weights, if there is one."""
        return read_adapter(self.root / posixpath.dirname(self.sources[0].name), self.reach)

    @property
    def stored_as_one(self) -> tuple[tuple[str, ...], ...]:
        """The groups of names that share a slot in their file."""
        return tuple(names for source in self.sources for names in source.ties)

    def open_beside(self, path: Path) -> int:
        """Return a descriptor of one of the `others`; Mismatch if it is another than at the beginning."""
        fd = open_regular(path, self.reach)
        if fingerprint(os.fstat(fd)) != fingerprint(self.seen[path.relative_to(self.root).as_posix()]):
            os.close(fd)
            raise changed(path, _ANOTHER)
        return fd

    def mode_beside(self, name: str) -> int:
        """Return the mode of one of the `others`."""
        return self.seen[name].st_mode

    def check_beside(self) -> None:
        """Raise Mismatch if one of the `others` is another than at the beginning."""
        for name in self.others:
            os.close(self.open_beside(self.root / name))

    def close(self) -> None:
        """Close every weight file (twice is fine)."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(
    source: str,
    *,
    weights: str | None = None,
    components: Sequence[str] = (),
    revision: str | None = None,
    mmap: bool = False,
    check_config: ConfigCheck | None = None,
    check_place: Callable[[], None] | None = None,
    check_earlier: EarlierCheck | None = None,
    quiet: bool = False,
    follow_links: bool = False,
) -> Checkpoint:
    """Open SOURCE: a weight file, a checkpoint's folder, or a hub id, which is downloaded.

    `weights`, `components` and `revision` are what the options say; `quiet` hides the download's progress,
    and with `follow_links` a folder may consist of links that lead out of it.
    `check_place` may refuse before anything is downloaded; `check_config` and `check_earlier` before any
    weights are, given the config, and what `Checkpoint.earlier` will be.
    """
    if not _is_local(source):
        if not hub.is_repo_id(source):
            raise no_source(source)
        if check_place is not None:
            check_place()
        snapshot = hub.download(
            source,
            revision,
            weights=weights,
            components=components,
            check_config=check_config,
            check_earlier=check_earlier,
            quiet=quiet,
        )
        return _open_folder(
            snapshot.root, snapshot.listing, source, snapshot.commit, weights, mmap, follow_links, components
        )
    if revision is not None:
        raise UsageError(
            "--revision cannot be used",
            path=source,
            why="it is for hub ids, and this is a local path",
            next_step="Leave --revision out, or give a hub id",
        )
    path = Path(os.path.expanduser(source))
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # ValueError: a NUL, which no path has
        raise unreadable(error if isinstance(error, OSError) else OSError(str(error)), source) from error
    name, commit = _identify(path, is_folder)
    if is_folder:
        return _open_folder(path, list_folder(path), name, commit, weights, mmap, follow_links, components)
    if weights is not None or components:
        option, what = ("--component", "models") if components else ("--weights", "a file")
        raise UsageError(
            f"{option} cannot be used",
            path=source,
            why=f"it chooses {what} in a folder, and SOURCE is a file",
            next_step=f"Leave {option} out, or give the folder",
        )
    return _open_file(path, name, commit, mmap)


def _is_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or os.path.lexists(source)


def _identify(path: Path, is_folder: bool) -> tuple[str, str | None]:
    """Return the checkpoint's id and commit: the hub's for a path into its cache, else the plain name."""
    absolute = Path(os.path.abspath(path))
    folder = absolute if is_folder else absolute.parent
    for candidate in (os.fspath(folder), os.path.realpath(folder)):
        if found := SNAPSHOT.match(candidate):
            return found["id"].replace("--", "/"), found["commit"]
    return _printable(absolute.name or "checkpoint"), None


def _printable(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        return escape(name, None)
    return name


def _open_folder(
    root: Path,
    listing: Listing,
    name: str,
    commit: str | None,
    weights: str | None,
    mmap: bool,
    follow_links: bool,
    components: Sequence[str],
) -> Checkpoint:
    reach = None if follow_links else reach_of(root)
    folders: tuple[str, ...] = ()
    if weights is not None and components:
        raise UsageError(
            "--weights and --component",
            path=root,
            why="one takes a file as a model of its own, the other a folder's models together",
            next_step="Leave one of them out",
        )
    if weights is None:
        folders = choose_components(find_composition(root, listing, reach), components, os.fspath(root))

    def read(name: str) -> ShardIndex:
        return read_index(root, name, reach)

    if folders:
        choices = [choose_inside(listing, folder, os.fspath(root), read) for folder in folders]
    else:
        choices = [choose(listing, weights, os.fspath(root), read)]
    home = posixpath.dirname(choices[0].name)
    config, useless = look_at_config(root / (home if not folders else "") / CONFIG, reach)
    warnings = [useless] if useless else []
    with ExitStack() as opened:
        parts = {
            posixpath.dirname(choice.name): _open_part(
                root, listing, choice, mmap, reach, opened, warnings, is_component=bool(folders)
            )
            for choice in choices
        }
        sources = [source for part in parts.values() for source in part.sources]
        weight_files = {name for source in sources for name in source.files}
        judge = judge_of(list(parts))
        beside = ((name, home) for home, part in parts.items() for name in part.others)
        others = sorted(name for name, home in beside if judge(name) == home and name not in weight_files)
        out = (entry for home, part in parts.items() for entry in part.left_out if judge(entry[0]) == home)
        left_out = sorted(out)
        seen = {file: _look(root / file, reach) for file in others}
        earlier, namesakes = of_folder(root, manifests(listing), weight_files)
        left_out = [(file, NAMESAKE if file in namesakes else why) for file, why in left_out]
        warnings += [f"{escape(file)} is left out: {NAMESAKE}" for file in sorted(namesakes)]
        opened.pop_all()
    return Checkpoint(
        id=name,
        revision=commit,
        root=root,
        single_file=False,
        sources=tuple(sorted(sources, key=lambda source: source.name)),
        index=None if folders else choices[0].index,
        config=config,
        others=tuple(others),
        left_out=tuple(left_out),
        warnings=tuple(warnings),
        earlier=earlier,
        reach=reach,
        seen=seen,
    )


@dataclass(frozen=True)
class _Part:
    """The weights in one folder, and the files to copy and to leave out as seen from there."""

    sources: tuple[Source, ...]
    others: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


def _open_part(
    root: Path,
    listing: Listing,
    choice: Choice,
    mmap: bool,
    reach: Reach | None,
    opened: ExitStack,
    warnings: list[str],
    *,
    is_component: bool,
) -> _Part:
    """Open the chosen weights, and sort what lies around them."""
    chosen, index = choice.name, choice.index
    files = (chosen,) if index is None else index.shards
    for file in files:
        if file in listing.special:
            raise InputInvalid(
                "cannot read weights",
                path=root / file,
                why=f"it is {listing.special[file]}",
                next_step="Put the regular file in its place",
            )
    sources: list[Source] = []
    for file in files:
        sources.append(open_source(root / file, file, mmap, reach))
        opened.callback(sources[-1].close)
    weight_files = {name for source in sources for name in source.files}
    tensors = [tensor for source in sources for tensor in source.tensors]
    arranged = arrange(listing, chosen, weight_files)
    found = sort_weights(root, arranged.weights, arranged.twins, tensors, reach)
    warnings += [*choice.warnings, *(warning for source in sources for warning in source.warnings)]
    warnings += found.warnings
    if index is not None:
        warnings += check_tensors(index, sources)
        warnings += [
            f"{escape(name)} is not listed in {escape(index.name)} and is left out"
            for name in sorted(found.twins)
            if arranged.weights[name] == OTHER_WEIGHTS and index_suffix(name) is None
        ]
    home = posixpath.dirname(chosen)
    if is_component and home:
        metadata = {} if index is None else index.metadata
        sources = [*(Component(source, home, metadata) for source in sources)]
    return _Part(
        tuple(sources),
        (*arranged.others, *found.others),
        (*arranged.left_out, *((name, arranged.weights[name]) for name in found.twins)),
    )


def _look(path: Path, reach: Reach | None) -> os.stat_result:
    """Return what a file is that is to be copied; it must be in reach."""
    fd = open_regular(path, reach)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _open_file(path: Path, name: str, commit: str | None, mmap: bool) -> Checkpoint:
    if index_suffix(path.name) is not None:
        raise InputInvalid(
            "cannot read the checkpoint",
            path=path,
            why="this is an index, the weights are in its shards",
            next_step=f"Give the folder, with --weights {path.name} if it has other weights too",
        )
    if path.name == METADATA or path.name.endswith(CHUNKS_SUFFIX):
        raise InputInvalid(
            "cannot read the checkpoint",
            path=path,
            why="it is one file of a torch.distributed.checkpoint, whose weights are in all of them",
            next_step="Give the folder",
        )
    warnings: list[str] = []
    config_path = path.parent / CONFIG
    try:
        config = read_config(config_path)
    except (InputInvalid, InputUnreadable) as error:
        # What merely lies beside the file is no part of SOURCE: it can help, but not hinder.
        config = None
        warnings.append(f"not used: {error.line()}")
    source: Source = open_source(path, _printable(path.name), mmap)
    return Checkpoint(
        id=name,
        revision=commit,
        root=path.parent,
        single_file=True,
        sources=(source,),
        index=None,
        config=config,
        others=(),
        left_out=(),
        warnings=(*warnings, *source.warnings),
        earlier=of_file(path),
    )
