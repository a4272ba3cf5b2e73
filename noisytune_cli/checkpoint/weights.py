"""Which file of a checkpoint holds the weights: chosen by name, or refused with what to name instead.

The file that frameworks take by themselves, else the only index, else the only file; safetensors before the
chunks of torch.distributed.checkpoint, and those before pickles. As in transformers a whole file comes before
an index of the same name, which an earlier save in shards has left; in diffusers, where shards are there, the
index comes first. A variant (`model.fp16`) is taken where there is nothing that it is a variant of. Only the
folder itself is looked in: what lies deeper is another module, an earlier step or a cache, and the refusal
says where that is.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from noisytune_cli.checkpoint.index import ShardIndex, check_present
from noisytune_cli.checkpoint.layout import (
    CHUNKS_SUFFIX,
    METADATA,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    SHARDED_STATE,
    TRAINER_CHECKPOINT,
    TRAINER_STATE,
    WEIGHTS_SUFFIXES,
    Listing,
    export_format,
    index_suffix,
    is_no_model,
    is_plain_name,
    is_variant,
    is_weights,
    may_hold_weights,
    stem_of,
)
from noisytune_cli.errors import InputInvalid, InputUnreadable, UsageError
from noisytune_cli.escape import escape, list_some

#: What loaders take by its name, the first that is there, whole or by its index; then an adapter.
_MODELS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")

_SHARD = re.compile(r"-\d{3,}-of-(\d{3,})\.(?:safetensors|bin)$")

#: A snapshot in the hub's cache of a repository.
_SNAPSHOT = re.compile(r"snapshots/[0-9a-f]{40}")


def shard_count(name: str) -> int:
    """Return of how many shards a file of this name is one; 0 where it is a whole."""
    found = _SHARD.search(name)
    return 0 if found is None or int(found[1]) < 2 else int(found[1])


@dataclass(frozen=True)
class Choice:
    """The weight file, or the index of its shards, and what to warn of."""

    name: str
    index: ShardIndex | None
    warnings: tuple[str, ...] = ()


def choose(listing: Listing, requested: str | None, where: str, read: Callable[[str], ShardIndex]) -> Choice:
    """Choose as `choose_weights` does, and `read` the index if it is one; its shards must be there.

    An index of which no shard is there was left beside other weights, and those are taken.
    """
    name = choose_weights(listing, requested, where)
    if index_suffix(name) is None:
        left = [] if requested is not None else _other_indexes(listing, name)
        return Choice(name, None, tuple(f"{escape(one)} is left over: loaders take {name}" for one in left))
    index = read(name)
    names = {*listing.files, *listing.special}
    if requested is None and names.isdisjoint(index.shards):
        with contextlib.suppress(InputInvalid):
            rest = replace(listing, files=tuple(file for file in listing.files if file != name))
            other = choose(rest, None, where, read)
            if _is_safetensors(other.name) == _is_safetensors(name):
                warning = f"{escape(name)} is left over: none of its {len(index.shards)} shards is here"
                return replace(other, warnings=(warning, *other.warnings))
    check_present(index, names, where)
    return Choice(name, index)


def _other_indexes(listing: Listing, name: str) -> list[str]:
    return [other for other in listing.files if index_suffix(other) and _whole(other) == name]


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
    weights = [name for name in root if is_weights(name)]
    for in_safetensors in (True, False):
        files = [name for name in weights if _is_safetensors(name) == in_safetensors]
        chosen = _choose_among(files, where)
        # An adapter is chosen where no model is, in whatever format.
        if chosen in _ADAPTERS and any(_whole(name) in _MODELS for name in weights):
            continue
        if chosen is not None:
            return chosen
        if chunks:
            # Before pickles: those beside it hold what is left of the training state.
            return _metadata_of(chunks, names, where)
    for in_safetensors in (True, False):
        elsewhere = sorted(
            name
            for name in names
            if is_weights(name) and _is_safetensors(name) == in_safetensors and not is_no_model(name)
        )
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


def _is_safetensors(name: str) -> bool:
    return (index_suffix(name) or name).endswith(SAFETENSORS_SUFFIX)


def _whole(name: str) -> str:
    """Return the name that an index's weights have where they are one file; else the name itself."""
    suffix = index_suffix(name)
    return name if suffix is None else stem_of(name) + suffix


