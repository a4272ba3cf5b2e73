"""Settle what a plan left open about ties: are the bytes of a known pair equal?

The names of a candidate are read side by side, tile by tile, and a name drops out as soon as no other agrees
with it so far. So an output layer that is not tied costs one tile, and only a real tie is read to its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from blake3 import blake3

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.plan.plan import confirm_ties
from noisytune_cli.plan.ties import split_tie
from noisytune_cli.records import Plan, TensorSpec, Tie

_TILE_BYTES = 1 << 20


def settle_ties(plans: Sequence[Plan], sources: Mapping[str, Source]) -> list[Plan]:
    """Return the plans, all of the same tensors, with their candidate ties confirmed or dropped.

    `sources` are keyed by file name.
    """
    candidates = [tie for tie in plans[0].ties if tie.evidence == "equal-bytes"]
    if not candidates:
        return list(plans)
    tensors = {step.tensor.name: step.tensor for step in plans[0].steps}
    confirmed: list[Tie] = []
    for tie in candidates:
        confirmed += split_tie(tie, _digest([tensors[name] for name in tie.names], sources))
    return [confirm_ties(plan, confirmed) for plan in plans]


def _digest(tensors: list[TensorSpec], sources: Mapping[str, Source]) -> dict[str, bytes]:
    """Return for each tensor, all of one size, a digest that equals another's exactly where the bytes do.

    Of a tensor unlike all others it covers only the tiles up to the first difference.
    """
    hashes = {tensor.name: blake3() for tensor in tensors}
    buffer = memoryview(bytearray(_TILE_BYTES))
    alike = tensors
    for at in range(0, tensors[0].nbytes, _TILE_BYTES):
        room = buffer[: tensors[0].nbytes - at]
        for tensor in alike:
            hashes[tensor.name].update(sources[tensor.file].read(tensor, at, room))
        seen = Counter(hashes[tensor.name].digest() for tensor in alike)
        alike = [tensor for tensor in alike if seen[hashes[tensor.name].digest()] > 1]
        if not alike:
            break
    return {name: content.digest() for name, content in hashes.items()}
