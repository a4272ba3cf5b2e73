"""The index of a sharded checkpoint: which shard holds which tensor.

An index is a promise about files that may have been fetched, edited or cut short apart from it, so it is
believed only as far as the shards bear it out: every tensor it lists has to be in the shard it names, and
every tensor of a shard has to be listed there. Only a wrong `total_size` and stray files are forgiven.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.checkpoint.layout import index_suffix, is_plain_name
from noisytune_cli.errors import InputInvalid
from noisytune_cli.reading import Reach, read_json

#: The index of the largest open models (100,000 tensors) is about 10 MB.
_MAX_BYTES = 16 << 20

_MAX_SHOWN = 40  # characters of a wrong total_size that a warning quotes


class ShardIndex(NamedTuple):
    """A parsed index: `shard_of` maps tensor to shard, names relative to the checkpoint.

    `metadata` is what of the index's own metadata is text, such as aliases of tied weights.
    """

    name: str
    path: Path
    shard_of: Mapping[str, str]
    total_size: object
    metadata: Mapping[str, str]

    @property
    def shards(self) -> tuple[str, ...]:
        """The names of the shards, sorted."""
        return tuple(sorted(set(self.shard_of.values())))


def read_index(root: Path, name: str, reach: Reach | None = None) -> ShardIndex:
    """Read and validate the index `name` under `root`; its shards lie beside it. Raises InputInvalid."""
    path = root / name
    document = read_json(path, _MAX_BYTES, reach)
    if not isinstance(document, dict):
        raise _invalid(path, "the index is not a JSON object")
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        raise _invalid(
            path, "the index has no weight_map" if weight_map is None else "weight_map is no object"
        )
    if not weight_map:
        raise _invalid(path, "weight_map lists no tensor")
    home = posixpath.dirname(name)
    shard_of = {}
    for tensor, shard in weight_map.items():
        _check_shard_name(path, tensor, shard)
        shard_of[tensor] = posixpath.join(home, shard)
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return ShardIndex(name, path, shard_of, metadata.get("total_size"), texts)


def check_present(index: ShardIndex, names: Iterable[str], where: str) -> None:
    """Raise InputInvalid unless every shard of the index is among `names`."""
    missing = set(index.shards).difference(names)
    if missing:
        raise InputInvalid(
            "the checkpoint is incomplete",
            path=f"{where}/{min(missing)}",
            why=f"{index.name} lists this shard, which is absent ({len(missing)} of {len(index.shards)} are)",
            next_step="Fetch the missing shards, or name other weights with --weights",
        )


def check_tensors(index: ShardIndex, sources: Sequence[Source]) -> list[str]:
    """Compare the index with the open shards; return warnings, raise InputInvalid where they disagree."""
    listed: dict[str, set[str]] = {shard: set() for shard in index.shards}
    for tensor, shard in index.shard_of.items():
        listed[shard].add(tensor)
    seen: dict[str, str] = {}
    for source in sources:
        present = {tensor.name for tensor in source.tensors}
        for tensor in sorted(present):
            if tensor in seen:
                raise _disagree(source.path, tensor, f"the tensor is in {seen[tensor]} too")
            seen[tensor] = source.name
        if absent := sorted(listed[source.name] - present):
            raise _disagree(source.path, absent[0], f"{index.name} lists the tensor here, the shard lacks it")
        for tensor in sorted(present - listed[source.name]):
            elsewhere = index.shard_of.get(tensor)
            where = "nowhere" if elsewhere is None else f"in {elsewhere}"
            raise _disagree(source.path, tensor, f"the shard holds the tensor, {index.name} lists it {where}")
    total = sum(tensor.nbytes for source in sources for tensor in source.tensors)
    # Of names that are stored as one, writers count every name or only one.
    stored = total - sum(_repeated_bytes(source) for source in sources)
    if index.total_size is not None and index.total_size not in (total, stored):
        return [f"{index.name}: total_size is {_shown(index.total_size)}, the shards hold {total}"]
    return []


def _shown(value: object) -> str:
    """Return a value that may be anything as a message shows it."""
    return str(value)[:_MAX_SHOWN] if isinstance(value, (int, float, str)) else "no number"


def _repeated_bytes(source: Source) -> int:
    """Return how many bytes of the source's tensors are counted again under another name."""
    nbytes = {tensor.name: tensor.nbytes for tensor in source.tensors}
    return sum(nbytes[name] for names in source.ties for name in names[1:])


def _check_shard_name(path: Path, tensor: str, shard: object) -> None:
    if not isinstance(shard, str):
        raise _invalid(path, "the shard's name is not a string", tensor)
    if not is_plain_name(shard):
        raise _invalid(path, f"the shard's name '{shard}' is no plain name inside the folder", tensor)
    suffix = index_suffix(path.name)
    if suffix is not None and not shard.endswith(suffix):
        raise _invalid(path, f"the shard '{shard}' is no *{suffix} file", tensor)


def _invalid(path: Path, why: str, tensor: str | None = None) -> InputInvalid:
    return InputInvalid(
        "cannot read the index",
        path=path,
        tensor=tensor,
        why=why,
        next_step="Fetch or save the checkpoint again",
    )


def _disagree(path: Path, tensor: str, why: str) -> InputInvalid:
    return InputInvalid(
        "index and shards disagree",
        path=path,
        tensor=tensor,
        why=why,
        next_step="Fetch or save the checkpoint again, index and shards together",
    )
