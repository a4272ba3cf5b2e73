"""From what the user typed to what is there: names, the weights among them, config, what an earlier run left.

What is an address in an object store (`s3://…`) is there; what begins with `.`, `/` or `~`, or exists, is
local and never reaches the hub. All ways end in the same place: a folder, the names in it, and the rules of
`checkpoint/weights.py` and `checkpoint/layout.py`. Looking fetches small files only; what a command has to
ask, it asks of what was found, before that is fetched and opened.
"""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from noisytune_cli.checkpoint.address import is_address
from noisytune_cli.checkpoint.composition import (
    COMPOSED_BY,
    choose_components,
    choose_inside,
    find_composition,
    judge_of,
)
from noisytune_cli.checkpoint.config import CONFIG, look_at_config, read_config
from noisytune_cli.checkpoint.folder import list_folder
from noisytune_cli.checkpoint.formats.safetensors import SUFFIX
from noisytune_cli.checkpoint.ids import is_repo_id, no_source
from noisytune_cli.checkpoint.index import ShardIndex, read_index
from noisytune_cli.checkpoint.layout import (
    CHUNKS_SUFFIX,
    METADATA,
    Listing,
    arrange,
    index_suffix,
    manifests,
)
from noisytune_cli.checkpoint.weights import Choice, choose
from noisytune_cli.errors import InputInvalid, InputUnreadable, NoisytuneError, UsageError
from noisytune_cli.escape import escape, is_text
from noisytune_cli.manifest.previous import NAMESAKE, PreviousRun, of_file, of_folder
from noisytune_cli.manifest.write import MAX_BYTES
from noisytune_cli.reading import SNAPSHOT, Reach, is_folder, is_there, reach_of

if TYPE_CHECKING:
    from noisytune_cli.checkpoint.remote import Remote


@dataclass(frozen=True)
class Found:
    """A checkpoint that was looked at and not yet opened.

    `id` is a plain name or hub id, never a path of this machine; `revision` the hub's commit. `choices` are
    the weights, several where it `is_composed` of components. `listing` is None where SOURCE is a file, and
    `remote` where it is local. `config` is the model's own, at `config_path` for an error to name;
    `previous_run` is what a manifest that lies with the weights says of them, and `namesakes` only look like
    one. `configs` are those of components in folders, by folder. `reach` bounds where links may lead. Of the
    files in `headers_alone` there is nothing but a header; `part` fetches what follows, where that may be.
    """

    id: str
    revision: str | None
    root: Path
    listing: Listing | None
    choices: tuple[Choice, ...]
    is_composed: bool
    config: Mapping[str, Any] | None
    config_path: str
    warnings: tuple[str, ...]
    previous_run: PreviousRun | None
    namesakes: frozenset[str] = frozenset()
    configs: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    reach: Reach | None = None
    remote: Remote | None = field(default=None, compare=False)
    headers_alone: frozenset[str] = frozenset()
    part: Callable[[str, int, int], bytes] | None = field(default=None, compare=False)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that the weights lie in, as far as names and index tell."""
        return tuple(file for choice in self.choices for file in _files_of(choice, self.listing))

    @property
    def named_configs(self) -> tuple[tuple[Mapping[str, Any] | None, str], ...]:
        """Every config that was found, the model's own first, each with the path that an error names."""
        where = posixpath.dirname(self.config_path)
        of_components = ((c, posixpath.join(where, folder, CONFIG)) for folder, c in self.configs.items())
        return ((self.config, self.config_path), *of_components)

    def close(self) -> None:
        """Remove what was fetched to look at it and will not be opened."""
        if self.remote is not None:
            self.remote.close()

    @property
    def missing_bytes(self) -> int:
        """How many bytes `fetch` has still to bring."""
        return 0 if self.remote is None else sum(map(self.remote.size, self.remote.lacks(self._needed())))

    def fetch(self) -> None:
        """Bring the weights, and the files that come along with them, to `root`, unless they are there."""
        if self.remote is not None:
            self.remote.fetch(self._needed())

    def outlined(self, folder: Path) -> Found:
        """Return what was found as it lies in `folder` then: headers alone of the weights that are not here.

        Of the safetensors files that a hub has and the cache lacks, their headers are fetched; what else is
        missing is fetched whole.
        """
        assert self.remote is not None
        needed = self._needed()
        headers = [name for name in self.remote.lacks(needed) if name.endswith(SUFFIX)]
        whole = [name for name in needed if name not in set(headers)]
        self.remote.fetch(whole)
        self.remote.fetch_headers(headers, folder)
        for name in {*whole, *(choice.name for choice in self.choices if choice.index is not None)}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((self.root / name).resolve())
        reach = None
        if self.reach is not None:
            reach = Reach((*self.reach.folders, os.path.realpath(folder)))
        return replace(self, root=folder, reach=reach, remote=None, headers_alone=frozenset(headers))

    def _needed(self) -> list[str]:
        """Return the names of the weights and of the files that come along with them."""
        files = self.files
        if self.listing is None:
            return list(files)
        parts = {posixpath.dirname(c.name): arrange(self.listing, c.name, files) for c in self.choices}
        judge = judge_of(list(parts))
        needed = dict.fromkeys(files)
        for home, part in parts.items():
            beside = (*part.others, *(part.weights.keys() - part.twins))
            needed |= dict.fromkeys(name for name in beside if judge(name) == home)
        return list(needed)


