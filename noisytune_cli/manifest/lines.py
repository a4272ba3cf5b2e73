"""The usual lines of a manifest, read by their form.

A large manifest has a hundred thousand tensors, nearly all of them spelt and filled as usual. Such a line
gives the same record here as through `manifest/tensors.py`, several times as fast; anything else is None
here, and left to the strict reading there, which words every refusal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.manifest.consistency import PART_REASONS, REASONS, check_runs, joined, misfit
from noisytune_cli.manifest.fields import ManifestFault, is_float32
from noisytune_cli.manifest.line_forms import LONGEST_LINE, Shapes, part_pattern, tensor_pattern, text_of
from noisytune_cli.manifest.swift_records import twin
from noisytune_cli.noise import distributions
from noisytune_cli.records import (
    MAX_PARTS,
    Conversion,
    FileRecord,
    NoiseSpec,
    Part,
    PartReceipt,
    Reason,
    Receipt,
    Step,
    TensorSpec,
    ToldBy,
    out_dtype_of,
)

_MAX_PART_NAME = 64

_Tensor, _Step, _Receipt, _Part, _PartReceipt = map(twin, (TensorSpec, Step, Receipt, Part, PartReceipt))


class Lines:
    """Reads the lines of tensors, against the noise, the weight files, and what the output converts."""

    def __init__(self, noise: NoiseSpec, files: Sequence[FileRecord], conversion: Conversion) -> None:
        distribution = distributions.load(noise.distribution)
        self._amplitude, self._range = distribution.amplitude, distribution.noise_range
        range_keys = tuple(distribution.noise_range(0.0))
        self._line, self._part = tensor_pattern(range_keys), part_pattern(range_keys)
        self._counts = 11 + len(range_keys)  # the group of the first count
        self._null = [None] * (2 + len(range_keys))
        self._converts = conversion.dtype is not None
        self._noise, self._conversion = noise, conversion
        #: What else noise can be is left to the strict reading.
        self._is_usual = noise.needs_std and noise.kept == 1.0 and not noise.mix
        self._fewest = 1 if noise.scope == "global" else 2
        self._strengths = {repr(lam): lam for lam in (noise.lam, *(lam for _, lam in noise.rules)) if lam}
        self._files = {json.dumps(file.name)[1:-1]: file.name for file in files}
        self._shapes = Shapes()

    def read(self, text: str, at: int) -> tuple[Receipt, int] | None:
        """Return the receipt of the entry that begins at `at`, and where it ends."""
        line = self._line.match(text, at) if self._is_usual else None
        if line is None or (end := line.end()) - at > LONGEST_LINE:
            return None
        found = line.groups()
        raw_name, raw_stream, raw_file, dtype, out_dtype, raw_shape = found[:6]
        told_by, before, after, parts = found[-4:]
        name = raw_name if "\\" not in raw_name else text_of(raw_name)
        stream = name if raw_stream == raw_name else text_of(raw_stream)
        measured = self._shapes.find(dtype, raw_shape)
        file = self._files.get(raw_file)
        if name is None or stream is None or measured is None or file is None:
            return None
        dtype, shape, elements, nbytes = measured
        tensor = _Tensor(name, dtype, shape, file, 0, nbytes, "")
        tensor.__class__ = TensorSpec
        if after == before:
            after = before  # one string for both
        if parts is None:
            if (done := self._done(found, dtype, elements, REASONS)) is None:
                return None
            step = _Step(tensor, done[0], done[1], done[2], stream, (), told_by, out_dtype, (), None, False)
            step.doubt = told_by is not None and done[1] != "buffer"
            step.__class__ = Step
            receipt = _Receipt(*done, step, before, after, (), 0)
            receipt.__class__ = Receipt
        else:
            if (whole := self._whole(text, end, tensor, stream, found[6:-1])) is None:
                return None
            receipt, end = whole
            if out_dtype is not None or told_by is not None:
                step = replace(
                    receipt.step,
                    out_dtype=out_dtype,
                    told_by=cast(ToldBy | None, told_by),
                    doubt=told_by is not None,
                )
                receipt = replace(receipt, step=step)
        if self._converts and out_dtype_of(tensor, receipt.reason, self._conversion) != out_dtype:
            return None
        if out_dtype is None:
            if before is not after and receipt.action == "copy":
                return None
        elif not self._converts:
            return None
        return receipt, end

    def _whole(
        self, text: str, at: int, tensor: TensorSpec, stream: str, said: Sequence[str | Any]
    ) -> tuple[Receipt, int] | None:
        """Return the receipt of a tensor whose parts begin at `at` and make what is `said`, and its end."""
        action, reason, lam, *null, unchanged, clamped, _, before, after = said
        if self._noise.granularity != "matrix" or tensor.dtype not in FLOAT_DTYPES or null != self._null:
            return None
        receipts: list[PartReceipt] = []
        while len(receipts) < MAX_PARTS:
            found = self._part.match(text, at)
            if found is None or (receipt := self._read_part(found.groups(), tensor)) is None:
                return None
            receipts.append(receipt)
            at = found.end()
            if found[found.re.groups] != ", ":
                break
        else:
            return None
        if len(receipts) < 2:
            return None
        try:
            whole = joined(tensor, stream, tuple(receipts), before, after, "")
        except ManifestFault:
            return None
        made = whole.action, whole.reason, whole.lam, whole.unchanged, whole.clamped
        return (whole, at) if made == (action, reason, float(lam), int(unchanged), int(clamped)) else None

    def _read_part(self, found: Sequence[str | Any], tensor: TensorSpec) -> PartReceipt | None:
        name, raw_shape, *runs = found[:6]
        first, length, stride, repeat = map(int, runs)
        measured = self._shapes.find(tensor.dtype, raw_shape)
        if (
            measured is None
            or len(name) > _MAX_PART_NAME
            or max(first, length, stride, repeat) > tensor.elements
        ):
            return None
        part = _Part(name, measured[1], first, length, stride, repeat)
        part.__class__ = Part
        try:
            check_runs(part, tensor, "")
        except ManifestFault:
            return None
        if (done := self._done(found, tensor.dtype, length * repeat, PART_REASONS)) is None:
            return None
        receipt: Any = _PartReceipt(*done, part)
        receipt.__class__ = PartReceipt
        return cast(PartReceipt, receipt)

    def _done(
        self, found: Sequence[str | Any], dtype: str, elements: int, reasons: Mapping[str, Reason]
    ) -> tuple[Any, ...] | None:
        """Return what was done to a tensor or to a part of one, in the order of an Outcome's fields."""
        action, reason, raw_lam, raw_std, raw_amplitude = found[6:11]
        bounds = found[11 : self._counts]
        unchanged, clamped = int(found[self._counts]), int(found[self._counts + 1])
        std = None if raw_std is None else float(raw_std)
        if unchanged > elements or clamped > elements:
            return None
        if std is not None and not (std < math.inf and is_float32(std)):
            return None
        if action == "copy":
            known = reasons.get(reason)
            if known is None or raw_lam != "0.0" or unchanged or clamped:
                return None
            if raw_amplitude is not None or any(bound is not None for bound in bounds):
                return None
            if misfit(known, dtype, elements, std, self._noise.scope):
                return None
            return "copy", known, 0.0, std, None, None, None, None, 0, 0
        lam = self._strengths.get(raw_lam)
        if reason is not None or lam is None or not std or raw_amplitude is None or None in bounds:
            return None
        amplitude = float(raw_amplitude)
        if dtype not in FLOAT_DTYPES or elements < self._fewest or not 0.0 < amplitude < math.inf:
            return None
        if amplitude != self._amplitude(lam, std):
            return None
        expected = self._range(amplitude)
        if [*map(float, bounds)] != [*expected.values()]:
            return None
        find = expected.get
        low, high, noise_std = find("low"), find("high"), find("noise_std")
        return "perturb", None, lam, std, amplitude, low, high, noise_std, unchanged, clamped
