"""The checkpoint that a manifest was made from: opened again, and its files found by their recorded names.

Its name, revision and weights are chosen by the manifest, so the user gives a folder or a hub id and nothing
else. A hub id that the manifest itself records is taken at the recorded commit.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from contextlib import ExitStack

from noisytune_cli.checkpoint.address import is_address
from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_found
from noisytune_cli.checkpoint.composition import COMPOSED_BY, ROOT
from noisytune_cli.checkpoint.dequantize import dequantize
from noisytune_cli.checkpoint.find import find
from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.checkpoint.ids import is_repo_id
from noisytune_cli.checkpoint.layout import index_suffix, stem_of
from noisytune_cli.commands.differences import Difference, compare_header, mismatch
from noisytune_cli.commands.request import check_room_beside
from noisytune_cli.errors import InputInvalid, Mismatch, UsageError
from noisytune_cli.manifest.read import RecordedManifest
from noisytune_cli.reading import is_there
from noisytune_cli.records import Manifest, TensorSpec


def name_base(recorded: RecordedManifest, base: str | None) -> str:
    """Return `base`, or for None the hub id that the manifest records; UsageError if there is none."""
    source = recorded.manifest.source
    if base is not None:
        return base
    if not _is_at_hub(recorded):
        why = "the manifest records no commit on the hub to take it from"
        if source.revision is not None and is_there(source.id):
            why = "a file or folder here has the name of the hub id in the manifest"
        raise UsageError(
            "--base is missing",
            path=recorded.path,
            why=why,
            next_step=f"Give --base=SOURCE, the checkpoint that was perturbed ({source.id})",
        )
    return source.id


def _is_at_hub(recorded: RecordedManifest) -> bool:
    """Tell whether the hub id and commit that a manifest records name its original."""
    source = recorded.manifest.source
    return source.revision is not None and is_repo_id(source.id) and not is_there(source.id)


def open_base(
    recorded: RecordedManifest,
    base: str,
    *,
    mmap: bool = False,
    follow_links: bool = False,
    outs: Sequence[str] = (),
) -> Checkpoint:
    """Open `base`, the hub id that the manifest records at the recorded commit.

    `outs` name outputs of its size, for which there has to be room before it is fetched.
    """
    source = recorded.manifest.source
    local = os.path.expanduser(base)
    if is_address(base):
        from noisytune_cli.checkpoint.bucket import is_object  # what is here should not wait for it

        is_file = is_object(base)
    else:
        is_file = is_there(local) and not os.path.isdir(local)
    components = components_of(recorded.manifest)
    weights = None if is_file or components else _weights(recorded)
    if weights is not None and os.path.isdir(local) and not is_there(os.path.join(local, weights)):
        raise not_the_base([Difference(weights, None, "it is absent")], recorded, local)
    conversion = recorded.manifest.conversion
    with ExitStack() as opened:
        found = find(
            base,
            weights=weights,
            components=components,
            revision=source.revision if base == source.id and _is_at_hub(recorded) else None,
            follow_links=follow_links,
        )
        opened.callback(found.close)
        if conversion is None:
            check_room_beside(found, outs)
        original = opened.enter_context(open_found(found, mmap=mmap))
        if conversion is not None and conversion.dequantized is not None:
            original = dequantize(original, base)
        opened.pop_all()
    return original


def components_of(manifest: Manifest) -> tuple[str, ...]:
    """Return the folders of the components that a manifest is about; none where it is about one model."""
    prefixes = prefixes_of(manifest)
    if not any(prefixes.values()):
        return ()
    return tuple(dict.fromkeys(posixpath.dirname(name) or ROOT for name in prefixes))


def prefixes_of(manifest: Manifest) -> dict[str, str]:
    """Return by weight file the folder that its tensors' names begin with: "" where they are its own.

    Only beside what lists components are they; a model of Flax's may call all its tensors `params/…` itself.
    """
    if not set(COMPOSED_BY) & {name for name, _ in manifest.copied}:
        return dict.fromkeys((file.name for file in manifest.source.files), "")
    names: dict[str, list[str]] = {file.name: [] for file in manifest.source.files}
    for receipt in manifest.receipts:
        if (tensor := receipt.step.tensor).file in names:  # an output's files may have other names
            names[tensor.file].append(tensor.name)
    prefixes = {}
    for name, found in names.items():
        folder = posixpath.dirname(name)
        inside = bool(folder and found) and all(one.startswith(f"{folder}/") for one in found)
        prefixes[name] = folder if inside else ""
    return prefixes


def not_the_base(
    differences: Sequence[Difference], recorded: RecordedManifest, path: str | os.PathLike[str]
) -> Mismatch:
    """Return the error for a base at `path` that is not the one that was perturbed."""
    origin = recorded.manifest.source
    revision = f" at commit {origin.revision}" if origin.revision else ""
    return mismatch(
        differences,
        what="the base is not the one in the manifest",
        path=path,
        next_step=f"Give as --base the checkpoint that was perturbed: {origin.id}{revision}",
    )


def match_files(
    manifest: Manifest, original: Checkpoint, label: str = ""
) -> tuple[dict[str, Source], list[Difference]]:
    """Return the original's weight files by recorded name, and what in their headers is not as recorded.

    A single file may have been renamed since. `label` goes before what differs.
    """
    files = {file.name: file for file in original.sources}
    if original.single_file and len(manifest.source.files) == 1:
        files = {manifest.source.files[0].name: original.sources[0]}
    return compare_files(manifest, files, label)


def compare_files(
    manifest: Manifest, files: dict[str, Source], label: str = ""
) -> tuple[dict[str, Source], list[Difference]]:
    """Return those of `files` that the manifest records, and where their headers are not as recorded."""
    tensors: dict[str, list[TensorSpec]] = {record.name: [] for record in manifest.source.files}
    for receipt in manifest.receipts:
        tensors[receipt.step.tensor.file].append(receipt.step.tensor)
    found: list[Difference] = []
    for record in manifest.source.files:
        if record.name in files:
            found += compare_header(record, tensors[record.name], files[record.name])
        else:
            found.append(Difference(record.name, None, "it is absent"))
    matched = {name: file for name, file in files.items() if name in tensors}
    return matched, [Difference(d.file, d.tensor, label + d.what) for d in found]


def _weights(recorded: RecordedManifest) -> str:
    """Return what --weights would name: the index of the recorded weight files, else their only one."""
    manifest = recorded.manifest
    names = [file.name for file in manifest.source.files]
    home = posixpath.dirname(names[0])
    others = [*(name for name, _ in manifest.copied), *(source for _, source, _ in manifest.followed)]
    indexes = [name for name in others if index_suffix(name) and posixpath.dirname(name) == home]
    # That of another model, or of another one of the training, may have been copied beside them.
    stems = {stem_of(name) for name in names}
    for own in ([name for name in indexes if stem_of(name) in stems], indexes if len(names) > 1 else names):
        if len(own) == 1:
            return own[0]
    raise InputInvalid(
        "cannot use the manifest",
        path=recorded.path,
        why=f"it records {len(names)} weight files and {len(indexes)} indexes of them",
        next_step="Fetch the manifest again; it is not meant to be edited",
    )
