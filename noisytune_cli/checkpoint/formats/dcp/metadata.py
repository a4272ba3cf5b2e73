"""What `.metadata` says: the one pickle of a checkpoint of torch.distributed.checkpoint, read as plain data.

    state_dict_metadata   KEY -> dtype, shape and chunks (offsets and sizes), or a value saved as bytes
    planner_data          KEY -> its path in the nested state dict that was saved
    storage_data          (KEY, offsets) -> the file, the first byte and the length of what torch.save wrote

torch loads it with the standard unpickler, which runs what the file names. Here only the classes of this
table exist, and an object is its state. Whatever is inconsistent is refused: a name that leaves the folder, a
chunk that is stored nowhere, two that share bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from noisytune_cli.checkpoint.formats.torch.globals import DType, find_global
from noisytune_cli.checkpoint.formats.torch.pickle import BYTES_FOR_OPCODE, unpickle
from noisytune_cli.checkpoint.formats.torch.values import (
    Budget,
    Function,
    Kind,
    Made,
    Opaque,
    PickleFault,
    check_key,
)
from noisytune_cli.checkpoint.layout import CHUNKS_SUFFIX

_METADATA = "torch.distributed.checkpoint.metadata"
_KINDS = {
    **{
        f"{_METADATA}.{name}": Kind(name)
        for name in (
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            *("BytesStorageMetadata", "MetadataIndex", "StorageMeta"),
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": Kind("_StorageInfo"),
}

#: Calls whose results mean nothing here: where it was saved, and a deprecated field.
_OPAQUE = {
    name: Function(name, lambda *arguments, kind=name: Opaque(kind))
    for name in (
        f"{_METADATA}._MEM_FORMAT_ENCODING",
        *(f"pathlib{private}.{os}Path" for private in ("", "._local") for os in ("Posix", "Windows")),
    )
}
_FROM_TORCH = ("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict")

_RESAVE = "Load it where it was made, and save the model's state dict with torch.distributed.checkpoint.save"
_MAX_DIMENSIONS = 64
_LIMIT = 1 << 63

#: Deeper than any training loop nests its state, and longer than any file system lets a name be.
_MAX_PATH, _MAX_FILE_NAME = 16, 255

#: What reading a chunk costs, and each of its dimensions: what they take in memory.
_CHUNK, _DIMENSION = 200, 32


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a tensor, of `sizes` from `offsets` on; torch.save wrote it to a part of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor of a state dict: all of its elements lie in its chunks, in any number of files."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """What was saved: the nested state dict, with a ChunkedTensor for each tensor, and all files' names."""

    root: dict[object, object]
    files: tuple[str, ...]


def read_metadata(data: bytes, most_opcodes: int) -> Saved:
    """Return what the bytes of a `.metadata` say; raises PickleFault for what is not to be trusted."""
    value, end = unpickle(data, 0, _find_global, _no_storage, protocol=4, most=most_opcodes)
    if end != len(data):
        raise PickleFault(f"{len(data) - end} bytes follow the end of its pickle")
    metadata = _state(value, "Metadata")
    stored = _read_storage(metadata.get("storage_data"))
    entries = _dict(metadata.get("state_dict_metadata"), "state_dict_metadata")
    paths = metadata.get("planner_data")
    paths = paths if type(paths) is dict else {}
    root: dict[object, object] = {}
    # One list of chunks, or one path, may be that of every key.
    budget = Budget(most_opcodes * BYTES_FOR_OPCODE)
    chunks = 0
    for key, entry in entries.items():
        if type(key) is not str:
            raise PickleFault("a key of its state dict is no string")
        path = _check_path(paths.get(key, (key,)))
        budget.pay_for(path)
        tensor = None
        if _is(entry, "TensorStorageMetadata"):
            tensor = _read_tensor(key, path, entry, stored, budget)
            chunks += sum(bool(chunk.elements) for chunk in tensor.chunks)
            if chunks > len(stored):
                raise PickleFault(f"{key}: it lists more chunks than it says where they lie")
        _put(root, path, tensor)
    _check_apart(stored)
    return Saved(root, tuple(sorted({file for file, _, _ in stored.values()})))


#: For each key and offsets: a file's name, the first byte, and the number of bytes. Offsets are packed: a
#: file could choose tuples of numbers that all hash alike.
_Storage = Mapping[tuple[str, bytes | None], tuple[str, int, int]]

#: A path in the nested state dict.
_Place = tuple[str | int, ...]


def _find_global(module: str, name: str) -> object:
    full = f"{module}.{name}"
    found: object = _KINDS.get(full) or _OPAQUE.get(full)
    if found is None and (full in _FROM_TORCH or module == "torch"):
        found = find_global(module, name)
        if full not in _FROM_TORCH and not isinstance(found, DType):
            found = None
    if found is None:
        raise PickleFault(f"it names {full}, which torch.distributed.checkpoint has no need of", _RESAVE)
    return found


def _no_storage(identity: object) -> object:
    raise PickleFault("its pickle refers to a storage where a plain value belongs")


