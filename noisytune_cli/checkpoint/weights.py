"""Which file of a checkpoint holds the weights: chosen by name, or refused with what to name instead.

An index, else the file that frameworks take by themselves, else the only one; safetensors before the chunks
of torch.distributed.checkpoint, and those before pickles. Only the folder itself is looked in: what lies
deeper is another module, an earlier step or a cache, and the refusal says where that is.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection

from noisytune_cli.checkpoint.layout import (
    CHUNKS_SUFFIX,
    INDEX_SUFFIXES,
    METADATA,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    SHARDED_STATE,
    TRAINER_CHECKPOINT,
    WEIGHTS_SUFFIXES,
    Listing,
    export_format,
    is_no_model,
    is_plain_name,
)
from noisytune_cli.errors import InputInvalid, InputUnreadable, UsageError
from noisytune_cli.escape import list_some

#: Weight files that are chosen by name, the first that is there.
_DEFAULT_WEIGHTS = (
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)

_SHARD = re.compile(r"-(\d{3,})-of-(\d{3,})\.(?:safetensors|bin)$")

#: A snapshot in the hub's cache of a repository.
_SNAPSHOT = re.compile(r"snapshots/[0-9a-f]{40}")


def choose_weights(listing: Listing, requested: str | None, where: str) -> str:
    """Return the name of the index, or of the only weight file, that holds the weights.

    `requested` is what --weights names; `where` is the folder or hub id, for the error. Raises
    InputInvalid when there are no weights, or no telling which.
    """
    names = {*listing.files, *listing.special}
    if requested is not None:
        return _check_requested(requested, names, where)
    root = sorted(name for name in names if "/" not in name and not is_no_model(name))
    chunks = [name for name in root if name.endswith(CHUNKS_SUFFIX)]
    for index_suffix, suffixes in zip(INDEX_SUFFIXES, ((SAFETENSORS_SUFFIX,), PICKLE_SUFFIXES), strict=True):
        if chosen := _choose_among(root, index_suffix, suffixes, where):
            return chosen
        if chunks:
            # Before pickles: those beside it hold what is left of the training state.
            return _metadata_of(chunks, names, where)
    for suffixes in ((SAFETENSORS_SUFFIX, INDEX_SUFFIXES[0]), (*PICKLE_SUFFIXES, INDEX_SUFFIXES[1])):
        elsewhere = sorted(name for name in names if name.endswith(suffixes) and not is_no_model(name))
        if elsewhere:
            raise _elsewhere(elsewhere, where)
    if METADATA in names:
        raise InputInvalid(
            "the checkpoint is incomplete",
            path=where,
            why=f"it has {METADATA}, but none of the chunks (*{CHUNKS_SUFFIX}) that this is about",
            next_step="Fetch them too",
        )
    if inside := sorted(name for name in names if posixpath.basename(name) == METADATA):
        raise _elsewhere(inside, where)
    raise _no_weights(listing, where)


def _metadata_of(chunks: list[str], names: Collection[str], where: str) -> str:
    """Return the name of the `.metadata` that lies with the chunks; InputInvalid where there is none."""
    if METADATA not in names:
        raise InputInvalid(
            "the checkpoint is incomplete",
            path=where,
            why=f"it has chunks ({list_some(chunks)}) but no {METADATA}, which is written last",
            next_step="Fetch it too, or wait until the checkpoint is saved",
        )
    return METADATA


def _choose_among(root: list[str], index_suffix: str, suffixes: tuple[str, ...], where: str) -> str | None:
    """Return the weights that end in `suffixes` among the names in the root folder; None if none do."""
    indexes = [name for name in root if name.endswith(index_suffix)]
    if len(indexes) == 1:
        return indexes[0]
    if len(indexes) > 1:
        raise _ambiguous(indexes, where)
    for name in _DEFAULT_WEIGHTS:
        if name in root and name.endswith(suffixes):
            return name
    files = [name for name in root if name.endswith(suffixes)]
    if len(files) == 1 and not _is_one_of_many(files[0]):
        return files[0]
    if files and all(_SHARD.search(name) for name in files):
        raise InputInvalid(
            "cannot read the checkpoint",
            path=where,
            why=f"it has shards ({list_some(files)}) but no index (*{index_suffix})",
            next_step="Fetch the index too, or name one shard with --weights",
        )
    if files:
        raise _ambiguous(files, where)
    return None


def _check_requested(requested: str, names: Collection[str], where: str) -> str:
    name = posixpath.normpath(requested) if requested else ""
    if not is_plain_name(name):
        raise UsageError(
            "--weights cannot be used",
            why=f"'{requested}' does not name a file inside the checkpoint",
            next_step="Give a name relative to SOURCE, such as model.safetensors",
        )
    if name not in names:
        offered = sorted(other for other in names if other.endswith(WEIGHTS_SUFFIXES))
        raise InputUnreadable(
            "no such weights",
            path=f"{where}/{name}",
            why="the checkpoint has no file of this name",
            next_step=f"Choose from {list_some(offered) or 'none'}",
        )
    if not name.endswith((*WEIGHTS_SUFFIXES, *INDEX_SUFFIXES)) and posixpath.basename(name) != METADATA:
        raise InputInvalid(
            "cannot read the checkpoint",
            path=f"{where}/{name}",
            why="--weights names neither safetensors or PyTorch weights nor an index of them",
            next_step=f"Name a file that ends in {', '.join((*WEIGHTS_SUFFIXES, *INDEX_SUFFIXES))}",
        )
    return name


def _is_one_of_many(name: str) -> bool:
    shard = _SHARD.search(name)
    return shard is not None and int(shard[2]) > 1


def _ambiguous(candidates: list[str], where: str) -> InputInvalid:
    return InputInvalid(
        "cannot tell which file holds the weights",
        path=where,
        why=f"candidates are {list_some(candidates)}",
        next_step="Name one with --weights NAME",
    )


def _elsewhere(candidates: list[str], where: str) -> InputInvalid:
    """Return the error for weights that all lie in folders of the checkpoint's."""
    folders = sorted({posixpath.dirname(name) for name in candidates})
    # The root of a repository in the hub's cache: beside the snapshot lie the same weights as blobs.
    cached = all(_SNAPSHOT.fullmatch(folder) for folder in folders)
    if len(folders) > 1 and not cached:
        return _ambiguous(candidates, where)
    return InputInvalid(
        "the weights are in a folder inside" if len(folders) == 1 else "the weights are in folders inside",
        path=where,
        why=f"it has none itself, only {list_some(candidates)}",
        next_step=f"Give {'that folder' if len(folders) == 1 else 'one of the folders'}"
        + ("" if cached else ", or name them with --weights NAME"),
    )