def comes_from_hub(source: str) -> bool:
    """Tell whether SOURCE is a hub id; InputUnreadable where it is neither that nor anything here."""
    if not source:  # of a variable that is not set
        raise UsageError(
            "no SOURCE is named", why="its name is empty", next_step="Give one; . is this folder"
        )
    if is_address(source) or source.startswith((".", "/", "~")) or is_there(source):
        return False
    if not is_repo_id(source):
        raise no_source(source)
    return True


def find(
    source: str,
    *,
    weights: str | None = None,
    components: Sequence[str] = (),
    revision: str | None = None,
    follow_links: bool = False,
) -> Found:
    """Look at SOURCE: a weight file or a checkpoint's folder, here or in an object store, or a hub id.

    `weights`, `components` and `revision` are what the options say; with `follow_links` a folder may consist
    of links that lead out of it. Raises HubError for the hub and the network, InputInvalid where there are no
    weights or no telling which, UsageError for the options.
    """
    if comes_from_hub(source):
        from noisytune_cli.checkpoint.hub import Repository  # what is here should not wait for it

        hub = Repository(source, revision)
        reach = None if follow_links else reach_of(hub.root)
        place = _Place(source, hub.commit, hub.root, hub.listing, source, reach, hub)
        return _find_in_folder(place, weights, components)
    if revision is not None:
        raise UsageError(
            "--revision cannot be used",
            path=source,
            why="it is for hub ids, and this is none",
            next_step="Leave --revision out, or give a hub id",
        )
    if is_address(source):
        return _find_in_store(source, weights, components)
    path = Path(os.path.expanduser(source))
    in_folder = is_folder(path)
    name, commit = _identify(path, in_folder)
    if in_folder:
        reach = None if follow_links else reach_of(path)
        place = _Place(name, commit, path, list_folder(path), os.fspath(path), reach, None)
        return _find_in_folder(place, weights, components)
    _refuse_choice(source, weights, components)
    return _find_file(path, name, commit)


def _find_in_store(source: str, weights: str | None, components: Sequence[str]) -> Found:
    from noisytune_cli.checkpoint.bucket import Bucket  # what is here should not wait for it

    bucket = Bucket(source)
    name = bucket.address
    with bucket.named():
        if bucket.file is None:
            reach = reach_of(bucket.root)
            place = _Place(name, None, bucket.root, bucket.listing, name, reach, bucket)
            return _find_in_folder(place, weights, components)
        _refuse_choice(source, weights, components)
        bucket.fetch([file for file in bucket.listing.files if file != bucket.file])
        found = _find_file(bucket.root / bucket.file, name, None, bucket)
        return replace(found, config_path=name.parent / CONFIG)


def _refuse_choice(source: str, weights: str | None, components: Sequence[str]) -> None:
    """Raise UsageError where an option chooses in a folder, and SOURCE is a file."""
    if weights is not None or components:
        option, what = ("--component", "models") if components else ("--weights", "a file")
        raise UsageError(
            f"{option} cannot be used",
            path=source,
            why=f"it chooses {what} in a folder, and SOURCE is a file",
            next_step=f"Leave {option} out, or give the folder",
        )


def printable(name: str) -> str:
    """Return a file's name as UTF-8 can hold it."""
    return name if is_text(name) else escape(name, None)


def _identify(path: Path, in_folder: bool) -> tuple[str, str | None]:
    """Return the checkpoint's id and commit: the hub's for a path into its cache, else the plain name."""
    absolute = Path(os.path.abspath(path))
    folder = absolute if in_folder else absolute.parent
    for candidate in (os.fspath(folder), os.path.realpath(folder)):
        if found := SNAPSHOT.match(candidate):
            return found["id"].replace("--", "/"), found["commit"]
    return printable(absolute.name or "checkpoint"), None


