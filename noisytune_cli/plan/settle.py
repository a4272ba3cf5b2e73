"""Settle what a plan left open: were the values computed, and are the bytes of a known pair equal?

A few values of each tensor are looked at, and nearly always that is all; what was computed is then read to be
sure of it, and is copied, so that no weight is read twice for this.
The names of a candidate are read side by side, tile by tile, and a name drops out as soon as no other agrees
with it so far. So an output layer that is not tied costs one tile, and only a real tie is read to its end.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.plan.evidence import computed
from noisytune_cli.plan.evidence.told import Told, ask_model, with_values
from noisytune_cli.plan.evidence.values import Values
from noisytune_cli.plan.plan import confirm_ties, names_included
from noisytune_cli.plan.ties import split_tie
from noisytune_cli.records import Plan, TensorSpec, Tie

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TILE_BYTES = 1 << 20

#: Bytes by which tensors of one shape are compared, and how many of one shape are: a layer's weights are as
#: many as there are layers or experts, and nobody ties these.
_FIRST_BYTES, _OF_ONE_SHAPE = 64, 16


def look_at_values(
    plan: Plan, told: Told, sources: Mapping[str, Source], names: Collection[str] | None = None
) -> Told:
    """Return what is told once the values of what would be perturbed were looked at (of `names`, if given).

    Of a pair both are looked at, whichever is named.
    """
    tensors = [step.tensor for step in plan.steps]
    if names is not None:
        pairs = [pair.names for pair in told.unsure if not set(pair.names).isdisjoint(names)]
        wanted = {*names, *itertools.chain(*pairs)}
        plan = replace(plan, steps=tuple(step for step in plan.steps if step.tensor.name in wanted))

    def values_of(tensor: TensorSpec) -> Values:
        from noisytune_cli.noise.stream import values

        size = FLOAT_DTYPES[tensor.dtype]

        def read(first: int, count: int) -> NDArray[Any]:
            room = memoryview(bytearray(count * size))
            return values(sources[tensor.file].read(tensor, first * size, room), tensor.dtype)

        return read

    found, settled = find_computed(plan, told, values_of)
    if told.models and (found or _is_tie_likely(plan, sources)):
        told = ask_model(told, tensors)
    return with_values(told, found, settled)


def find_computed(
    plan: Plan, told: Told, values_of: Callable[[TensorSpec], Values]
) -> tuple[dict[str, str], set[str]]:
    """Return the names whose values were computed, each with what shows it, and those left no doubt of.

    What the user includes is a parameter, whatever its values, but a kind holds no buffer.
    """
    included = names_included(plan.noise, [step.tensor for step in plan.steps])
    open_steps = {
        step.tensor.name: step
        for step in plan.steps
        if step.action != "copy" and step.tensor.name not in included and not told.tells(step.tensor.name)
    }
    found: dict[str, str] = {}
    for name, step in open_steps.items():
        if not computed.may_be_asked(step.tensor):
            continue
        if why := computed.look(step.tensor, values_of(step.tensor), plain=computed.is_plain(step.tensor)):
            found[name] = why
    for pair in told.unsure:
        if open_steps.keys() >= set(pair.names):
            first, second = (open_steps[name].tensor for name in pair.names)
            if why := computed.look_at_pair(pair.what, values_of(first), values_of(second), first.elements):
                found |= dict.fromkeys(pair.names, why)
    # What is constant is copied, whatever it is, unless it is to be shrunk.
    doubts = [open_steps[name].tensor for name in told.doubts if name in open_steps and name not in found]
    flat = [t for t in doubts if computed.is_constant(values_of(t), t.elements)]
    stays = plan.noise.scope == "matrix" and plan.noise.kept == 1.0
    return found, {tensor.name for tensor in flat} if stays else set()


def _is_tie_likely(plan: Plan, sources: Mapping[str, Source]) -> bool:
    """Say whether two tensors of one shape begin with the same bytes, and are no known pair."""
    tied = {name for tie in plan.ties for name in tie.names}
    alike: dict[tuple[str, tuple[int, ...]], list[TensorSpec]] = {}
    for step in plan.steps:
        if step.action == "perturb" and step.tensor.name not in tied:
            alike.setdefault((step.tensor.dtype, step.tensor.shape), []).append(step.tensor)
    for tensors in alike.values():
        if not 2 <= len(tensors) <= _OF_ONE_SHAPE:
            continue
        seen = set()
        for tensor in tensors:
            size = FLOAT_DTYPES[tensor.dtype]
            room = memoryview(bytearray(min(_FIRST_BYTES, tensor.nbytes)))
            begins = bytes(sources[tensor.file].read(tensor, 0, room))
            if begins in seen and begins != begins[:size] * (len(begins) // size):
                return True
            seen.add(begins)
    return False


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
