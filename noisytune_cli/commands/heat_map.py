"""One number for each layer and kind of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from noisytune_cli.commands.sorting import natural
from noisytune_cli.plan.groups import KINDS, NO_LAYER, OTHER

#: Where each kind comes in a list of them.
KIND_ORDER = {kind: place for place, kind in enumerate((*KINDS, OTHER))}


def layer_order(layer: str) -> Any:
    """Return what sorts as a layer: by name, layer 2 before layer 10, after what is in none."""
    return layer != NO_LAYER, natural(layer)


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A value for each layer (rows) and kind (columns), None where there is nothing."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def arrange(values: Mapping[tuple[str, str], float | None]) -> HeatMap:
    """Return the values of (layer, kind), both in their order."""
    layers = tuple(sorted({layer for layer, _ in values}, key=layer_order))
    kinds = tuple(sorted({kind for _, kind in values}, key=KIND_ORDER.__getitem__))
    return HeatMap(
        layers, kinds, tuple(tuple(values.get((layer, kind)) for kind in kinds) for layer in layers)
    )
