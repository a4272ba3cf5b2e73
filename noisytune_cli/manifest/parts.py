"""The parts of a tensor in a manifest: together they are all of it, and make what is said of the whole.

They must lie apart: then adding noise to each adds it to every element once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from noisytune_cli.manifest.fields import ManifestFault
from noisytune_cli.records import Part, PartReceipt, Receipt, Step, TensorSpec, summed


def check_runs(part: Part, tensor: TensorSpec, where: str) -> None:
    """Raise ManifestFault where a part's runs do not lie apart, or its shape is not that of its elements."""
    single = part.repeat == 1
    if not (part.length and part.repeat) or (
        part.stride != part.length if single else part.stride <= part.length
    ):
        raise ManifestFault(f"{where} has no runs that lie apart")
    if len(part.shape) > len(tensor.shape) or math.prod(part.shape) != part.elements:
        raise ManifestFault(f"{where}.shape is not that of its elements")


def joined(
    tensor: TensorSpec,
    stream: str,
    receipts: tuple[PartReceipt, ...],
    source_digest: str,
    digest: str,
    where: str,
) -> Receipt:
    """Return the receipt of a tensor whose parts had a std each; ManifestFault where they do not make it."""
    parts = tuple(receipt.part for receipt in receipts)
    if len({part.name for part in parts}) < len(parts):
        raise ManifestFault(f"{where}.parts has two parts of one name")
    firsts = [part.first for part in parts]
    if firsts != sorted(firsts) or not cover_exactly(parts, tensor.elements):
        raise ManifestFault(f"{where}.parts do not lie one after the other, or are not all of the tensor")
    lam = max(receipt.lam for receipt in receipts)
    if any(receipt.lam not in (0.0, lam) for receipt in receipts):
        raise ManifestFault(f"{where}.parts have more than one lambda")
    step = Step(tensor, "perturb", None, lam, stream, parts=parts)
    return summed(step, receipts, source_digest, digest)


def cover_exactly(parts: Sequence[Part], elements: int) -> bool:
    """Say whether parts have every one of a tensor's elements, and none twice.

    The parts' runs are merged from coarse to fine: neighbours of one stride and number of runs, which
    together fill their stride, are one longer run. Only divisions that come apart so are accepted, as all
    that `cut`, `stack` and `within` make do.
    """
    pending = sorted((p.first, p.length, p.stride, p.repeat) for p in parts)
    merged: list[tuple[int, int]] = []  # (first, length) of single runs
    open_runs: list[int] = []  # first, length, stride, repeat of a group that has not filled its stride yet
    for first, length, stride, repeat in pending:
        if repeat == 1 and not open_runs:
            merged.append((first, length))
            continue
        if not open_runs:
            open_runs = [first, length, stride, repeat]
        elif [stride, repeat] == open_runs[2:] and first == open_runs[0] + open_runs[1]:
            open_runs[1] += length
        else:
            return False
        if open_runs[1] == stride:
            merged.append((open_runs[0], stride * repeat))
            open_runs = []
    at = 0
    for first, length in merged:
        if first != at:
            return False
        at += length
    return not open_runs and at == elements
