"""The model's own `config.json`, read as data.

It helps to decide ties, to recognise quantised weights and to tell a layout from its sizes. Nothing it names
(`auto_map`, Python files) is ever imported or run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from noisytune_cli.errors import InputInvalid, InputUnreadable
from noisytune_cli.reading import Reach, is_there, not_json, parse_json, read_json, read_small

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

_MAX_BYTES = 16 << 20

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_WIDTH = ("hidden_size", "n_embd", "n_embed", "d_model", "embed_dim")

_NO_CONFIG = "its layout depends on the model, and no config names it"


def read_config(path: Path, reach: Reach | None = None) -> Mapping[str, Any] | None:
    """Return the parsed config, None where there is none; raises InputInvalid if it is no JSON object."""
    if not is_there(path):
        return None
    return _parse(path, read_small(path, _MAX_BYTES, reach))


def look_at_config(
    path: Path, reach: Reach | None = None
) -> tuple[Mapping[str, Any] | None, InputInvalid | None]:
    """Return the config, or why it is none.

    Other programs call theirs so too, with comments in it, or a list: it is copied as any file, and helps
    nobody to read the weights. What is no file, or not within reach, is refused.
    """
    if not is_there(path):
        return None, None
    content = read_small(path, _MAX_BYTES, reach)
    try:
        return _parse(path, content), None
    except InputInvalid as error:
        return None, error


def _parse(path: Path, content: bytes) -> Mapping[str, Any]:
    try:
        config = parse_json(content, lenient=True)
    except ValueError as error:
        raise not_json(path, str(error)) from error
    if not isinstance(config, dict):
        raise InputInvalid(
            "cannot read the config",
            path=path,
            why="it is not a JSON object",
            next_step="Fetch or save the checkpoint again",
        )
    return config


def read_adapter(folder: Path, reach: Reach | None = None) -> Mapping[str, Any] | None:
    """Return the adapter's config in `folder`, None where there is none that can be read: it only helps."""
    path = folder / ADAPTER_CONFIG
    try:
        config = read_json(path, _MAX_BYTES, reach, lenient=True) if is_there(path) else None
    except (InputInvalid, InputUnreadable):
        return None
    return config if isinstance(config, dict) else None


def library_of(config: Mapping[str, Any]) -> str | None:
    """Return the library that wrote a config, by how it names the architecture there."""
    if config.get("architectures"):
        return "transformers"
    if "_class_name" in config and "_diffusers_version" in config:
        return "diffusers"
    return "timm" if "architecture" in config and "pretrained_cfg" in config else None


class Hyperparameters:
    """The sizes and types in a config, wherever in it they stand; empty without one.

    Configs of models with several towers hold configs (`text_config`, `vision_config`), and families spell
    one thing in several ways (`num_attention_heads`, `n_head`). A value counts only where all that could be
    meant agree: what is not clear is not known. Values are used as plain numbers or not at all.
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self._sections = list(_sections(config or {}))
        self.types = frozenset(str(s["model_type"]) for s in self._sections if "model_type" in s)

    @property
    def unknown(self) -> str:
        """Why a layout that depends on the model cannot be told."""
        if not self.types:
            return _NO_CONFIG
        return f"its layout in a model of type {' / '.join(sorted(self.types))[:80]} is not known"

    def attention(self, outputs: int, inputs: int, *, grouped: bool) -> tuple[int, int, int] | None:
        """Return (query heads, key heads, head size) of a fused projection [outputs, inputs].

        Without `grouped` there are as many key heads as query heads, whatever other layers have.
        """
        found = set()
        for section in self._sections:
            query, width = _number(section, _HEADS), _number(section, _WIDTH)
            if query is None or width != inputs:
                continue
            inner = section.get("attn_config")
            key = _number({**(inner if isinstance(inner, Mapping) else {}), **section}, _KEY_HEADS)
            key = key if key is not None and grouped else query
            size = _number(section, ("head_dim",)) or width // query
            if (query + 2 * key) * size == outputs:
                found.add((query, key, size))
        return found.pop() if len(found) == 1 else None

    def heads(self) -> int | None:
        """Return the number of attention heads."""
        return self.number(*_HEADS)

    def number(self, *keys: str) -> int | None:
        """Return what the first of `keys` that a section has is in it, if all sections agree."""
        found = {_number(section, keys) for section in self._sections} - {None}
        return found.pop() if len(found) == 1 else None

    def flag(self, key: str) -> bool | None:
        """Return a setting that is true or false."""
        found = {value for section in self._sections if isinstance(value := section.get(key), bool)}
        return found.pop() if len(found) == 1 else None


def _sections(config: Mapping[str, Any], depth: int = 2) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if depth and isinstance(value, Mapping):
            yield from _sections(value, depth - 1)


def _number(section: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first of `keys` that is a whole number above 0."""
    return next((v for key in keys if type(v := section.get(key)) is int and v > 0), None)
