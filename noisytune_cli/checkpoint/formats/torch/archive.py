"""The two containers of torch.save, brought to one shape: a pickled structure, and where its storages lie.

    ZIP      NAME/data.pkl, NAME/data/KEY for each storage, and a few small records
    legacy   four pickles (a magic number, a version, the writer's types, the structure), a pickled list of
             keys, and for each key the number of elements and the elements

The structure is unpickled by `pickle.py`, which calls nothing; no storage is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from noisytune_cli.checkpoint.formats.torch.globals import (
    DType,
    Storage,
    StoredTensor,
    find_global,
    storage_of,
)
from noisytune_cli.checkpoint.formats.torch.pickle import MAX_BYTES, unpickle
from noisytune_cli.checkpoint.formats.torch.values import PickleFault
from noisytune_cli.checkpoint.formats.torch.zip import Record, ZipFault, read_records

#: What the first pickle of a legacy file holds, and the second (torch.serialization).
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

_RESAVE = "Load it in torch, and save its state dict with torch.save"
_NO_SAVE = (
    "it is a Python pickle, but not one that torch.save wrote",
    "Load it where it was made, and save a state dict of tensors with torch.save",
)

#: What weights in an archive are called (Stable Baselines 3 puts policy.pth into a ZIP archive).
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_TORCHSCRIPT = (
    "it is a TorchScript archive, which is a program",
    "Load it with torch.jit.load, and save its state dict with torch.save",
)
_FETCH = "The file is damaged or unfinished: fetch it again"
_CHECKSUMS = "Fetch it again; if it was saved so, save it anew with checksums on"

Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Archive:
    """What was saved (`root`), all `views` of storages in it, and where in the file everything lies.

    `starts` is the first byte of each storage by key, `records` a ZIP's records by name.
    """

    root: object
    views: Sequence[StoredTensor]
    starts: Mapping[str, int]
    records: Mapping[str, Record]


def read_zip(read: Read, size: int) -> Archive:
    """Return what a ZIP archive of `size` bytes holds; raises PickleFault."""
    try:
        records = read_records(read, size)
    except ZipFault as fault:
        if fault.record.split("/")[1:2] == ["code"]:  # torch.jit.save compresses it
            raise PickleFault(*_TORCHSCRIPT) from fault
        raise PickleFault(str(fault), _FETCH) from fault
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    prefix = pickles[0].removesuffix("data.pkl") if pickles else ""
    outside = [name for name in records if not name.startswith(prefix)]
    if f"{prefix}constants.pkl" in records or any(name.startswith(f"{prefix}code/") for name in records):
        raise PickleFault(*_TORCHSCRIPT)
    if len(pickles) != 1 or outside:
        inside = next((name for name in records if not pickles and name.endswith(_WEIGHTS)), None)
        held = f", with {inside[:100]} in it" if inside else ""
        next_step = "Unpack it with unzip, and give the weights in it" if inside else _RESAVE
        raise PickleFault(f"it is a ZIP archive, but not one that torch.save wrote{held}", next_step)
    order = records.get(f"{prefix}byteorder")
    if order is not None and _checked(read, order) != b"little":
        raise PickleFault("its numbers are big-endian", _RESAVE)
    storages = _Storages(legacy=False)
    data = _checked(read, records[pickles[0]])
    root, end = unpickle(data, 0, find_global, storages.load)
    if end != len(data):
        raise PickleFault(f"{len(data) - end} bytes follow the end of its pickle")
    starts = {}
    for key, storage in storages.known.items():
        record = records.get(f"{prefix}data/{key}")
        if record is None:
            raise PickleFault(f"its pickle names the storage {key}, which has no record", _FETCH)
        if record.size != storage.whole:
            raise PickleFault(
                f"the storage {key} has {record.size:,} bytes, its pickle says {storage.whole:,}"
            )
        starts[key] = record.start
    return Archive(root, storages.views, starts, records)


def read_legacy(read: Read, size: int) -> Archive:
    """Return what a legacy file of `size` bytes holds; raises PickleFault."""
    data = read(0, min(size, MAX_BYTES))
    storages = _Storages(legacy=True)
    magic, at = unpickle(data, 0, _no_save, _no_storage)
    if magic != _LEGACY_MAGIC:
        raise PickleFault(*_NO_SAVE)
    version, at = unpickle(data, at, _no_global, _no_storage)
    if version != _LEGACY_VERSION:
        raise PickleFault("it was saved by a version of torch that is not known", _RESAVE)
    writer, at = unpickle(data, at, _no_global, _no_storage)
    if type(writer) is not dict or writer.get("little_endian") is not True:
        raise PickleFault("its numbers are big-endian", _RESAVE)
    root, at = unpickle(data, at, find_global, storages.load)
    keys, at = unpickle(data, at, _no_global, _no_storage)
    known = storages.known
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise PickleFault("its list of storages is not that of its pickle")
    # Each string once: the pickle may list a long one, and another equal to it, any number of times.
    distinct = {id(key): key for key in keys}.values()
    if not len(keys) == len(distinct) == len(known) or set(distinct) != known.keys():
        raise PickleFault("its list of storages is not that of its pickle")
    starts = {}
    for key in keys:
        storage = known[key]
        if at + 8 > size:
            raise PickleFault("it is truncated before the last storage", _FETCH)
        count = int.from_bytes(read(at, 8), "little", signed=True)
        itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
        if count * itemsize != storage.whole:
            raise PickleFault(f"the storage {key} has {count:,} elements, which its pickle denies")
        starts[key] = at + 8
        at += 8 + storage.whole
    if at != size:
        raise PickleFault(
            f"it is truncated: {at - size:,} bytes are missing"
            if at > size
            else f"{size - at:,} bytes follow its last storage",
            _FETCH,
        )
    return Archive(root, storages.views, starts, {})


def wrong_checksum(record: Record) -> PickleFault:
    """Return the fault of a record whose bytes do not fit its CRC-32."""
    return PickleFault(
        f"the CRC-32 of its record {record.name} is wrong: it is damaged, or was saved with "
        "torch.serialization.set_crc32_options(False)",
        _CHECKSUMS,
    )


class _Storages:
    """The storages that a pickle names, each described alike wherever it is named."""

    def __init__(self, *, legacy: bool) -> None:
        self.known: dict[str, Storage] = {}
        self.views: list[StoredTensor] = []
        self._legacy = legacy

    def load(self, identity: object) -> Storage:
        """Return the storage that a persistent id names."""
        storage = storage_of(identity, self.views, legacy=self._legacy)
        first = self.known.setdefault(storage.key, storage)
        described: tuple[DType | None, int] = (storage.dtype, storage.whole)
        if described != (first.dtype, first.whole):
            raise PickleFault(f"its pickle describes the storage {storage.key} in two ways")
        return storage


def _checked(read: Read, record: Record) -> bytes:
    """Return a small record's payload, which must fit its checksum."""
    if record.size > MAX_BYTES:
        raise PickleFault(f"its record {record.name} has {record.size:,} bytes; {MAX_BYTES:,} is the limit")
    data = read(record.start, record.size)
    if zlib.crc32(data) != record.crc:
        raise wrong_checksum(record)
    return data


def _no_save(module: str, name: str) -> object:
    raise PickleFault(*_NO_SAVE)


def _no_global(module: str, name: str) -> object:
    raise PickleFault(f"its pickle names {module}.{name} where a plain value belongs")


def _no_storage(identity: object) -> object:
    raise PickleFault("its pickle refers to a storage where a plain value belongs")