class _Place(NamedTuple):
    """A folder, here or on the hub, and what errors call it."""

    id: str
    revision: str | None
    root: Path
    listing: Listing
    where: str
    reach: Reach | None
    remote: Remote | None

    def fetch(self, names: Sequence[str]) -> None:
        """Bring small files to `root`."""
        if self.remote is not None:
            self.remote.fetch(names)

    def read_index(self, name: str) -> ShardIndex:
        """Read an index, whose shards can be had."""
        self.fetch([name])
        index = read_index(self.root, name, self.reach)
        if self.remote is not None:
            self.remote.require(index.shards)
        return index


def _find_in_folder(place: _Place, weights: str | None, components: Sequence[str]) -> Found:
    root, listing, where = place.root, place.listing, place.where
    folders: tuple[str, ...] = ()
    if weights is not None and components:
        raise UsageError(
            "--weights and --component",
            path=where,
            why="one takes a file as a model of its own, the other a folder's models together",
            next_step="Leave one of them out",
        )
    if weights is None:
        place.fetch([name for name in COMPOSED_BY if name in listing.files])
        composition = find_composition(root, listing, place.reach)
        folders = choose_components(composition, components, where)
    if folders:
        choices = tuple(choose_inside(listing, folder, where, place.read_index) for folder in folders)
    else:
        choices = (choose(listing, weights, where, place.read_index),)

    config_name = posixpath.join("" if folders else posixpath.dirname(choices[0].name), CONFIG)
    config_names = {folder: posixpath.join(folder, CONFIG) for folder in folders if folder}
    place.fetch([name for name in (config_name, *config_names.values()) if name in listing.files])
    config, unread = look_at_config(root / config_name, place.reach)
    own = {folder: look_at_config(root / name, place.reach) for folder, name in config_names.items()}

    # A manifest is not copied, but says what was done to the weights. What is too long for one is none.
    left, remote = manifests(listing), place.remote
    if remote is not None:
        left = [name for name in left if remote.size(name) <= MAX_BYTES]
        remote.fetch(left)
    files = [file for choice in choices for file in _files_of(choice, listing)]
    earlier, namesakes = of_folder(root, left, files)
    namesakes |= set(manifests(listing)).difference(left)
    useless = [error for error in (unread, *(error for _, error in own.values())) if error is not None]
    warnings = [_not_used(error, remote) for error in useless]
    return Found(
        id=place.id,
        revision=place.revision,
        root=root,
        listing=listing,
        choices=choices,
        is_composed=bool(folders),
        config=config,
        config_path=posixpath.join(where, config_name),
        warnings=(*warnings, *(f"{escape(name)} is left out: {NAMESAKE}" for name in sorted(namesakes))),
        previous_run=earlier,
        namesakes=namesakes,
        configs={folder: found for folder, (found, _) in own.items()},
        reach=place.reach,
        remote=remote,
    )


def _files_of(choice: Choice, listing: Listing | None) -> tuple[str, ...]:
    if choice.index is not None:
        return tuple(choice.index.shards)
    if posixpath.basename(choice.name) != METADATA or listing is None:
        return (choice.name,)
    home = posixpath.dirname(choice.name)
    chunks = (name for name in listing.files if name.endswith(CHUNKS_SUFFIX))
    return (choice.name, *(name for name in chunks if posixpath.dirname(name) == home))


def _not_used(error: NoisytuneError, remote: Remote | None) -> str:
    """Say of a config why it is not used."""
    if remote is not None:
        remote.rename(error)
    return f"not used: {error.line()}"


def _find_file(path: Path, name: str, commit: str | None, remote: Remote | None = None) -> Found:
    if index_suffix(path.name) is not None:
        raise InputInvalid(
            "cannot read the checkpoint",
            path=path,
            why="this is an index, the weights are in its shards",
            next_step=f"Give the folder, with --weights={shlex.quote(path.name)} if it has other weights too",
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
        # What merely lies beside the file is no part of SOURCE: it need not be readable. Where it is, it may
        # be what says that the weights are quantised.
        config = None
        warnings.append(_not_used(error, remote))
    return Found(
        id=name,
        revision=commit,
        root=path.parent,
        listing=None,
        choices=(Choice(path.name, None),),
        is_composed=False,
        config=config,
        config_path=os.fspath(config_path),
        warnings=tuple(warnings),
        previous_run=of_file(path),
        remote=remote,
    )