def _read_storage(value: object) -> _Storage:
    stored: dict[tuple[str, bytes | None], tuple[str, int, int]] = {}
    for index, info in _dict(value, "storage_data").items():
        at, where = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
        key, offset = at.get("fqn"), at.get("offset")
        if type(key) is not str:
            raise PickleFault("a key of its storage is no string")
        if where.get("transform_descriptors"):
            raise PickleFault(f"{key} is compressed, or encoded in another way", _RESAVE)
        place = (key, None if offset is None else _packed(_sizes(offset)))
        if place in stored:
            raise PickleFault(f"it says twice where a chunk of {key} lies")
        start, length = _size(where.get("offset")), _size(where.get("length"))
        stored[place] = (_file_name(where.get("relative_path")), start, length)
    return stored


def _read_tensor(key: str, path: _Place, entry: Made, stored: _Storage, budget: Budget) -> ChunkedTensor:
    state = _state(entry, "TensorStorageMetadata")
    properties = state.get("properties")
    described = properties.state if isinstance(properties, Made) else None
    if type(described) is not tuple or not described or not isinstance(described[0], DType):
        raise PickleFault(f"it does not say what dtype {key} has")
    shape, dtype = _sizes(state.get("size")), described[0]
    if math.prod(size for size in shape if size) * dtype.itemsize >= _LIMIT:
        raise PickleFault("a tensor's shape has more than 2^63 bytes")
    listed = state.get("chunks")
    if type(listed) is not list:
        raise PickleFault(f"it does not list the chunks of {key}")
    # Each chunk is looked for under the key, and gets a label with the path.
    names = len(key) + sum(len(part) for part in path if type(part) is str)
    budget.pay(len(listed) * (_CHUNK + _DIMENSION * len(shape) + names))
    chunks = tuple(_read_chunk(key, chunk, len(shape), stored) for chunk in listed)
    return ChunkedTensor(key, dtype, shape, chunks)


def _read_chunk(key: str, value: object, dimensions: int, stored: _Storage) -> Chunk:
    state = _state(value, "ChunkStorageMetadata")
    offsets, sizes = _sizes(state.get("offsets")), _sizes(state.get("sizes"))
    if not len(offsets) == len(sizes) == dimensions:
        raise PickleFault(f"a chunk of {key} has another number of dimensions")
    place = stored.get((key, _packed(offsets))) or stored.get((key, None))
    if place is None:
        raise PickleFault(f"it does not say where a chunk of {key} lies")
    return Chunk(offsets, sizes, *place)


def _check_path(path: object) -> _Place:
    """Return where in the state dict a value lies; raises PickleFault unless it can be a place."""
    if type(path) is tuple and len(path) > _MAX_PATH:
        raise PickleFault("its state dict is nested too deep")
    if type(path) is not tuple or not path or any(type(part) not in (str, int) for part in path):
        raise PickleFault("it does not say where in the state dict a value lies")
    check_key(path)
    return path


def _put(root: dict[object, object], path: _Place, leaf: object) -> None:
    """Put a value where its path leads to; items of lists are under their numbers."""
    inside = root
    for part in path[:-1]:
        below = inside.setdefault(part, {})
        if type(below) is not dict:
            raise PickleFault("its state dict holds a value and others below it")
        inside = below
    if path[-1] in inside:
        raise PickleFault("two values lie at the same place of its state dict")
    inside[path[-1]] = leaf


def _check_apart(stored: _Storage) -> None:
    """Raise PickleFault if two chunks or values share bytes of a file."""
    last, end = "", 0
    for file, start, length in sorted(stored.values()):
        if file == last and start < end:
            raise PickleFault(f"two of its chunks share bytes of {file}")
        last, end = file, start + length


def _file_name(value: object) -> str:
    if type(value) is str and len(value) > _MAX_FILE_NAME:
        raise PickleFault("it names a file with a name longer than any file has")
    if type(value) is not str or not value.endswith(CHUNKS_SUFFIX) or not value.isprintable():
        raise PickleFault(f"it names a file that is no *{CHUNKS_SUFFIX} file")
    if "/" in value or "\\" in value:
        raise PickleFault(f"it names the file {value}, which is not beside it")
    return value


def _is(value: object, kind: str) -> bool:
    return isinstance(value, Made) and value.kind == kind


def _state(value: object, kind: str) -> dict[Any, Any]:
    if not isinstance(value, Made) or value.kind != kind or type(value.state) is not dict:
        raise PickleFault(f"its pickle has something else where a {kind} belongs", _RESAVE)
    return value.state


def _dict(value: object, name: str) -> dict[Any, Any]:
    if type(value) is not dict:
        raise PickleFault(f"it has no {name}", _RESAVE)
    return value


def _sizes(value: object) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > _MAX_DIMENSIONS:
        raise PickleFault("its pickle has a shape or offsets that are none")
    return tuple(_size(item) for item in value)


def _packed(sizes: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(sizes)}q", *sizes)


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise PickleFault("its pickle has a size that is no number from 0 to 2^63")
    return value
