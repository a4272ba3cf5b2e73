"""The tensors of a manifest, read and held against everything else that it says of them.

A manifest says what a tensor is and which file it is in, not where it lies there, which that file's header
does: the `offset` of these tensors is 0 and means nothing. There may be two hundred thousand, so what most of
them repeat (a shape, keys) is looked at once, and their records are built by twins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from noisytune_cli.dtypes import ALL_DTYPES, FLOAT_DTYPES, stored_bytes
from noisytune_cli.manifest.consistency import PART_REASONS, REASONS, check_runs, joined, misfit
from noisytune_cli.manifest.fields import Fields, ManifestFault
from noisytune_cli.manifest.swift_records import twin
from noisytune_cli.manifest.write import MAX_AMPLITUDES, MAX_LINES
from noisytune_cli.noise import distributions
from noisytune_cli.noise.amplitudes import amplitudes, overall
from noisytune_cli.reading import Document
from noisytune_cli.records import (
    MAX_PARTS,
    SHRUNK,
    Action,
    Conversion,
    FileRecord,
    NoiseSpec,
    OutputRecord,
    Part,
    PartReceipt,
    Reason,
    Receipt,
    Step,
    TensorSpec,
    ToldBy,
    out_dtype_of,
)

_DONE_KEYS = ("action", "lambda", "std", "amplitude", "unchanged", "clamped")
_KEYS_IN_MEMORY = ("name", "stream", "file", "dtype", "shape", *_DONE_KEYS)
_KEYS = (*_KEYS_IN_MEMORY, "source_digest", "digest")
#: What describes a part.
PART_KEYS = ("name", "shape", "first", "length", "stride", "repeat")
_PART_KEYS = (*PART_KEYS, *_DONE_KEYS)
_MAX_DIMENSION = 2**63 - 1
_PART_NAME = re.compile(r"(?=.{1,64}\Z)[a-z0-9_]+(?:\.[a-z0-9_]+)*", re.ASCII)
_OPTIONAL_KEYS = ("reason", "out_dtype", "told_by", "parts")
_OPTIONAL_PART_KEYS = ("reason",)
_NO_FILE = {"": ""}
#: By the words that a manifest has for them: what tells buffers, and what is done.
TOLD_BY: dict[str, ToldBy] = {by: by for by in get_args(ToldBy)}
ACTIONS: dict[str, Action] = {action: action for action in get_args(Action)}

#: Shapes that are kept, and the most dimensions of one.
_KEPT_SHAPES, _KEPT_DIMENSIONS = 1 << 12, 64

_Tensor, _Step, _Receipt, _Part, _PartReceipt = map(twin, (TensorSpec, Step, Receipt, Part, PartReceipt))

#: What was done to a matrix, in the order of an Outcome's fields.
_Done = tuple[
    Action,
    Reason | None,
    float,
    float | None,
    float | None,
    float | None,
    float | None,
    float | None,
    int,
    int,
]

#: Bytes of a weight file without tensors: a header's length, and `{}`.
SMALLEST_FILE = 10


def read_tensors(
    document: Document,
    limit: int,
    noise: NoiseSpec,
    files: Sequence[FileRecord],
    output: OutputRecord | None = None,
) -> tuple[Receipt, ...]:
    """Read at most `limit` entries: file by file, no name twice; in memory there are no files."""
    conversion = Conversion() if output is None else output.conversion
    reader = _Reader(noise, files, conversion)
    receipts: list[Receipt] = []
    parts = 0
    for i, entry in enumerate(document.entries(limit)):
        if (i + 1) * len(noise.mix) > MAX_AMPLITUDES:
            raise ManifestFault(f"its tensors have more than {MAX_AMPLITUDES:,} amplitudes of noise.mix")
        receipts.append(reader.read(entry, f"tensors[{i}]"))
        parts += len(receipts[-1].parts)
        if i + 1 + parts > MAX_LINES:
            raise ManifestFault(f"it has more than {MAX_LINES:,} tensors and parts")
    if len({receipt.step.tensor.name for receipt in receipts}) < len(receipts):
        raise ManifestFault("it has two tensors of one name")
    if not any(receipt.digest for receipt in receipts):
        return tuple(receipts)
    if not all(receipt.digest for receipt in receipts):
        raise ManifestFault("some of its tensors are in no file")
    _check_files(receipts, files, packed=2 if conversion.dequantized else 1)
    return tuple(receipts)


def _check_files(receipts: Sequence[Receipt], files: Sequence[FileRecord], *, packed: int) -> None:
    """Refuse tensors out of the order of their files, and any that its file has no room for.

    Their sum may be larger than the file: names that a pickle stores as one share their bytes. A quantised
    tensor has `packed` times fewer bytes there.
    """
    order = {file.name: place for place, file in enumerate(files)}
    places = [order[receipt.step.tensor.file] for receipt in receipts]
    if places != sorted(places):
        raise ManifestFault("its tensors are not in the order of source.files")
    room = [file.size - SMALLEST_FILE for file in files]
    for place, receipt in zip(places, receipts, strict=True):
        if receipt.step.tensor.nbytes > room[place] * packed:
            raise ManifestFault(f"source.files[{place}].size is less than its tensors need")


class Tensors:
    """What tensors are, as entries describe them; every shape is looked at once."""

    def __init__(self, names: Iterable[str]) -> None:
        """Take the names that a tensor's file may have."""
        self._files = {name: name for name in names}
        self._known: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], int, int]] = {}

    def read(self, fields: Fields, where: str, files: Mapping[str, str] | None = None) -> tuple[Any, int]:
        """Return the tensor of an entry, and how many elements it has."""
        name = fields.string("name")
        file = (self._files if files is None else files).get(fields.string("file"))
        if file is None:
            raise fields.fault("file", "is not one of source.files")
        dtype = ALL_DTYPES.get(fields.string("dtype"))
        if dtype is None:
            raise fields.fault("dtype", "is no dtype of any format")
        shape, elements, nbytes = self.measure(fields, where, dtype)
        tensor = _Tensor(name, dtype, shape, file, 0, nbytes, "")
        tensor.__class__ = TensorSpec
        return tensor, elements

    def measure(self, fields: Fields, where: str, dtype: str) -> tuple[tuple[int, ...], int, int]:
        """Return the shape of an entry, its elements and its bytes."""
        sizes = fields.list("shape")
        for n in sizes:
            if type(n) is not int:
                raise fields.fault("shape", _NO_SHAPE)
        shape = tuple(sizes)
        known = self._known.get((dtype, shape))
        if known is not None:
            return known
        if not all(0 <= n <= _MAX_DIMENSION for n in shape):
            raise fields.fault("shape", _NO_SHAPE)
        try:
            nbytes = stored_bytes(dtype, sizes)
        except ValueError as fault:
            raise ManifestFault(f"{where}: {fault}") from fault
        found = shape, math.prod(shape), nbytes
        if len(shape) <= _KEPT_DIMENSIONS:
            if len(self._known) >= _KEPT_SHAPES:
                self._known.clear()
            self._known[dtype, shape] = found
        return found


