"""What torch.save names in a pickle, and what it stands for here: storages, dtypes, tensors, and no code.

The table below is a part of what torch.load(weights_only=True) allows: a name that is not in it is refused.
A tensor is only described (`StoredTensor`): which storage holds it, where, with what shape and strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from noisytune_cli.checkpoint.formats.torch.values import Function, Opaque, PickleFault, check_key

_STATE_DICT = "Load it where it was made, and save only its state dict: torch.save(model.state_dict(), FILE)"
_DENSE = "Load it in torch, turn it into a plain tensor, and save the state dict again"

#: torch's dtypes as safetensors spells them, and bytes an element.
_DTYPES = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1),
    "uint64": ("U64", 8), "uint32": ("U32", 4), "uint16": ("U16", 2), "bool": ("BOOL", 1),
    "complex32": ("C32", 4), "complex64": ("C64", 8), "complex128": ("C128", 16),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "float8_e8m0fnu": ("F8_E8M0", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1), "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
}  # fmt: skip

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip

#: Tensors that weights_only allows and that have no plain elements in a storage of their own.
_UNSUPPORTED = {
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_wrapper_subclass": "a tensor subclass",
    "_rebuild_device_tensor_from_numpy": "a tensor of a device that torch.save turns into NumPy",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of a device that torch.save copies first",
}

#: What makes a tensor of class torch.Tensor, and alone may be called through `_rebuild_from_type_v2`.
_PLAIN = frozenset(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))

_MAX_DIMENSIONS = 64
_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class DType:
    """An element type: safetensors' name, and bytes an element."""

    name: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class StorageType:
    """The class of a storage; an untyped one counts in bytes and has no dtype of its own."""

    dtype: DType | None


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """`nbytes` bytes from byte `start` of the `whole` bytes stored under `key`, as elements of `dtype`.

    `views` gathers every tensor that is made of any storage in the file.
    """

    key: str
    dtype: DType | None
    whole: int
    start: int
    nbytes: int
    views: list[StoredTensor]


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """Elements of `dtype` from byte `start` of the storage `key`; `stride` is in elements."""

    key: str
    dtype: DType
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes from its first element to its last, gaps included."""
        if 0 in self.shape:
            return 0
        steps = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (1 + steps) * self.dtype.itemsize

    @property
    def slot(self) -> tuple[object, ...]:
        """What two names of one parameter have in common (an axis of one element has no stride).

        Its numbers are text: a file could choose tuples of them that all hash alike.
        """
        steps = tuple(0 if n == 1 else step for n, step in zip(self.shape, self.stride, strict=True))
        return self.key, self.dtype.name, f"{self.start} {self.shape} {steps}"


def find_global(module: str, name: str) -> object:
    """Return what a global of a pickle stands for; raises PickleFault for all that is not allowed."""
    full = f"{'builtins' if module == '__builtin__' else module}.{name}"
    found = _GLOBALS.get(full)
    if found is not None:
        return found
    if module == "torch._utils" and name in _UNSUPPORTED:
        raise PickleFault(f"it holds {_UNSUPPORTED[name]}", _DENSE)
    if module.startswith("torch.nn.modules"):
        raise PickleFault(f"it holds a whole model ({full}), not a state dict", _STATE_DICT)
    raise PickleFault(
        f"its pickle names {full}, which torch.load(weights_only=True) does not allow either", _STATE_DICT
    )


def storage_of(identity: object, views: list[StoredTensor], *, legacy: bool) -> Storage:
    """Return the storage that a persistent id names.

    It is `("storage", type, key, location, elements)`, in legacy files with a sixth item: None, or a view's
    `(key, offset, elements)`.
    """
    if type(identity) is not tuple or len(identity) != (6 if legacy else 5) or identity[0] != "storage":
        if type(identity) is tuple and identity[:1] == ("module",):
            raise PickleFault("it holds a whole model, not a state dict", _STATE_DICT)
        raise PickleFault("its pickle refers to something that is no storage")
    _, kind, key, location, elements, *view = identity
    if not isinstance(kind, StorageType) or type(key) is not str or type(location) is not str:
        raise PickleFault("its pickle describes a storage wrongly")
    size = 1 if kind.dtype is None else kind.dtype.itemsize
    start, whole = 0, _size(elements) * size
    nbytes = whole
    if view and view[0] is not None:
        if type(view[0]) is not tuple or len(view[0]) != 3:
            raise PickleFault("its pickle describes a storage wrongly")
        start, nbytes = _size(view[0][1]) * size, _size(view[0][2]) * size
        if start + nbytes > whole:
            raise PickleFault("a view of a storage goes past its end")
    return Storage(key, kind.dtype, whole, start, nbytes, views)


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise PickleFault("its pickle has a size that is no number from 0 to 2^63")
    return value


def _sizes(values: object) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > _MAX_DIMENSIONS:
        raise PickleFault("its pickle has a shape or strides that are none")
    return tuple(_size(value) for value in values)


def _tensor(
    storage: object, offset: object, shape: object, stride: object, dtype: DType | None = None
) -> StoredTensor:
    """Describe a tensor; raises PickleFault unless it lies in its storage."""
    if not isinstance(storage, Storage):
        raise PickleFault("its pickle makes a tensor of something that is no storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise PickleFault("its pickle makes a tensor without a dtype")
    sizes, strides, first = _sizes(shape), _sizes(stride), _size(offset)
    if len(sizes) != len(strides):
        raise PickleFault("a tensor's shape and strides differ in length")
    if math.prod(size for size in sizes if size) * dtype.itemsize >= _LIMIT:
        raise PickleFault("a tensor's shape has more than 2^63 bytes")
    if 0 not in sizes:
        last = first + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
        if (last + 1) * dtype.itemsize > storage.nbytes:
            raise PickleFault(f"a tensor of shape {list(sizes)} goes past the end of its storage")
    tensor = StoredTensor(storage.key, dtype, storage.start + first * dtype.itemsize, sizes, strides)
    storage.views.append(tensor)
    return tensor


def _check_bits(tensor: StoredTensor, metadata: object) -> StoredTensor:
    """Refuse a tensor whose stored elements are to be negated or conjugated when it is read."""
    if metadata is None:
        return tensor
    if type(metadata) is not dict or metadata.get("neg"):
        raise PickleFault("a tensor is stored with its sign to be turned (neg bit)", _DENSE)
    if metadata.get("conj"):
        raise PickleFault("a tensor is stored as the conjugate of what is to be read (conj bit)", _DENSE)
    return tensor


def _rebuild_tensor(storage: object, offset: object, shape: object, stride: object) -> StoredTensor:
    return _tensor(storage, offset, shape, stride)


def _rebuild_tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    metadata: object = None,
) -> StoredTensor:
    return _check_bits(_tensor(storage, offset, shape, stride), metadata)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> StoredTensor:
    if not isinstance(dtype, DType):
        raise PickleFault("its pickle makes a tensor without a dtype")
    return _check_bits(_tensor(storage, offset, shape, stride, dtype), metadata)


def _rebuild_parameter(data: object, requires_grad: object, hooks: object, state: object = None) -> object:
    if not isinstance(data, StoredTensor):
        raise PickleFault("its pickle makes a parameter of something that is no tensor")
    return data


def _rebuild_from_type(function: object, kind: object, arguments: object, state: object) -> object:
    if not isinstance(function, Function) or function.name not in _PLAIN:
        raise PickleFault("it holds a tensor subclass", _DENSE)
    if kind is not _TENSOR or type(arguments) is not tuple:
        raise PickleFault("it holds a tensor subclass", _DENSE)
    return function.call(*arguments)


def _ordered_dict(pairs: object = ()) -> dict[object, object]:
    if type(pairs) not in (list, tuple):
        raise TypeError
    made: dict[object, object] = {}
    for pair in pairs:  # type: ignore[attr-defined]
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise TypeError
        if type(pair[0]) is tuple:
            raise TypeError
        check_key(pair[0])
        made[pair[0]] = pair[1]
    return made


def _counter(counts: object = None) -> dict[object, object]:
    if counts is not None and type(counts) is not dict:
        raise TypeError
    return dict(counts or {})


def _bytearray(*content: object) -> Opaque:
    if content and type(content[0]) not in (bytes, str):
        raise PickleFault("its pickle makes a bytearray that is not in the file")
    return Opaque("bytearray")


def _encode(text: object, encoding: object = "utf-8") -> bytes:
    # How torch.save spells bytes; other codecs could inflate what they are given.
    if type(text) is not str or encoding != "latin1":
        raise PickleFault("its pickle encodes text in a way that torch.save does not")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise PickleFault("its pickle encodes text in a way that torch.save does not") from None


def _size_object(sizes: object = ()) -> tuple[int, ...]:
    return _sizes(tuple(sizes) if type(sizes) is list else sizes)


def _opaque(kind: str) -> Callable[..., Opaque]:
    return lambda *arguments: Opaque(kind)


_TENSOR = Opaque("torch.Tensor")

_FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size_object,
    "torch.device": _opaque("torch.device"),
    "torch.serialization._get_layout": _opaque("torch.layout"),
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "builtins.bytearray": _bytearray,
    "builtins.set": _opaque("set"),
    "builtins.complex": _opaque("complex"),
    "_codecs.encode": _encode,
}

_GLOBALS: dict[str, object] = {
    **{name: Function(name, call) for name, call in _FUNCTIONS.items()},
    **{f"torch.{name}": DType(*spelt) for name, spelt in _DTYPES.items()},
    **{
        f"{module}.{name}": StorageType(DType(*_DTYPES[dtype]))
        for module in ("torch", "torch.cuda")
        for name, dtype in _STORAGES.items()
    },
    "torch.storage.UntypedStorage": StorageType(None),
    "torch.Tensor": _TENSOR,
    "torch._tensor.Tensor": _TENSOR,
}
