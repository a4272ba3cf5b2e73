"""An open checkpoint: its weight files, and the names of everything that lies beside them.

Opening what `checkpoint/find.py` found reads headers only; if anything is wrong all that was opened is closed
again.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from noisytune_cli.checkpoint.composition import (
    Component,
    Model,
    judge_of,
    models_of,
)
from noisytune_cli.checkpoint.config import read_adapter
from noisytune_cli.checkpoint.find import Found, find, printable
from noisytune_cli.checkpoint.formats import Source, open_source
from noisytune_cli.checkpoint.formats.safetensors import SafetensorsSource
from noisytune_cli.checkpoint.index import ShardIndex, check_tensors
from noisytune_cli.checkpoint.layout import (
    OTHER_WEIGHTS,
    Listing,
    arrange,
    index_suffix,
)
from noisytune_cli.checkpoint.twins import sort_weights
from noisytune_cli.checkpoint.weights import Choice
from noisytune_cli.errors import InputInvalid, NoisytuneError
from noisytune_cli.escape import escape
from noisytune_cli.manifest.previous import NAMESAKE, PreviousRun
from noisytune_cli.reading import Reach, changed, fingerprint, open_regular
from noisytune_cli.records import Declared, TensorSpec

if TYPE_CHECKING:
    from noisytune_cli.checkpoint.remote import Remote

#: Why a file that is copied is refused in the end.
_ANOTHER = "its size or its times are others, or another file took its place"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its weight files, and the names of everything that lies beside them.

    `id` is a plain name or hub id, never a path of this machine; `revision` the hub's commit. `sources` are
    in the order of their names; `others` are to be copied (the index among them), `left_out` are not, each
    with its reason. File names are relative to `root`, with `/`. `previous_run` is what a manifest that lies
    with the weights says of them; `configs` are those of components in folders, by folder; `reach` bounds
    where links may lead, and `seen` has what `others` were when all was opened. `scratch` is released when it
    is closed; `moved` are folders of this run's that its files lie in, and what errors name instead. `remote`
    is where it lies, where that is not here.
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
    previous_run: PreviousRun | None
    configs: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    reach: Reach | None = None
    seen: Mapping[str, os.stat_result] = field(default_factory=dict)
    scratch: ExitStack = field(default_factory=ExitStack, compare=False, repr=False)
    moved: tuple[tuple[Path, str], ...] = ()
    remote: Remote | None = field(default=None, compare=False, repr=False)

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
            pairs=(
                *(pair for one in said for pair in one.pairs),
                *((names[0], name) for names in self.stored_as_one for name in names[1:]),
            ),
            lightning=any(one.lightning for one in said),
        )

    @property
    def models(self) -> tuple[Model, ...]:
        """The models that are in it: one, but for a composition."""
        return models_of(self.tensors, self.config, self.configs)

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """The config of the adapter that lies with the first of the weights, if there is one."""
        return read_adapter(self.root / posixpath.dirname(self.sources[0].name), self.reach)

    def adapter_of(self, model: Model) -> Mapping[str, Any] | None:
        """Return the config of the adapter that lies with a model's weights, if there is one."""
        return read_adapter(self.root / model.folder, self.reach) if self.configs else self.adapter

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
        self.scratch.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NoisytuneError):
            for here, there in self.moved:
                error.move(here, there)
        self.close()


def open_checkpoint(
    source: str,
    *,
    weights: str | None = None,
    components: Sequence[str] = (),
    revision: str | None = None,
    mmap: bool = False,
    follow_links: bool = False,
    headers_only: bool = False,
) -> Checkpoint:
    """Look at SOURCE as `find` does, and open it: for those who have nothing to ask before it is fetched."""
    found = find(
        source,
        weights=weights,
        components=components,
        revision=revision,
        follow_links=follow_links,
    )
    return open_found(found, mmap=mmap, headers_only=headers_only)


def open_files(found: Found, names: Collection[str], *, mmap: bool = False) -> tuple[Source, ...]:
    """Fetch and open these weight files of a checkpoint alone, for who knows all else that is in it."""
    if found.remote is not None:
        found.remote.fetch(list(names))
    sources: list[Source] = []
    with ExitStack() as opened:
        for choice in found.choices:
            for file in (choice.name,) if choice.index is None else choice.index.shards:
                if (name := printable(file) if found.listing is None else file) in names:
                    source = open_source(found.root / file, name, mmap, found.reach)
                    opened.callback(source.close)
                    sources += _in_component(found, choice, [source])
        opened.pop_all()
    return tuple(sorted(sources, key=lambda source: source.name))


def open_found(
    found: Found, *, mmap: bool = False, headers_only: bool = False, few_values: bool = False
) -> Checkpoint:
    """Fetch what is missing of a checkpoint, and open it.

    With `headers_only` no value may be read: of a hub's weights that are not here, headers are fetched into a
    folder that goes when the checkpoint is closed. In memory and errors it lies where it would lie whole.
    So it is with `few_values`, but these are fetched when they are read.
    """
    if found.remote is None:
        return _open(found, mmap)
    with found.remote.named():
        if headers_only or few_values:
            return _open_headers(found, few_values)
        found.fetch()
        return _open(found, mmap)


