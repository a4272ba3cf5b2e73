"""Where files are not what a manifest says of them.

Base and output have the same header, so one comparison serves both: is this weight file, as far as its
header tells, the one that the manifest records? What tensors hold is a matter of digests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.errors import Mismatch
from noisytune_cli.records import FileRecord, Receipt, Step, TensorSpec

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
    first, others = differences[0], differences[1:_MAX_NAMED]
    why = f"{first.file}: {first.what}" if first.tensor is None else f"{first.what} ({first.file})"
    if others:
        why += "; the same or the like of " + ", ".join(
            other.file if other.tensor is None else f'"{other.tensor}"' for other in others
        )
    if (more := len(differences) - 1 - len(others)) > 0:
        why += f" and {more:,} more"
    return Mismatch(what, path=path, tensor=first.tensor, why=why, next_step=next_step)
