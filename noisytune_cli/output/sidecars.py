"""The small files that have to agree with rewritten weights: the index and the config.

An index names the tensors' files and adds up their bytes; a config names a dtype, to which a loader would
cast the weights and the noise away. Both are read as JSON and written again with the same keys in the same
order and the same indent; nothing else in them changes, so the same bytes come out wherever it is done.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.config import CONFIG
from noisytune_cli.dtypes import BY_TORCH_NAME
from noisytune_cli.escape import enumerate_some
from noisytune_cli.output.convert import OutputFile, output_name
from noisytune_cli.reading import changed, read_json, read_small
from noisytune_cli.records import Conversion

_MAX_BYTES = 16 << 20

#: What stands between the weights' name and the rest of their index's.
_INDEX = ".index."

#: How a config spells the dtypes that follow, and those that are written.
_DTYPE_NAMES = frozenset({*BY_TORCH_NAME, "double", "float", "half"})
_DTYPE_NAMES_OF = {stored: name for name, stored in BY_TORCH_NAME.items()}
_DTYPE_KEYS = ("dtype", "torch_dtype")
_QUANTISED_KEYS = ("quantization_config", "compression_config")

_INDENT = re.compile(r"\s*\{\r?\n([ \t]+)")


class Companion(NamedTuple):
    """A small file of the output: its name, that of the source's file it is made from, and its bytes."""

    name: str
    source: str
    content: bytes


def companions(source: Checkpoint, files: Sequence[OutputFile], conversion: Conversion) -> list[Companion]:
    """Return the files to be written anew; a file that stays as it is, is not among them.

    Raises Mismatch where one of them is no longer what it was when the checkpoint was opened.
    """
    if source.single_file:
        return []
    made = []
    if source.index is not None:
        made.append(_index(source, source.index.name, files, conversion))
    main = source.sources[0] if source.index is None else source.index
    config = posixpath.join(posixpath.dirname(main.name), CONFIG)
    if source.config is not None and config in source.others:  # else it is another program's, and copied
        made.append(_rewrite(source, config, config, partial(_follow, conversion=conversion)))
    return [companion for companion in made if companion is not None]


def left_behind(source: Checkpoint, files: Sequence[OutputFile]) -> list[tuple[str, str]]:
    """Say of each rewritten weight file (name, why) what it held beside weights, which stays behind."""
    if not files:
        return []
    return [
        (file.name, f"its weights alone were taken, without {enumerate_some(file.beside)}")
        for file in source.sources
        if file.beside
    ]


def _index(
    source: Checkpoint, name: str, files: Sequence[OutputFile], conversion: Conversion
) -> Companion | None:
    """Return the index with the output's names and bytes."""
    home = posixpath.dirname(name)
    shard_of = {t.name: posixpath.relpath(file.name, home or ".") for file in files for t in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    weights, _, end = name.rpartition(_INDEX)
    renamed = output_name(weights, conversion) + _INDEX + end

    def follow(document: dict[str, Any]) -> None:
        listed = document["weight_map"]
        document["weight_map"] = {tensor: shard_of[tensor] for tensor in listed if tensor in shard_of}
        metadata = document.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            metadata["total_size"] = total

    return _rewrite(source, name, renamed, follow)


def _follow(document: dict[str, Any], conversion: Conversion) -> None:
    """Let a config name the dtype of the output, in every part of it that names one."""
    dtype = conversion.dtype or conversion.dequantized
    for section in _sections(document):
        if conversion.dequantized is not None:
            for key in _QUANTISED_KEYS:
                section.pop(key, None)
        for key in _DTYPE_KEYS:
            if dtype is not None and str(section.get(key)).removeprefix("torch.") in _DTYPE_NAMES:
                section[key] = _DTYPE_NAMES_OF[dtype]


def _sections(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config and the configs of its parts: `text_config`, `encoder` with a `model_type`…"""
    yield document
    for key, value in document.items():
        is_part = isinstance(value, dict) and (key.endswith("config") or "model_type" in value)
        if is_part and key not in _QUANTISED_KEYS:
            yield from _sections(value)


def _rewrite(
    source: Checkpoint, name: str, renamed: str, follow: Callable[[dict[str, Any]], None]
) -> Companion | None:
    """Return the file as `follow` changes it, or None where it stays what and where it is."""
    root, reach = source.root, source.reach
    document = read_json(root / name, _MAX_BYTES, reach, lenient=_INDEX not in name)
    before = json.dumps(document)
    try:
        assert isinstance(document, dict)
        follow(document)
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise changed(root / name, "it is another document than when it was opened") from error
    if renamed == name and json.dumps(document) == before:
        return None
    return Companion(renamed, name, _dump(document, read_small(root / name, _MAX_BYTES, reach)))


def _dump(document: object, like: bytes) -> bytes:
    """Return JSON in the style of other JSON: its indent, its spaces, its escapes, its end."""
    text = like.decode("utf-8", "replace")
    indent = _INDENT.match(text)
    separators = (",", ":") if indent is None and '": ' not in text else None
    dumped = json.dumps(
        document,
        indent=None if indent is None else indent[1],
        separators=separators,
        ensure_ascii=like.isascii(),
    )
    end = text[len(text.rstrip()) :]
    return (dumped + end).encode("utf-8", "replace")
