"""Small checkpoints of which only names and layout matter, and how opening one is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.errors import InputInvalid

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def save(path: Path, *names: str, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file with one F32 tensor of shape [2] for each name."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    for i, name in enumerate(names):
        header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8 * len(names)))
    return path


def write(root: Path, *names: str) -> None:
    """Write small files; what they hold does not matter."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def save_sharded(root: Path, weight_map: object = None, **more: Any) -> Path:
    """Write two shards, a and b in the first, c in the second, and an index."""
    save(root / SHARDS[0], "a", "b", metadata={"format": "pt"})
    save(root / SHARDS[1], "c")
    index = {
        "weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]} if weight_map is None else weight_map
    }
    (root / "model.safetensors.index.json").write_text(json.dumps(index | more))
    return root


def refused(source: Path | str, **options: Any) -> str:
    """Return the one line with which opening is refused as malformed."""
    with pytest.raises(InputInvalid) as caught:
        open_checkpoint(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(checkpoint: Checkpoint) -> list[str]:
    return [source.name for source in checkpoint.sources]
