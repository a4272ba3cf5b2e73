"""The stored values of a tensor, tile by tile, as float64: what is compared or correlated, not noised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.noise.stream import values
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Values of a tile, so that tiles of two dtypes lie side by side.
TILE = 1 << 17


def read_values(source: Source, tensor: TensorSpec, first: int, room: memoryview) -> NDArray[np.float64]:
    """Return the values of a tile from element `first`; `room` has space for TILE of any dtype."""
    return values(read_tile(source, tensor, first, room), tensor.dtype)


def read_tile(source: Source, tensor: TensorSpec, first: int, room: memoryview) -> memoryview:
    """Return the same as it is stored."""
    size = FLOAT_DTYPES[tensor.dtype]
    count = min(TILE, tensor.elements - first)
    return source.read(tensor, first * size, room[: count * size])
