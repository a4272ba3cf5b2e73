"""Where files are not what a manifest says of them.

Base and output have the same header, so one comparison serves both: is this weight file, as far as its
header tells, the one that the manifest records? What tensors hold is a matter of digests. A manifest records
tensors as the base has them; `as_written` makes of it what the output's files, which may have other names,
dtypes and headers, are compared with.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import Mismatch
from noisytune_cli.escape import list_some
from noisytune_cli.output.convert import aligned
from noisytune_cli.records import FileRecord, Manifest, Receipt, Step, TensorSpec, with_output_files

#: How many differences an error line names.
_MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as recorded: a tensor of a file, or (`tensor` None) the file itself."""

    file: str
    tensor: str | None
    what: str


def compare_header(record: FileRecord, tensors: Sequence[TensorSpec], source: Source) -> list[Difference]:
    """Compare a weight file's size, header and list of tensors with what is recorded of them."""
    found: list[Difference] = []
    if source.size != record.size:
        found.append(Difference(record.name, None, f"it has {source.size:,} bytes, not {record.size:,}"))
    if source.header_digest != record.header_digest:
        found.append(Difference(record.name, None, "its header is another"))
    actual = {tensor.name: tensor for tensor in source.tensors}
    for tensor in tensors:
        other = actual.get(tensor.name)
        if other is None:
            found.append(Difference(record.name, tensor.name, "it is absent"))
        elif not same_kind(tensor, other):
            found.append(Difference(record.name, tensor.name, "its dtype or shape is another"))
    recorded = {tensor.name for tensor in tensors}
    found += [Difference(record.name, name, "it is not recorded") for name in actual if name not in recorded]
    if not found and [tensor.name for tensor in tensors] != list(actual):
        found.append(Difference(record.name, None, "its tensors are recorded in another order"))
    return found


def same_kind(a: TensorSpec, b: TensorSpec) -> bool:
    """Tell whether two tensors have one dtype and one shape."""
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def recorded_steps(receipts: Iterable[Receipt], files: Mapping[str, Source]) -> tuple[Step, ...]:
    """Return the recorded steps of the tensors that are in `files` (by recorded name) as recorded."""
    tensors = {name: {tensor.name: tensor for tensor in file.tensors} for name, file in files.items()}
    steps = []
    for receipt in receipts:
        recorded = receipt.step.tensor
        actual = tensors.get(recorded.file, {}).get(recorded.name)
        if actual is not None and same_kind(recorded, actual):
            steps.append(replace(receipt.step, tensor=actual))
    return tuple(steps)


def compare_receipts(recorded: Mapping[str, Receipt], done: Iterable[Receipt]) -> list[Difference]:
    """Compare what was done again, from the base, with what is recorded."""
    found = []
    for receipt in done:
        expected = recorded[receipt.step.tensor.name]
        if receipt.source_digest != expected.source_digest:
            what = "the base's bytes are not those recorded"
        elif receipt.digest != expected.digest:
            what = "the base with the recorded noise gives other bytes than recorded"
        elif _counts(receipt) != _counts(expected):
            what = "the counts of unchanged and clamped elements are not those recorded"
        else:
            continue
        found.append(Difference(expected.step.tensor.file, expected.step.tensor.name, what))
    return found


def _counts(receipt: Receipt) -> list[tuple[int, int]]:
    """Return how many elements of a tensor, and of each part of it, are unchanged and clamped."""
    return [(receipt.unchanged, receipt.clamped), *((p.unchanged, p.clamped) for p in receipt.parts)]


def mismatch(
    differences: Sequence[Difference], *, what: str, path: str | os.PathLike[str], next_step: str
) -> Mismatch:
    """Return the error that names the first of `differences`, at least one, and counts the rest."""
    first, *others = differences
    why = f"{first.file}: {first.what}" if first.tensor is None else f"{first.what} ({first.file})"
    if others:
        names = [other.file if other.tensor is None else f'"{other.tensor}"' for other in others]
        why += f"; the same or the like of {list_some(names, _MAX_NAMED - 1)}"
    return Mismatch(what, path=path, tensor=first.tensor, why=why, next_step=next_step)


def as_written(manifest: Manifest, files: Mapping[str, Source]) -> tuple[Manifest, list[Difference]]:
    """Return the manifest as it reads for the output, and what contradicts itself in that.

    `files` are the output's weight files, by recorded name, as far as they could be opened. A name that one
    of them stores under another is left out; what is recorded of it has to be what is recorded of that.
    """
    if manifest.output is None:
        return manifest, []
    receipts: list[Receipt] = []
    found: list[Difference] = []
    by_file: dict[str, list[Receipt]] = {file.name: [] for file in manifest.source.files}
    for receipt in manifest.receipts:
        by_file[receipt.step.tensor.file].append(receipt)
    digests = {receipt.step.tensor.name: receipt.digest for receipt in manifest.receipts}
    for base, made in zip(manifest.source.files, manifest.output.files, strict=True):
        own = [_as_written(receipt, made.name) for receipt in by_file[base.name]]
        source = files.get(made.name)
        present = {tensor.name for tensor in source.tensors} if source is not None else set()
        stored = []
        for receipt in own:
            name = receipt.step.tensor.name
            other = "" if source is None or name in present else source.metadata.get(name, "")
            if other not in present:
                stored.append(receipt)
            elif digests.get(other) != receipt.digest:
                found.append(
                    Difference(made.name, name, f'it is stored as "{other}", whose bytes are others')
                )
        if base.header_digest != made.header_digest:
            place = {t.name: i for i, t in enumerate(aligned([r.step.tensor for r in stored]))}
            stored.sort(key=lambda receipt: place[receipt.step.tensor.name])
        receipts += stored
    return replace(with_output_files(manifest), receipts=tuple(receipts)), found


def _as_written(receipt: Receipt, file: str) -> Receipt:
    """Return a receipt whose tensor is the output's."""
    tensor, dtype = receipt.step.tensor, receipt.step.out_dtype
    if dtype is not None:
        tensor = replace(tensor, dtype=dtype, nbytes=tensor.elements * FLOAT_DTYPES[dtype])
    return replace(receipt, step=replace(receipt.step, tensor=replace(tensor, file=file), out_dtype=None))