def _no_weights(listing: Listing, where: str) -> InputInvalid:
    bases = [posixpath.basename(name) for name in (*listing.files, *listing.special)]
    found = sorted({label for base in bases if (label := export_format(base))})
    why, next_step = (
        "it has no weights",
        "Give a folder or a hub id that holds some: "
        + ", ".join(f"*{suffix}" for suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, CHUNKS_SUFFIX)),
    )
    copies = [name for name in listing.files if export_format(posixpath.basename(name)) == "PyTorch"]
    if copies:
        why = f"it has only {list_some(copies)}, as a rule a copy or a part of a model"
        next_step = f"Name it if it is meant, with --weights {copies[0]}"
    elif found:
        why = f"it has no safetensors or PyTorch weights, only {', '.join(found)}"
        next_step = "Save the model with save_pretrained to convert it"
    if inside := _folders(listing, TRAINER_CHECKPOINT) or _folders(listing, SHARDED_STATE):
        why = f"it has no weights itself, only {list_some(inside)}"
        next_step = f"Give the folder {inside[-1]} in it"
        if len(inside) > 1:
            next_step += ", the newest of them, or another"
    return InputInvalid("cannot read the checkpoint", path=where, why=why, next_step=next_step)


def _folders(listing: Listing, why: str) -> list[str]:
    """Return the folders inside that are left out for a reason, in the order of the numbers they end in."""
    names = [name[:-1] for name, said in listing.folders.items() if said == why and name.count("/") == 1]
    return sorted(names, key=lambda name: int(re.sub(r".*\D", "", name)))
