"""Folders of torch.distributed.checkpoint that are wrong, each with the verdict it must get.

Most are a good folder, a tensor `w` of 4 x 6 in four chunks of one file, with one thing changed of its
metadata.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chunked import save_chunked
from costly_pickles import hash_alike
from hostile import Hostile, fifo, sparse

Edit = Callable[[Any], object]


class Call:
    """An object whose pickle calls os.system."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def _good(root: Path, edit: Edit = lambda metadata: None) -> Path:
    import torch

    return save_chunked(root / "model", {("w",): torch.arange(24.0).reshape(4, 6)}, files=1, edit=edit)


def _edited(name: str, edit: Edit, *words: str) -> Hostile:
    return Hostile(f"chunks: {name}", lambda root: _good(root, edit), words)


def _laid(name: str, change: Callable[[Path], object], *words: str) -> Hostile:
    """A good folder of which `change` is made something else."""

    def lay(root: Path) -> Path:
        folder = _good(root)
        change(folder)
        return folder

    return Hostile(f"chunks: {name}", lay, words)


def _append_junk(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes() + b"junk")


def _metadata(name: str, content: bytes, *words: str) -> Hostile:
    return _laid(name, lambda folder: (folder / ".metadata").write_bytes(content), *words)


def _info(metadata: Any, number: int = 0) -> Any:
    return list(metadata.storage_data.values())[number]


def _w(metadata: Any) -> Any:
    return metadata.state_dict_metadata["w"]


def _move(info: Any, by: int) -> None:
    info.offset, info.length = info.offset + by, info.length - by


def _resize(metadata: Any, *sizes: int) -> None:
    import torch

    _w(metadata).size = torch.Size(sizes)


def _retype(metadata: Any, dtype: str) -> None:
    import torch

    _w(metadata).properties.dtype = getattr(torch, dtype)


def _path(value: str) -> Edit:
    return lambda m: setattr(_info(m), "relative_path", value)


def _below_a_value(metadata: Any) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata.state_dict_metadata["x"] = BytesStorageMetadata()
    metadata.planner_data["x"] = ("w", "x")


def _same_place(metadata: Any) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata.state_dict_metadata["x"] = BytesStorageMetadata()
    metadata.planner_data["x"] = ("w",)


def _crowd(metadata: Any, *sizes: tuple[int, int]) -> None:
    """Thousands of chunks side by side; of 2 x 5,000 elements, each next one has the next of these sizes."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    count = 5000
    _resize(metadata, 2, count)
    places = [
        ((y, x), sizes[x % len(sizes)]) for x in range(count) for y in range(0, 2, sizes[x % len(sizes)][0])
    ]
    _w(metadata).chunks = [ChunkStorageMetadata(torch.Size(a), torch.Size(n)) for a, n in places]
    metadata.storage_data = {
        MetadataIndex("w", a, i): _StorageInfo("__0_0.distcp", i, 1) for i, (a, _) in enumerate(places)
    }


def _one_list(metadata: Any) -> None:
    """1,000 tensors with one list of 1,000 chunks, which lie in one place each."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    _w(metadata).chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 6)))] * 1000
    info = _StorageInfo("__0_0.distcp", 0, 1)
    for number in range(1000):
        metadata.state_dict_metadata[f"w{number}"] = _w(metadata)
        metadata.storage_data[MetadataIndex(f"w{number}")] = info


def _empty_chunks(metadata: Any) -> None:
    """1,000 tensors with one list of 1,000 chunks of no elements."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    _one_list(metadata)
    _w(metadata).chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((0, 6)))] * 1000


def _long_name(metadata: Any) -> None:
    """A name of a million letters, which the label of each of 10,000 chunks holds."""
    _crowd(metadata, (1, 1))
    metadata.planner_data["w"] = ("x" * (1 << 20),)


def _deep_value(metadata: Any) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata.state_dict_metadata["x"] = BytesStorageMetadata()
    metadata.planner_data["x"] = ("optim",) + ("x",) * 16


def _offsets_alike(metadata: Any) -> None:
    """30,000 more chunks, whose offsets all hash alike."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    info = _StorageInfo("__9_0.distcp", 0, 0)
    for number, offset in enumerate(hash_alike(30_000)):
        index = MetadataIndex(str(number))
        metadata.storage_data[index] = info
        vars(index).update(fqn="w", offset=offset)  # only now, or this dictionary would be as slow


