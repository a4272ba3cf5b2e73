"""fp8 weights with their scales, read as the BF16 weights that they stand for.

    W = bfloat16(float32(code) · float32(scale))       the product is rounded twice, nearest-even

Two forms are known: a scale for each block (`weight_scale_inv`, as DeepSeek writes it), and one scale for
the whole weight (`weight_scale`). A dequantised checkpoint looks like any other: its weights are BF16, their
scales are gone, and all that follows (std, noise, digests) is of those BF16 values. Weights and scales are
read tile by tile, so memory does not grow with the checkpoint.

Block scales: DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3. Codes: OCP 8-bit floating point
specification, E4M3.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.formats import Sink, Source
from noisytune_cli.checkpoint.formats._direct import Room
from noisytune_cli.checkpoint.quantized import refuse_quantized, refuse_quantized_config
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.noise.devices import open_device
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CODES = "F8_E4M3"
_DEFAULT_BLOCK = (128, 128)

#: How a config calls the methods whose weights may be of the two forms; the scales tell whether they are.
_METHODS = frozenset({"fp8", "modelopt", "compressed-tensors"})

_BLOCK_SCALE, _TENSOR_SCALE = "_scale_inv", "_scale"
#: What else belongs to a quantised weight, and has no meaning without it.
_ACTIVATION_SCALES = ("input_scale", "activation_scale")
_QUANTISED_CONFIGS = ("hf_quant_config.json",)


def check_config(config: Mapping[str, Any], path: str) -> None:
    """Raise InputInvalid if config.json alone says that the weights cannot be dequantised."""
    section = config.get("quantization_config")
    if not (isinstance(section, Mapping) and section.get("quant_method") in _METHODS):
        refuse_quantized_config(config, path)


def dequantize(checkpoint: Checkpoint, path: str) -> Checkpoint:
    """Return the checkpoint with its fp8 weights as BF16 ones, without their scales.

    Raises UsageError where it has none, InputInvalid where anything quantised is left or a scale does not
    fit.
    """
    if checkpoint.config is not None:
        check_config(checkpoint.config, path)
    block = _block_size(checkpoint)
    found = {tensor.name: (tensor, source) for source in checkpoint.sources for tensor in source.tensors}
    weights: dict[str, _Scale] = {}
    dropped: dict[str, str] = {}
    for name, (tensor, source) in found.items():
        if tensor.dtype != _CODES:
            continue
        scale = _find_scale(tensor, source, found, block)
        if scale is None:
            continue
        weights[name] = scale
        dropped[scale.tensor.name] = ""
        module = name[: name.rfind(".") + 1]
        dropped |= {module + end: name for end in _ACTIVATION_SCALES if module + end in found}
    config = {k: v for k, v in (checkpoint.config or {}).items() if k != "quantization_config"}
    sources = tuple(Dequantized(source, weights, frozenset(dropped)) for source in checkpoint.sources)
    made = replace(
        checkpoint,
        sources=sources,
        config=None if checkpoint.config is None else config,
        others=tuple(name for name in checkpoint.others if not _describes_codes(name)),
        left_out=(
            *checkpoint.left_out,
            *(
                (name, "it describes quantised weights")
                for name in checkpoint.others
                if _describes_codes(name)
            ),
            *((name, f"the activation scale of {of}, now dequantised") for name, of in dropped.items() if of),
        ),
    )
    refuse_quantized(made.tensors, config=made.config, metadata=made.metadata, path=path)
    if not weights:
        raise UsageError(
            "--dequantize",
            path=path,
            why="there is no fp8 weight with a scale in the checkpoint",
            next_step="Leave --dequantize out",
        )
    return made


@dataclass(frozen=True)
class _Scale:
    """Where a weight's scale is, and the rows and columns that share one (None: all of the weight)."""

    tensor: TensorSpec
    source: Source
    block: tuple[int, int] | None


class Dequantized:
    """One weight file whose fp8 weights are read as BF16 (see `formats.Source`)."""

    def __init__(self, inner: Source, scales: Mapping[str, _Scale], dropped: frozenset[str]) -> None:
        self.inner = inner
        self.path, self.name, self.size, self.mode = inner.path, inner.name, inner.size, inner.mode
        self.metadata, self.warnings, self.beside = inner.metadata, inner.warnings, inner.beside
        self.declared = inner.declared
        self._codes = {tensor.name: tensor for tensor in inner.tensors if tensor.name in scales}
        self._scales = scales
        self._device = open_device("cpu")
        self.tensors = tuple(
            replace(tensor, dtype="BF16", nbytes=2 * tensor.nbytes) if tensor.name in scales else tensor
            for tensor in inner.tensors
            if tensor.name not in dropped
        )

    @property
    def files(self) -> tuple[str, ...]:
        """The file's own."""
        return self.inner.files

    @property
    def header_digest(self) -> str:
        """The file's own."""
        return self.inner.header_digest

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """The file's own, of what is left."""
        left = {tensor.name for tensor in self.tensors}
        groups = (tuple(name for name in names if name in left) for names in self.inner.ties)
        return tuple(names for names in groups if len(names) > 1)

    def read(self, tensor: TensorSpec, start: int, buffer: memoryview) -> memoryview:
        """Return the `len(buffer)` bytes from byte `start` of `tensor`; of a BF16 weight, whole elements."""
        codes = self._codes.get(tensor.name)
        if codes is None:
            return self.inner.read(tensor, start, buffer)
        first, count = start // 2, len(buffer) // 2
        stored = self.inner.read(codes, first, memoryview(bytearray(count)))
        values = _E4M3[np.frombuffer(stored, np.uint8)]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found when it is measured
            _multiply(values, first, codes, self._scales[tensor.name])
        self._device.convert(values.view(np.uint8).data, buffer, "F32", "BF16")
        return buffer

    def create_sink(self, path: Path, mode: int = 0o666, room: Room | None = None) -> Sink:
        """Have none: the output's file is another (`output/convert.py`)."""
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raise Mismatch if the file is not what it was at open."""
        self.inner.check_unchanged()

    def check_sums(self) -> None:
        """Raise InputInvalid if what was read so far does not fit the file's checksums."""
        self.inner.check_sums()

    def close(self) -> None:
        """Close the file."""
        self.inner.close()


