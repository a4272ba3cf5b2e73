"""What fields of a manifest have to say together: a reason fits its tensor, and parts are all of theirs.

A reason for a copy says something of the dtype, the elements and the std. The parts of a tensor make what is
said of the whole, and they lie apart: then adding noise to each adds it to every element once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.manifest.fields import ManifestFault
from noisytune_cli.records import Part, PartReceipt, Reason, Receipt, Scope, Step, TensorSpec, summed

#: The reasons, by the word that a manifest has for them.
REASONS: dict[str, Reason] = {reason: reason for reason in get_args(Reason)}

#: What a part can be copied for: the rest is known of its tensor, which then has no parts.
PART_REASONS: dict[str, Reason] = {
    "one-element": "one-element",
    "constant": "constant",
    "non-finite": "non-finite",
    "unrepresentable": "unrepresentable",
}


def misfit(
    reason: Reason, dtype: str, elements: int, std: float | None, scope: Scope
) -> tuple[str, str] | None:
    """Return the field that contradicts a reason and in what way, or None where all fits."""
    is_float = dtype in FLOAT_DTYPES
    if (
        (reason == "not-float") == is_float
        or (reason == "empty") != (is_float and elements == 0)
        or (reason == "one-element" and (elements != 1 or scope != "matrix"))
    ):
        return "reason", f"is {reason}, which its dtype and shape are not"
    # An unrepresentable amplitude: std may be 0 (too small for a float32), null (too large), or any.
    fits = std == 0.0 if reason == "constant" else reason == "unrepresentable" or std is None
    return None if fits else ("std", f"does not fit the reason {reason}")


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
    lam = next((receipt.lam for receipt in receipts if receipt.lam), 0.0)
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
