"""What a tensor belongs to, told by its name: its kind, and its layer of the model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from noisytune_cli.plan.patterns import match_names

#: The kinds, from the special to the general: an attention's bias is a bias.
KINDS = ("head", "embeddings", "norm", "bias", "attention", "mlp")

#: What belongs to no kind, and what to no layer.
OTHER, NO_LAYER = "other", "no layer"

#: A number that is a whole component of a name, as layers have.
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,6}(?=\.)")


def kinds_of(
    names: Sequence[str],
    buffers: Collection[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, str]:
    """Return the kind of each name: the first in the order of KINDS that it belongs to, or OTHER.

    Buffers are of no kind; of norms the shapes tell too, where they are given.
    """
    found: dict[str, str] = {}
    matched = match_names([f"@{kind}" for kind in KINDS], names, buffers, shapes)
    for kind, members in zip(KINDS, matched, strict=True):
        for name in members:
            found.setdefault(name, kind)
    return {name: found.get(name, OTHER) for name in names}


def layers_of(names: Sequence[str]) -> dict[str, str]:
    """Return the layer of each name, such as `encoder.layer.3`, or NO_LAYER.

    That is what ends at the first number of the name that counts something: where other names have another
    number in its place. (In `0.auto_model.encoder.layer.3.output.bias` the 0 counts nothing.) A model of one
    layer counts nothing at all, and the first number is taken.
    """
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for before, number in _numbered(name):
            numbers[before].add(number)
    layers = {}
    for name in names:
        places = [(before, number) for before, number in _numbered(name)]
        counting = [place for place in places if len(numbers[place[0]]) > 1] or places
        layers[name] = "".join(counting[0]) if counting else NO_LAYER
    return layers


def _numbered(name: str) -> Iterator[tuple[str, str]]:
    """Yield what stands before each of the first numbers of a name, and the number."""
    for _, found in zip(range(4), _NUMBER.finditer(name), strict=False):
        yield name[: found.start()], found[0]