def _choose_among(files: list[str], where: str) -> str | None:
    """Return the weights among files of one format in the root folder; None if there are none."""
    shards = [name for name in files if _is_one_of_many(name)]
    heads = [name for name in files if name not in shards]
    stems = {stem_of(name) for name in heads}
    heads = [name for name in heads if not any(is_variant(stem_of(name), stem) for stem in stems)]
    of: dict[str, list[str]] = {}
    for name in heads:
        of.setdefault(_whole(name), []).append(name)
    sharded = {stem_of(name) for name in shards}
    indexed = [whole for whole, names in of.items() if any(map(index_suffix, names))]
    named = [whole for whole in _MODELS if whole in of]
    named += indexed if len(indexed) == 1 else []
    named += [] if indexed else [whole for whole in _ADAPTERS if whole in of]
    if named or len(of) == 1:
        return _first(of[named[0] if named else next(iter(of))], sharded)
    if len(of) > 1:
        raise _ambiguous(indexed or heads, where)
    if shards:
        suffix = SAFETENSORS_SUFFIX if _is_safetensors(shards[0]) else PICKLE_SUFFIXES[0]
        raise InputInvalid(
            "cannot read the checkpoint",
            path=where,
            why=f"it has shards ({list_some(shards)}) but no index (*{suffix}.index.json)",
            next_step="Fetch the index too, which says what the model consists of",
        )
    return None


def _first(names: list[str], sharded: Collection[str]) -> str:
    """Return what the loader of one model's weights takes: the whole file, but in diffusers the shards."""
    by_index = stem_of(names[0]) == "diffusion_pytorch_model" and stem_of(names[0]) in sharded
    return min(names, key=lambda name: (index_suffix(name) is None) == by_index)


def _check_requested(requested: str, names: Collection[str], where: str) -> str:
    name = posixpath.normpath(requested) if requested else ""
    if name not in names and not is_plain_name(name):
        raise UsageError(
            "--weights cannot be used",
            why=f"'{requested}' does not name a file inside the checkpoint",
            next_step="Give a name relative to SOURCE, such as model.safetensors",
        )
    if name not in names:
        offered = sorted(filter(is_weights, names))
        raise InputUnreadable(
            "no such weights",
            path=f"{where}/{name}",
            why="the checkpoint has no file of this name",
            next_step=f"Choose from {list_some(offered) or 'none'}",
        )
    is_index = index_suffix(name) is not None
    if not (is_index or name.endswith(WEIGHTS_SUFFIXES) or posixpath.basename(name) == METADATA):
        raise InputInvalid(
            "cannot read the checkpoint",
            path=f"{where}/{name}",
            why="--weights names neither safetensors or PyTorch weights nor an index of them",
            next_step=f"Name a file that ends in {', '.join(WEIGHTS_SUFFIXES)}, or an index of such files",
        )
    return name


def _is_one_of_many(name: str) -> bool:
    shard = _SHARD.search(name)
    return shard is not None and int(shard[1]) > 1


def _ambiguous(candidates: list[str], where: str) -> InputInvalid:
    return InputInvalid(
        "cannot tell which file holds the weights",
        path=where,
        why=f"candidates are {list_some(candidates)}",
        next_step="Name one with --weights=NAME",
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
        + ("" if cached else ", or name them with --weights=NAME"),
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
        next_step = f"Name it if it is meant, with --weights={shlex.quote(copies[0])}"
    elif others := [name for name in listing.files if "/" not in name and _is_misnamed(name)]:
        why = f"only {list_some(others)} may be weights, by no name that loaders look for"
        next_step = "Give the file itself; one on the hub has to be downloaded first"
    elif found:
        why = f"it has no safetensors or PyTorch weights, only {', '.join(found)}"
        next_step = "Save the model with save_pretrained to convert it"
    whole = _folders(listing, TRAINER_CHECKPOINT) or _folders(listing, SHARDED_STATE)
    if inside := whole or _folders(listing, TRAINER_STATE, "global_step"):
        why = f"it has no weights itself, only {list_some(inside)}"
        next_step = f"Give the folder {inside[-1]} in it"
        if len(inside) > 1:
            next_step += ", the newest of them, or another"
    return InputInvalid("cannot read the checkpoint", path=where, why=why, next_step=next_step)


def _is_misnamed(name: str) -> bool:
    """Tell whether a file may hold weights under a name that is no weights' (`model_best.pth.tar`)."""
    return may_hold_weights(name) and not is_weights(name) and not is_no_model(name)


def _folders(listing: Listing, why: str, begin: str = "") -> list[str]:
    """Return the folders inside that are left out for a reason, in the order of the numbers they end in."""
    found = (name[:-1] for name, said in listing.folders.items() if said == why and name.count("/") == 1)
    names = [name for name in found if name.startswith(begin)]
    return sorted(names, key=lambda name: int(re.sub(r".*\D", "", name)))