def _open(found: Found, mmap: bool) -> Checkpoint:
    """Open what lies here."""
    if found.listing is None:
        name = found.choices[0].name
        source = _open_source(found, name, printable(name), mmap)
        return _checkpoint(found, (source,), warnings=source.warnings)
    with ExitStack() as opened:
        parts = {
            posixpath.dirname(choice.name): _open_part(found, found.listing, choice, mmap, opened)
            for choice in found.choices
        }
        sources = [source for part in parts.values() for source in part.sources]
        weight_files = {name for source in sources for name in source.files}
        judge = judge_of(list(parts))
        beside = ((name, home) for home, part in parts.items() for name in part.others)
        others = sorted(name for name, home in beside if judge(name) == home and name not in weight_files)
        left_out = sorted(
            (name, NAMESAKE if name in found.namesakes else why)
            for home, part in parts.items()
            for name, why in part.left_out
            if judge(name) == home
        )
        seen = {file: _look(found.root / file, found.reach) for file in others}
        checkpoint = _checkpoint(
            found,
            tuple(sorted(sources, key=lambda source: source.name)),
            others=tuple(others),
            left_out=tuple(left_out),
            warnings=[warning for part in parts.values() for warning in part.warnings],
            seen=seen,
        )
        opened.pop_all()
    return checkpoint


def _checkpoint(
    found: Found,
    sources: tuple[Source, ...],
    *,
    others: tuple[str, ...] = (),
    left_out: tuple[tuple[str, str], ...] = (),
    warnings: Sequence[str],
    seen: Mapping[str, os.stat_result] | None = None,
) -> Checkpoint:
    scratch = ExitStack()
    if found.remote is not None:
        scratch.callback(found.remote.close)
    return Checkpoint(
        id=found.id,
        revision=found.revision,
        root=found.root,
        single_file=found.listing is None,
        sources=sources,
        index=None if found.is_composed else found.choices[0].index,
        config=found.config,
        others=others,
        left_out=left_out,
        warnings=(*found.warnings, *warnings),
        previous_run=found.previous_run,
        configs=found.configs,
        reach=found.reach,
        seen=seen or {},
        scratch=scratch,
        moved=() if found.remote is None else found.remote.moved,
        remote=found.remote,
    )


def _open_headers(found: Found, few_values: bool) -> Checkpoint:
    from tempfile import TemporaryDirectory

    from noisytune_cli.checkpoint.remote import in_blocks

    remote = found.remote
    assert remote is not None
    with ExitStack() as scratch:
        folder = Path(scratch.enter_context(TemporaryDirectory(prefix="noisytune-")))
        moved = (folder, os.fspath(found.root))
        try:
            outlined = found.outlined(folder)
            if few_values:
                outlined = replace(outlined, part=in_blocks(remote))
            opened = _open(outlined, mmap=False)
        except NoisytuneError as error:
            error.move(*moved)
            raise
        scratch.callback(remote.close)
        moves = (moved, *remote.moved)
        return replace(opened, root=found.root, scratch=scratch.pop_all(), moved=moves, remote=remote)


def _open_source(found: Found, file: str, name: str, mmap: bool) -> Source:
    """Open a weight file, or what there is of it."""
    source = open_source(found.root / file, name, mmap, found.reach)
    if file in found.headers_alone:
        assert isinstance(source, SafetensorsSource)
        source.has_header_alone = True
        if found.part is not None:
            source.fetch = partial(found.part, file)
    return source


class _Part(NamedTuple):
    """The weights in one folder, and the files to copy and to leave out as seen from there."""

    sources: tuple[Source, ...]
    others: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def _open_part(found: Found, listing: Listing, choice: Choice, mmap: bool, opened: ExitStack) -> _Part:
    """Open the chosen weights, and sort what lies around them."""
    chosen, index = choice.name, choice.index
    files = (chosen,) if index is None else index.shards
    for file in files:
        if file in listing.special:
            raise InputInvalid(
                "cannot read weights",
                path=found.root / file,
                why=f"it is {listing.special[file]}",
                next_step="Put the regular file in its place",
            )
    sources: list[Source] = []
    for file in files:
        source = _open_source(found, file, file, mmap)
        opened.callback(source.close)
        sources.append(source)
    weight_files = {name for source in sources for name in source.files}
    tensors = [tensor for source in sources for tensor in source.tensors]
    arranged = arrange(listing, chosen, weight_files)
    sorted_out = sort_weights(found.root, arranged.weights, arranged.twins, tensors, found.reach)
    warnings = [*choice.warnings, *(warning for source in sources for warning in source.warnings)]
    warnings += sorted_out.warnings
    if index is not None:
        warnings += check_tensors(index, sources)
        warnings += [
            f"{escape(name)} is not listed in {escape(index.name)} and is left out"
            for name in sorted(sorted_out.twins)
            if arranged.weights[name] == OTHER_WEIGHTS and index_suffix(name) is None
        ]
    return _Part(
        tuple(_in_component(found, choice, sources)),
        (*arranged.others, *sorted_out.others),
        (*arranged.left_out, *((name, arranged.weights[name]) for name in sorted_out.twins)),
        tuple(warnings),
    )


def _in_component(found: Found, choice: Choice, sources: Sequence[Source]) -> list[Source]:
    """Return weight files of one choice with their tensors called as in the whole checkpoint."""
    home = posixpath.dirname(choice.name)
    if not (found.is_composed and home):
        return list(sources)
    metadata = {} if choice.index is None else choice.index.metadata
    return [Component(source, home, metadata) for source in sources]


def _look(path: Path, reach: Reach | None) -> os.stat_result:
    """Return what a file is that is to be copied; it must be in reach."""
    fd = open_regular(path, reach)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)
