"""Folders as torch.distributed.checkpoint writes them: with torch's own classes, but without processes.

`save_chunked` cuts tensors into rectangles and deals them out to files, as the processes of a mesh would.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: A nested state dict's path to a value.
Path_ = tuple[Any, ...]


def save_chunked(
    folder: Path,
    values: Mapping[Path_, object],
    *,
    grid: int = 2,
    files: int = 2,
    edit: Any = lambda metadata: None,
) -> Path:
    """Write `values` by path, tensors in up to `grid` pieces along each of two dimensions; return `folder`.

    `edit` may change the metadata before it is written.
    """
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir(parents=True, exist_ok=True)
    contents = [io.BytesIO() for _ in range(files)]
    turn = itertools.cycle(range(files))
    metadata = Metadata({}, {}, {}, StorageMeta(checkpoint_id=folder), "1.0.0")

    def store(index: Any, content: bytes) -> None:
        number = next(turn)
        file = contents[number]
        metadata.storage_data[index] = _StorageInfo(f"__{number}_0.distcp", file.tell(), len(content))
        file.write(content)

    for path, value in values.items():
        key = ".".join(map(str, path))
        metadata.planner_data[key] = path
        if not isinstance(value, torch.Tensor):
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            store(MetadataIndex(key), _saved(value))
            continue
        described = TensorStorageMetadata(TensorProperties.create_from_tensor(value), value.size(), [])
        metadata.state_dict_metadata[key] = described
        for number, (offsets, sizes) in enumerate(_pieces(tuple(value.shape), grid)):
            described.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            part = value[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
            store(MetadataIndex(key, offsets, number), _saved(part.clone()))
    for number, file in enumerate(contents):
        (folder / f"__{number}_0.distcp").write_bytes(file.getvalue())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def load_chunked(folder: Path, *inside: str) -> dict[str, Any]:
    """What torch itself loads of a folder: the tensors of the state dict `inside` it, by their keys."""
    import warnings

    import torch
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(folder).read_metadata()
    wanted = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no process group
        dcp.load(wanted, checkpoint_id=folder, no_dist=True)
    prefix = "".join(f"{part}." for part in inside)
    return {key.removeprefix(prefix): value for key, value in wanted.items() if key.startswith(prefix)}


def _saved(value: object) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _pieces(shape: tuple[int, ...], grid: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offsets and sizes of the pieces of a shape, uneven where it cannot be shared out evenly."""
    sides = [_cuts(size, grid if axis < 2 else 1) for axis, size in enumerate(shape)]
    for sides_of_one in itertools.product(*sides):
        yield tuple(at for at, _ in sides_of_one), tuple(size for _, size in sides_of_one)


def _cuts(size: int, count: int) -> list[tuple[int, int]]:
    step = max(1, -(-size // count))
    return [(at, min(step, size - at)) for at in range(0, size, step)] or [(0, 0)]
