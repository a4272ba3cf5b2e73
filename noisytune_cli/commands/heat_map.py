"""One number for each layer and kind of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from noisytune_cli.plan.groups import KINDS, OTHER

#: Where each kind comes in a list of them.
KIND_ORDER = {kind: place for place, kind in enumerate((*KINDS, OTHER))}


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A value for each layer (rows) and kind (columns), None where there is nothing."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def arrange(values: Mapping[tuple[str, str], float | None]) -> HeatMap:
    """Return the values of (layer, kind): layers as they come, kinds in their order."""
    layers = tuple(dict.fromkeys(layer for layer, _ in values))
    kinds = tuple(sorted({kind for _, kind in values}, key=KIND_ORDER.__getitem__))
    return HeatMap(
        layers, kinds, tuple(tuple(values.get((layer, kind)) for kind in kinds) for layer in layers)
    )
