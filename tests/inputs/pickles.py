"""PyTorch checkpoints for tests, written by torch itself or, where it would not write them, by hand.

`Writer` spells a pickle opcode by opcode, so that a row of the table of malformed files can say exactly what
is wrong with it; `archive` and `legacy` are the two containers around a pickle.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

from checkpoints import Tensor, Tensors

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


def to_torch(tensor: Tensor) -> Any:
    """The same tensor in torch."""
    import torch

    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    kind, shape = kinds[tensor.dtype], tensor.values.shape
    if not tensor.data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(tensor.data), dtype=kind).reshape(shape)


def torch_bytes(tensors: Tensors, *, zipped: bool = True) -> bytes:
    """What torch.save writes of a state dict."""
    return saved({name: to_torch(tensor) for name, tensor in tensors.items()}, zipped=zipped)


def saved(value: object, *, zipped: bool = True) -> bytes:
    """What torch.save writes of anything."""
    import torch

    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


class Writer:
    """A pickle, opcode by opcode; each method adds to it and returns the writer."""

    def __init__(self) -> None:
        self.data = bytearray(b"\x80\x02")

    def raw(self, opcodes: bytes) -> Writer:
        """Add opcodes as they are."""
        self.data += opcodes
        return self

    def value(self, value: object) -> Writer:
        """Add a plain value as the standard library pickles it."""
        return self.raw(pickle.dumps(value, protocol=2)[2:-1])

    def name(self, module: str, name: str) -> Writer:
        """Add a global."""
        return self.raw(f"c{module}\n{name}\n".encode())

    def call(self, module: str, name: str, *arguments: object) -> Writer:
        """Add a call of a global with plain arguments."""
        return self.name(module, name).value(arguments).raw(b"R")

    def storage(
        self, key: str = "0", elements: int = 4, kind: str = "FloatStorage", legacy: bool = False
    ) -> Writer:
        """Add a storage of this many elements; a legacy one is said to be no view of another."""
        self.raw(b"(").value("storage").name("torch", kind).value(key).value("cpu").value(elements)
        return self.raw(b"NtQ" if legacy else b"tQ")

    def tensor(
        self, shape: object = (4,), stride: object = (1,), offset: object = 0, **storage: Any
    ) -> Writer:
        """Add a tensor that is a view of a storage."""
        self.name("torch._utils", "_rebuild_tensor_v2").raw(b"(").storage(**storage)
        self.value(offset).value(shape).value(stride).value(False)
        return self.call("collections", "OrderedDict").raw(b"tR")

    def state_dict(self, **members: Writer) -> Writer:
        """Add a dictionary of values that other writers have begun with."""
        self.raw(b"}(")
        for key, member in members.items():
            self.value(key).raw(bytes(member.data[2:]))
        return self.raw(b"u")

    def end(self) -> bytes:
        """The finished pickle."""
        return bytes(self.data + b".")


def one(**view: Any) -> bytes:
    """The pickle of a state dict with one tensor `w`, four floats unless said."""
    return Writer().state_dict(w=Writer().tensor(**view)).end()


def archive(
    content: bytes,
    storages: Mapping[str, bytes] | None = None,
    more: Mapping[str, bytes] | None = None,
    *,
    method: int = zipfile.ZIP_STORED,
    more_method: int | None = None,
) -> bytes:
    """A ZIP archive with this pickle, its storages (`0`: 16 bytes) and more records."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as zipped:
        zipped.writestr("m/data.pkl", content)
        zipped.writestr("m/version", "3\n")
        zipped.writestr("m/byteorder", "little")
        for key, data in ({"0": bytes(16)} if storages is None else storages).items():
            zipped.writestr(f"m/data/{key}", data)
        for name, data in (more or {}).items():
            zipped.writestr(name, data, more_method)
    return out.getvalue()


def legacy(content: bytes, storages: Mapping[str, bytes] | None = None, itemsize: int = 4) -> bytes:
    """A legacy file with this pickle and its storages (`0`: 16 bytes)."""
    storages = {"0": bytes(16)} if storages is None else storages
    system = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"int": 4}}
    out = b"".join(pickle.dumps(value, protocol=2) for value in (MAGIC, VERSION, system))
    out += content + pickle.dumps(list(storages), protocol=2)
    return out + b"".join(struct.pack("<q", len(data) // itemsize) + data for data in storages.values())
