"""Checkpoints for tests: built from arrays, read back into bytes, and noised by the reference.

Shares nothing with the product but `noise/stream.py`, the NumPy reference: files are written and taken apart
here with `json` and `struct`, the standard deviation is that of exact rational arithmetic (`oracle.py`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
from malformed import frame
from numpy.typing import NDArray

from noisytune_cli.noise import distributions, stream
from noisytune_cli.records import NoiseSpec

#: dtype -> the NumPy dtype its stored values are handled in.
STORED = {
    **{dtype: stored for dtype, (stored, _, _) in oracle.STORED.items()},
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}

FLOATS = ("F32", "F64", "F16", "BF16")


@dataclass(frozen=True)
class Tensor:
    """One tensor to store: its dtype as safetensors spells it, and its stored values in their shape."""

    dtype: str
    values: NDArray[Any]

    @property
    def data(self) -> bytes:
        return np.ascontiguousarray(self.values, STORED[self.dtype]).tobytes()


Tensors = Mapping[str, Tensor]


def weights(dtype: str, *shape: int, seed: int = 0, centre: float = 0.0, width: float = 0.02) -> Tensor:
    """A float tensor with values like a weight matrix's."""
    drawn = oracle.weights(np.random.default_rng(seed), int(np.prod(shape)), dtype, centre, width)
    return Tensor(dtype, drawn.reshape(shape))


def numbers(dtype: str, *values: float) -> Tensor:
    """A vector of these numbers; NaN and infinities are written as they are."""
    if dtype == "BF16":
        bits = np.array(values, np.float32).view(np.uint32) >> np.uint32(16)
        return Tensor(dtype, bits.astype(np.uint16))
    return Tensor(dtype, np.array(values, STORED[dtype]))


def safetensors_bytes(
    tensors: Tensors, metadata: Mapping[str, str] | None = None, *, pad: int = 0, order: str = "given"
) -> bytes:
    """A safetensors file; `pad` spaces end the header, `order="reversed"` lays the data out backwards."""
    spans, data = {}, bytearray()
    for name in tensors if order == "given" else reversed(tensors):
        spans[name] = [len(data), len(data) + len(tensors[name].data)]
        data += tensors[name].data
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.values.shape, "data_offsets": spans[name]}
    return frame(json.dumps(header) + " " * pad, bytes(data))


def save(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, **layout: Any) -> Path:
    """Write a safetensors file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(tensors, metadata, **layout))
    return path


def save_sharded(root: Path, *shards: Tensors) -> Path:
    """Write shards and their index into a folder."""
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {}
    for name, tensors in zip(names, shards, strict=True):
        save(root / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def split(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Take a safetensors file apart: everything before the data, and the data of each tensor."""
    (length,) = struct.unpack("<Q", content[:8])
    start = 8 + length
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return content[:start], {name: content[start + a : start + b] for name, (a, b) in spans.items()}


def noised(tensors: Tensors, noise: NoiseSpec, streams: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """The bytes of float tensors with their noise, by the reference; `streams` are those of ties."""
    stds = {name: std32(tensor) for name, tensor in tensors.items()}
    if noise.scope == "global":
        every = [v for tensor in tensors.values() for v in floats(tensor)]
        stds = dict.fromkeys(tensors, oracle.std32(every))
    out = {}
    for name, tensor in tensors.items():
        amplitude = distributions.load(noise.distribution).amplitude(noise.lam, stds[name])
        source = (streams or {}).get(name, name)
        c = stream.coefficients(noise.distribution, noise.seed, source, 0, tensor.values.size)
        flat = np.ascontiguousarray(tensor.values, STORED[tensor.dtype]).ravel()
        out[name] = stream.add_noise(flat, tensor.dtype, c, amplitude)[0].tobytes()
    return out


def std32(tensor: Tensor) -> float:
    """The float32 nearest to the exact unbiased standard deviation of a tensor; 0 for a single value."""
    return oracle.std32(floats(tensor)) if tensor.values.size > 1 else 0.0


def floats(tensor: Tensor) -> list[float]:
    """The stored values as Python floats, row-major."""
    return oracle.values(tensor.values.ravel(), tensor.dtype)