def _replaced(old: bytes, new: bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "__0_0.distcp"
        file.write_bytes(file.read_bytes().replace(old, new))

    return change


def _truncated(name: str, by: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


_HEAD = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93\x94"

CHUNKS = (
    _edited("a path out of the folder", _path("../x.distcp"), "not beside it"),
    _edited("an absolute path", _path("/etc/x.distcp"), "not beside it"),
    _edited("a path into a folder", _path("a/x.distcp"), "not beside it"),
    _edited("a file that holds no chunks", _path("config.json"), "no *.distcp file"),
    _edited("a file's name in escape codes", _path("\x1b[2J.distcp"), "no *.distcp file"),
    _edited("a file's name that is no string", lambda m: setattr(_info(m), "relative_path", 7), "*.distcp"),
    _edited("a file that is absent", _path("__9_0.distcp"), "__9_0.distcp", "absent"),
    _edited("a chunk missing", lambda m: _w(m).chunks.pop(), "w:", "of 24 elements"),
    _edited("a chunk twice", lambda m: _w(m).chunks.append(_w(m).chunks[0]), "w:", "more chunks"),
    _edited(
        "a chunk in the place of another", lambda m: _w(m).chunks.__setitem__(1, _w(m).chunks[0]), "overlap"
    ),
    _edited("a larger tensor", lambda m: _resize(m, 5, 6), "of 30 elements"),
    _edited("a smaller tensor", lambda m: _resize(m, 4, 5), "past the end of its tensor"),
    _edited("fewer dimensions", lambda m: _resize(m, 24), "number of dimensions"),
    _edited("an immense tensor", lambda m: _resize(m, 1 << 62, 1 << 62), "2^63 bytes"),
    _edited("a negative size", lambda m: _resize(m, -4, -6), "no number from 0"),
    _edited("a size that is no number", lambda m: setattr(_w(m), "size", ("4", 6)), "no number from 0"),
    _edited("no shape", lambda m: setattr(_w(m), "size", None), "shape"),
    _edited("chunks that are no list", lambda m: setattr(_w(m), "chunks", None), "list the chunks"),
    _edited("chunks that are none", lambda m: setattr(_w(m), "chunks", [1]), "ChunkStorageMetadata"),
    _edited("no properties", lambda m: setattr(_w(m), "properties", None), "what dtype w has"),
    _edited("an offset beyond the file", lambda m: setattr(_info(m), "offset", 1 << 40), "truncated"),
    _edited("a chunk that is not where it says", lambda m: _move(_info(m, 3), 7), "chunk 3 of w"),
    _edited("a length cut short", lambda m: setattr(_info(m), "length", 900), "truncated"),
    _edited("a length of nothing", lambda m: setattr(_info(m), "length", 0), "truncated"),
    _edited("an immense length", lambda m: setattr(_info(m, 3), "length", 1 << 62), "truncated"),
    _edited("a negative offset", lambda m: setattr(_info(m), "offset", -1), "no number from 0"),
    _edited("two chunks in one place", lambda m: setattr(_info(m, 1), "offset", 0), "share bytes"),
    _edited("compressed", lambda m: setattr(_info(m), "transform_descriptors", ["zstd"]), "compressed"),
    _edited("another dtype", lambda m: _retype(m, "float64"), "chunk 0 of w", "another tensor"),
    _edited("a quantised dtype", lambda m: _retype(m, "quint8"), "quint8"),
    _edited("no storage", lambda m: m.storage_data.clear(), "where a chunk of w lies"),
    _edited("storage that is None", lambda m: setattr(m, "storage_data", None), "no storage_data"),
    _edited("storage of strings", lambda m: setattr(m, "storage_data", {"w": "x"}), "MetadataIndex"),
    _edited("a state dict that is a list", lambda m: setattr(m, "state_dict_metadata", [1]), "no state_dict"),
    _edited("a key that is a number", lambda m: m.state_dict_metadata.update({7: _w(m)}), "no string"),
    _edited("no path", lambda m: m.planner_data.update({"w": ()}), "where in the state dict"),
    _edited("a path of numbers that are none", lambda m: m.planner_data.update({"w": (1.5,)}), "where in"),
    _edited("a path below a value", _below_a_value, "below it"),
    _edited("two values in one place", _same_place, "same place"),
    _edited("a path of 100 dictionaries", lambda m: m.planner_data.update({"w": ("x",) * 100}), "too deep"),
    _edited("a name with half a surrogate", lambda m: m.planner_data.update({"w": ("\ud800",)}), "surrogate"),
    _edited("thousands of chunks in a grid", lambda m: _crowd(m, (1, 1)), "chunk 0 of w"),
    _edited("thousands in no grid", lambda m: _crowd(m, (2, 1), (1, 1)), "side by side"),
    _edited("one list of chunks for 1,000 tensors", _one_list, "w0: it lists more chunks"),
    _edited("one list of empty chunks for 1,000 tensors", _empty_chunks, "again and again"),
    _edited("a name of 1 MB for 10,000 chunks", _long_name, "again and again"),
    _edited("30,000 offsets that hash alike", _offsets_alike, "__9_0.distcp", "absent"),
    _edited("a path of 17 parts", _deep_value, "too deep"),
    _edited("a file's name of 300 letters", _path("x" * 300 + ".distcp"), "longer than any file"),
    _edited("numbers in paths that hash alike", lambda m: m.planner_data.update({"w": (1 << 61,)}), "key"),
    _edited("a call of os.system", lambda m: setattr(m, "planner_data", Call("touch ran")), "posix.system"),
    _edited("a class of another module", lambda m: setattr(m, "planner_data", Path), "pathlib"),
    _edited(
        "a function of torch's", lambda m: setattr(m, "planner_data", _load()), "torch.serialization.load"
    ),
    _edited("300,000 paths", lambda m: m.planner_data.update(_paths(300_000)), "1,000,000 opcodes"),
    _metadata("an empty metadata", b"", "cut off"),
    _metadata("metadata of another kind", b"\x80\x04}.", "where a Metadata belongs"),
    _metadata("metadata without a state", _HEAD + b")\x81.", "where a Metadata belongs"),
    _metadata("an object of no class", b"\x80\x04})\x81.", "no class"),
    _metadata("an object made with arguments", _HEAD + b"K\x01\x85\x81.", "no class"),
    _metadata("a global whose name is no string", b"\x80\x04K\x01K\x01\x93.", "damaged"),
    _metadata("protocol 0", b"(dp0\n.", "opcode"),
    _metadata("a frame cut off", b"\x80\x04\x95\x01", "cut off"),
    _metadata("millions of objects", _HEAD + b"h\x00)\x81\x94" * (5 << 20) + b".", "1,000,000 opcodes"),
    _metadata("millions of dictionaries", b"\x80\x04" + b"}\x94" * (12 << 20) + b".", "1,000,000 opcodes"),
    _metadata("more than 32 MB", b"\x80\x04" + b"N" * (33 << 20) + b".", "is the limit"),
    _laid("metadata of a terabyte", _instead(".metadata", sparse(1 << 40)), "is the limit"),
    _laid("metadata that never answers", _instead(".metadata", fifo), "a FIFO"),
    _laid("metadata cut short", _truncated(".metadata", 1), "cut off"),
    _laid("junk after the metadata", _append_junk, "4 bytes follow"),
    _laid("no metadata", lambda f: (f / ".metadata").unlink(), "no .metadata"),
    _laid("chunks cut short", _truncated("__0_0.distcp", 1), "chunk 3 of w", "truncated"),
    _laid("chunks of a terabyte of nothing", _instead("__0_0.distcp", sparse(1 << 40)), "chunk 0 of w"),
    _laid("no chunks", lambda f: (f / "__0_0.distcp").write_bytes(b""), "truncated"),
    _laid("chunks that never answer", _instead("__0_0.distcp", fifo), "a FIFO"),
    _laid("chunks of another type", _replaced(b"FloatStorage", b"ShortStorage"), "CRC-32"),
    Hostile(
        "chunks: one of the files alone", lambda root: _good(root) / "__0_0.distcp", ("Give the folder",)
    ),
    Hostile("chunks: the metadata alone", lambda root: _good(root) / ".metadata", ("Give the folder",)),
)


def _load() -> object:
    import torch

    return torch.load


def _paths(count: int) -> dict[str, tuple[str]]:
    return {str(i): (str(i),) for i in range(count)}