_NO_SHAPE = "is not a list of integers from 0 to 2^63 - 1"


def _part_shape(fields: Fields) -> tuple[int, ...]:
    shape = fields.list("shape")
    if not all(type(n) is int and 0 <= n <= _MAX_DIMENSION for n in shape):
        raise fields.fault("shape", _NO_SHAPE)
    return tuple(shape)


def read_part(fields: Fields, where: str, tensor: TensorSpec, elements: int) -> Part:
    """Return the part of a tensor of so many elements that an entry with PART_KEYS describes."""
    name, shape = fields.string("name"), _part_shape(fields)
    if not _PART_NAME.fullmatch(name):
        raise fields.fault("name", "is not made of small letters, digits, underscores and dots")
    first, length, stride, repeat = (
        fields.count(key, elements) for key in ("first", "length", "stride", "repeat")
    )
    part: Any = _Part(name, shape, first, length, stride, repeat)
    part.__class__ = Part
    check_runs(part, tensor, where)
    return part  # type: ignore[no-any-return]


class _Reader:
    """What an entry is read against: the noise, the weight files, and what the output converts."""

    def __init__(self, noise: NoiseSpec, files: Sequence[FileRecord], conversion: Conversion) -> None:
        self._noise = noise
        self._has_files = bool(files)
        self._tensors = Tensors(file.name for file in files)
        self._strengths = {noise.lam, *(lam for _, lam in noise.rules)}
        self._sigmas: dict[float, float] = {}
        if not noise.needs_std:
            self._sigmas = {self._amplitude(sigma, None): sigma for sigma in self._strengths}
        self._distribution = distributions.load(noise.distribution)
        self._range = tuple(self._distribution.noise_range(0.0))
        self._keys, self._keys_in_memory, self._part_keys = (
            (*keys, *self._range) for keys in (_KEYS, _KEYS_IN_MEMORY, _PART_KEYS)
        )
        self._conversion = conversion

    def read(self, entry: Any, where: str) -> Receipt:
        """Return the receipt that an entry stands for; where its tensor lies (offset) it does not say."""
        in_memory = isinstance(entry, dict) and entry.get("file") == ""
        if not in_memory and not self._has_files:
            raise ManifestFault("source.files is empty")
        keys = self._keys_in_memory if in_memory else self._keys
        fields = Fields(entry, where, keys, _OPTIONAL_KEYS)
        tensor, elements = self._tensors.read(fields, where, _NO_FILE if in_memory else None)
        source_digest = digest = ""
        if not in_memory:
            source_digest, digest = fields.digest("source_digest"), fields.digest("digest")
            if digest == source_digest:
                digest = source_digest  # one string for both
        stream = fields.string("stream")
        if stream == tensor.name:
            stream = tensor.name
        receipt: Any
        if fields.has("parts"):
            receipt = self._with_parts(fields, where, tensor, elements, stream, source_digest, digest)
            action, reason = receipt.action, receipt.reason
        else:
            done = self._done(fields, where, tensor.dtype, elements, REASONS)
            action, reason = done[:2]
        if action == "copy" and source_digest != digest and not fields.has("out_dtype"):
            raise ManifestFault(f"{where} is a copy, but its fields are those of a perturbed tensor")
        out_dtype = out_dtype_of(tensor, reason, self._conversion)
        if (fields.string("out_dtype") if fields.has("out_dtype") else None) != out_dtype:
            raise ManifestFault(f"{where} is not written in the dtype that output.dtype asks for")
        told_by = None
        if fields.has("told_by"):
            told_by = TOLD_BY[fields.choice("told_by", tuple(TOLD_BY))]
        doubt = told_by is not None and reason != "buffer"
        if fields.has("parts"):
            step = replace(receipt.step, told_by=told_by, out_dtype=out_dtype, doubt=doubt)
            whole: Receipt = replace(receipt, step=step)
            return whole
        step = _Step(tensor, action, reason, done[2], stream, (), told_by, out_dtype, (), None, doubt)
        step.__class__ = Step
        receipt = _Receipt(*done, step, source_digest, digest, (), 0)
        receipt.__class__ = Receipt
        return receipt  # type: ignore[no-any-return]

    def _with_parts(
        self,
        fields: Fields,
        where: str,
        tensor: TensorSpec,
        elements: int,
        stream: str,
        source_digest: str,
        digest: str,
    ) -> Receipt:
        """Return the receipt of a tensor whose matrices had a std each."""
        if self._noise.granularity != "matrix" or tensor.dtype not in FLOAT_DTYPES:
            raise fields.fault("parts", "is given for a tensor that has one std, or none")
        entries = fields.list("parts")
        if not 2 <= len(entries) <= MAX_PARTS:
            raise fields.fault("parts", f"is not a list of 2 to {MAX_PARTS:,} parts")
        receipts = tuple(
            self._part(entry, f"{where}.parts[{i}]", tensor, elements) for i, entry in enumerate(entries)
        )
        receipt = joined(tensor, stream, receipts, source_digest, digest, where)
        if fields.has("reason") != (receipt.reason is not None):
            raise fields.fault("reason", "is not that of its parts")
        expected = {
            "action": receipt.action,
            "reason": receipt.reason,
            "lambda": receipt.lam if self._noise.needs_std else None,
            "unchanged": receipt.unchanged,
            "clamped": receipt.clamped,
            **dict.fromkeys(("std", "amplitude", *self._range)),
        }
        for key, value in expected.items():
            if fields.has(key) and not fields.equals(key, value):
                raise fields.fault(key, "is not what its parts make it")
        return receipt

    def _part(self, entry: Any, where: str, tensor: TensorSpec, elements: int) -> PartReceipt:
        fields = Fields(entry, where, self._part_keys, _OPTIONAL_PART_KEYS)
        part = read_part(fields, where, tensor, elements)
        receipt: Any = _PartReceipt(
            *self._done(fields, where, tensor.dtype, part.elements, PART_REASONS), part
        )
        receipt.__class__ = PartReceipt
        return receipt  # type: ignore[no-any-return]

    def _done(
        self, fields: Fields, where: str, dtype: str, elements: int, reasons: Mapping[str, Reason]
    ) -> _Done:
        """Return what was done to a tensor or part of so many elements, which may be copied for `reasons`."""
        std = fields.float32("std")
        # That of a mixture is a sum in float64.
        mixes = bool(self._noise.mix)
        amplitude = fields.number("amplitude") if mixes else fields.float32("amplitude", signed=True)
        lam = self._strength(fields, amplitude)
        unchanged, clamped = fields.count("unchanged", elements), fields.count("clamped", elements)
        reason: Reason | None = None
        action = ACTIONS.get(fields.string("action"))
        if action is None:
            action = ACTIONS[fields.choice("action", tuple(ACTIONS))]
        if action == "perturb":
            self._check_perturbed(fields, dtype, elements, lam, std, amplitude)
        else:
            if not fields.has("reason"):
                raise fields.fault("reason", "is missing from a copy")
            reason = reasons[fields.choice("reason", tuple(reasons))]
            fault = misfit(reason, dtype, elements, std, self._noise.scope)
            if (action == "shrink") != (self._noise.kept != 1.0 and reason in SHRUNK):
                raise fields.fault("action", f"is {action}, which is not what noise.shrink makes of {reason}")
            # In memory whatever an earlier record does not name is excluded, an integer too.
            if fault and not (reason == "excluded" and fields.equals("file", "")):
                raise fields.fault(*fault)
            if lam or amplitude is not None or unchanged or clamped:
                raise ManifestFault(f"{where} is a copy, but its fields are those of a perturbed tensor")
        noise_range = self._check_range(fields, amplitude)
        find = noise_range.get
        low, high, noise_std = find("low"), find("high"), find("noise_std")
        return action, reason, lam, std, amplitude, low, high, noise_std, unchanged, clamped

    def _check_perturbed(
        self,
        fields: Fields,
        dtype: str,
        elements: int,
        lam: float,
        std: float | None,
        amplitude: float | None,
    ) -> None:
        if fields.has("reason"):
            raise fields.fault("reason", "is given for a tensor that is perturbed")
        if dtype not in FLOAT_DTYPES:
            raise fields.fault("action", "is perturb for a dtype that takes no noise")
        if elements < (2 if self._noise.scope == "matrix" else 1):
            raise fields.fault("action", "is perturb for a tensor that has no std")
        if not lam or lam not in self._strengths:
            raise fields.fault("lambda", "is none of those in noise")
        if not std if self._noise.needs_std else std is not None:
            raise fields.fault("std", "is not a number > 0" if self._noise.needs_std else "is given for σ")
        # Of σ the amplitude has told which it is.
        if not amplitude or (std is not None and amplitude != self._amplitude(lam, std)):
            raise fields.fault("amplitude", "is not that of lambda and std")

    def _amplitude(self, lam: float, std: float | None) -> float:
        if std is not None and not self._noise.mix:
            return self._distribution.amplitude(lam, std)  # type: ignore[no-any-return]
        return overall(self._noise, amplitudes(self._noise, lam, std))

    def _strength(self, fields: Fields, amplitude: float | None) -> float:
        """Return λ, or the σ of which an amplitude is."""
        if self._noise.needs_std:
            return fields.strength("lambda")
        if not fields.equals("lambda", None):
            raise fields.fault("lambda", "is given for σ")
        if amplitude is None:
            return 0.0
        if (sigma := self._sigmas.get(amplitude)) is None:
            raise fields.fault("amplitude", "is that of no σ in noise")
        return sigma

    def _check_range(self, fields: Fields, amplitude: float | None) -> dict[str, float]:
        """Return the noise's bounds or std, which must be those of its amplitude."""
        expected = {} if amplitude is None else self._distribution.noise_range(amplitude)
        for key in self._range:
            if not fields.holds(key, expected.get(key)):
                raise fields.fault(key, "is not that of the amplitude")
        return expected