def _multiply(values: NDArray[np.float32], first: int, codes: TensorSpec, scale: _Scale) -> None:
    """Multiply the values of elements `first`… of a weight by their scales, in place."""
    if scale.block is None:
        values *= _read_scales(scale, 0, 1)[0]
        return
    columns = codes.shape[1]
    height, width = scale.block
    across = scale.tensor.shape[1]
    done = 0
    while done < len(values):
        row, begin = divmod(first + done, columns)
        # Whole rows of one row of blocks, or what there is of a single row.
        whole = begin == 0 and len(values) - done >= columns
        rows = min((len(values) - done) // columns, height - row % height) if whole else 1
        end = columns if whole else min(columns, begin + len(values) - done)
        low, high = begin // width, (end - 1) // width + 1
        row_of_scales = _read_scales(scale, row // height * across + low, high - low)
        spread = np.repeat(row_of_scales, width)[begin - low * width :][: end - begin]
        piece = values[done : done + rows * (end - begin)].reshape(rows, end - begin)
        piece *= spread
        done += piece.size


def _read_scales(scale: _Scale, first: int, count: int) -> NDArray[np.float32]:
    """Return `count` scales as float32."""
    size = FLOAT_DTYPES[scale.tensor.dtype]
    stored = scale.source.read(scale.tensor, first * size, memoryview(bytearray(count * size)))
    if scale.tensor.dtype == "F32":
        return np.frombuffer(stored, "<f4")
    return (np.frombuffer(stored, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _find_scale(
    codes: TensorSpec,
    source: Source,
    found: Mapping[str, tuple[TensorSpec, Source]],
    block: tuple[int, int],
) -> _Scale | None:
    """Return a weight's scale, or None where it has none of the known forms."""
    by_block, whole = found.get(codes.name + _BLOCK_SCALE), found.get(codes.name + _TENSOR_SCALE)
    if by_block is not None and by_block[0].elements > 1:
        tensor, holder = by_block
        expected = tuple(-(-n // size) for n, size in zip(codes.shape, block, strict=False))
        if len(codes.shape) != 2 or tensor.shape != expected:
            raise _does_not_fit(tensor, source, f"its shape is {list(tensor.shape)}, not {list(expected)}")
        return _checked(_Scale(tensor, holder, block))
    for candidate in (by_block, whole):
        if candidate is not None and candidate[0].elements == 1:
            return _checked(_Scale(*candidate, None))
    return None


def _checked(scale: _Scale) -> _Scale:
    if scale.tensor.dtype not in ("F32", "BF16"):
        raise _does_not_fit(scale.tensor, scale.source, f"its dtype is {scale.tensor.dtype}, not F32 or BF16")
    return scale


def _does_not_fit(tensor: TensorSpec, source: Source, why: str) -> InputInvalid:
    return InputInvalid(
        "cannot dequantise",
        path=source.path,
        tensor=tensor.name,
        why=f"the scale does not fit its weight: {why}",
        next_step="Fetch the checkpoint again, with the config that belongs to it",
    )


def _block_size(checkpoint: Checkpoint) -> tuple[int, int]:
    section = (checkpoint.config or {}).get("quantization_config")
    stated = section.get("weight_block_size") if isinstance(section, Mapping) else None
    if stated is None:
        return _DEFAULT_BLOCK
    if isinstance(stated, list) and len(stated) == 2 and all(type(n) is int and n > 0 for n in stated):
        return stated[0], stated[1]
    raise InputInvalid(
        "cannot dequantise",
        path=checkpoint.root,
        why="weight_block_size in its config is no pair of sizes",
        next_step="Fetch config.json again",
    )


def _describes_codes(name: str) -> bool:
    return posixpath.basename(name) in _QUANTISED_CONFIGS


def _decode(code: int) -> float:
    """Return the value of an E4M3 code: a sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


_E4M3 = np.array([_decode(code) for code in range(256)], np.float32)
