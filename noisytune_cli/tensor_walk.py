"""One tensor's walk: read, measure, add each output's noise, write.

A tensor that fits the slab is read once and kept there between measuring and adding; a larger one is read
twice, tile by tile, whatever the number of outputs. A tile counts elements, for in an output its bytes may be
more or fewer. Noise does not depend on who computes a tile, or when; digests need the tiles in order, so each
tile is hashed in its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blake3 import blake3

from noisytune_cli.crew import Hands, Pass
from noisytune_cli.errors import InputInvalid
from noisytune_cli.formats import Sink, Source
from noisytune_cli.moments import new_exact_sums
from noisytune_cli.part import Outcome, Part, Spread
from noisytune_cli.records import FLOAT_DTYPES, Receipt, Step, TensorSpec
from noisytune_cli.stream import LARGEST

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from noisytune_cli.walk import Variant, Walk


class TensorWalk:
    """One tensor, the `index`-th of every output's plan: what is known of it, and the passes over its tiles.

    `spreads` are what each output scales its noise with: to be set between `measure` and `write`.
    """

    def __init__(self, walk: Walk, outputs: Sequence[Variant], index: int, source: Source) -> None:
        steps = [output.plan.steps[index] for output in outputs]
        self.tensor = steps[0].tensor
        #: Whether an output needs its std.
        self.is_measured = any(output.measures(index) for output in outputs)
        self.spreads: Sequence[Spread | None] = [None] * len(outputs)
        self._walk, self._outputs, self._index, self._source = walk, outputs, index, source
        self._size = _unit(self.tensor)
        self._tiles = self._divide(max(self._size, *(_out_unit(step) for step in steps)))
        self.part = Part(walk.device, self.tensor.dtype, self.tensor.elements, len(self._tiles))
        self._slab: memoryview | None = None
        self._source_hash = blake3()
        self.receipts: tuple[Receipt, ...] = ()

    def measure_and_write(self, hands: Hands) -> None:
        """Do the whole walk of a tensor whose std is its own."""
        if self.is_measured:
            if self.tensor.nbytes <= len(hands.slab):
                self._slab = hands.slab[: self.tensor.nbytes]
            self.measure(hands, report=False)
            if self.part.finite:
                self.spreads = [self.part.spread(lambda: self._exact_sums(hands))] * len(self._outputs)
        self.write(hands)
        self._slab = None

    def measure(self, hands: Hands, report: bool = True) -> None:
        """Read the tensor for its moments and its source digest."""

        def tile(hands: Hands, index: int) -> None:
            data = self._read(hands, index)
            self.part.measure(index, data)
            with work.in_turn(index):
                self._source_hash.update(data)
            if report:
                self._walk.progress(len(data))

        work = Pass(len(self._tiles), tile)
        self._do(work, hands)

    def write(self, hands: Hands) -> None:
        """Write every output's tensor with its noise, or as it is, and leave the receipts."""
        written = [
            _Written(output, self._index, spread)
            for output, spread in zip(self._outputs, self.spreads, strict=True)
        ]
        work = Pass(len(self._tiles), lambda hands, index: self._write_tile(hands, work, index, written))
        self._do(work, hands)
        for one in written:
            one.check_range(self._source)
        source_digest = f"blake3:{self._source_hash.hexdigest()}"
        self.receipts = tuple(one.receipt(source_digest) for one in written)

    def add_exact_sums(self, sums: NDArray[np.int64], hands: Hands) -> None:
        """Add the tensor's values to exact sums."""
        for index in range(len(self._tiles)):
            data = self._slab_tile(index) if self._slab is not None else self._read(hands, index)
            self._walk.device.add_exact_sums(data, self.tensor.dtype, sums)

    def _exact_sums(self, hands: Hands) -> NDArray[np.int64]:
        sums = new_exact_sums()
        self.add_exact_sums(sums, hands)
        return sums

    def _write_tile(self, hands: Hands, work: Pass, index: int, written: Sequence[_Written]) -> None:
        """Write a tile to every output; each has a turn of its own, so that threads follow one another."""
        data = self._slab_tile(index) if self._slab is not None else self._read(hands, index)
        first, _ = self._tiles[index]
        if not self.is_measured:  # otherwise it was hashed when it was measured
            with work.in_turn(index):
                self._source_hash.update(data)
        for lane, one in enumerate(written, start=1):
            if one.is_plain_copy:
                one.write(first, data)
            else:
                out, unchanged, clamped, overflowed = one.make(self._walk, hands, data, first)
                one.write(first, out)
                with work.in_turn(index, lane):
                    one.hash.update(out)
                    one.outcome.unchanged += unchanged
                    one.outcome.clamped += clamped
                    one.overflowed += overflowed
            self._walk.progress(len(data))

    def _divide(self, unit: int) -> list[tuple[int, int]]:
        """Return (first element, elements) of each tile; `unit` is the most bytes of an element, anywhere."""
        count = self.tensor.nbytes // self._size
        most = self._walk.tile_bytes // unit
        return [(first, min(most, count - first)) for first in range(0, count, most)]

    def _slab_tile(self, index: int) -> memoryview:
        assert self._slab is not None
        first, count = self._tiles[index]
        return self._slab[first * self._size : (first + count) * self._size]

    def _read(self, hands: Hands, index: int) -> memoryview:
        """Return a tile's bytes, aligned to its elements."""
        first, count = self._tiles[index]
        room = self._slab_tile(index) if self._slab is not None else hands.tile[: count * self._size]
        data = self._source.read(self.tensor, first * self._size, room)
        if data is not room and (self._slab is not None or self.tensor.offset % self._size):
            room[:] = data
            return room
        return data

    def _do(self, work: Pass, hands: Hands) -> None:
        """Do a pass; with the slab alone (its tiles fit one thread's cache), else with whoever is idle."""
        if self._slab is not None:
            work.help(hands)
        else:
            hands.crew.share(work, hands)


class _Written:
    """One output's tensor while it is written."""

    def __init__(self, output: Variant, index: int, spread: Spread | None) -> None:
        self._step = step = output.plan.steps[index]
        self.outcome = Outcome(output.plan.noise, step, output.recorded.get(step.tensor.name))
        self.outcome.settle(spread)
        self.hash = blake3()
        #: How many of the source's finite values the output's dtype cannot hold.
        self.overflowed = 0
        self._unit = _out_unit(step)
        self._target = output.target(step)
        self._sink: Sink = output.sinks[step.tensor.file]

    @property
    def is_plain_copy(self) -> bool:
        """Whether the output has the source's bytes."""
        return self.outcome.amplitude is None and self._step.out_dtype is None

    def make(
        self, walk: Walk, hands: Hands, data: memoryview, first: int
    ) -> tuple[memoryview, int, int, int]:
        """Return the elements from `first` as the output has them, and (unchanged, clamped, overflowed)."""
        dtype, out_dtype = self._step.tensor.dtype, self._step.out_dtype
        out = hands.out[: len(data) // _unit(self._step.tensor) * self._unit]
        overflowed = 0
        if out_dtype is not None and (self.outcome.amplitude is None or _narrows(dtype, out_dtype)):
            overflowed = walk.device.convert(data, out, dtype, out_dtype)
        if self.outcome.amplitude is None:
            return out, 0, 0, overflowed
        return out, *self.outcome.add(walk.device, data, out, first), overflowed

    def write(self, first: int, data: memoryview) -> None:
        """Write elements from `first` to their place."""
        self._sink.write(self._target, first * self._unit, data)

    def check_range(self, source: Source) -> None:
        """Raise InputInvalid if the source has a value that overflows by itself, noise or none."""
        if not self.overflowed:
            return
        tensor, dtype = self._step.tensor, self._step.out_dtype or ""
        raise InputInvalid(
            f"cannot convert to {dtype}",
            path=source.path,
            tensor=tensor.name,
            why=f"{self.overflowed:,} of its {tensor.elements:,} values are beyond {LARGEST[dtype]:g}, "
            "the largest of that dtype",
            next_step="Choose a --dtype of a larger range, such as bfloat16 or float32",
        )

    def receipt(self, source_digest: str) -> Receipt:
        """Return what was done; a plain copy has the source's digest."""
        return self.outcome.receipt(
            source_digest, source_digest if self.is_plain_copy else f"blake3:{self.hash.hexdigest()}"
        )


def _unit(tensor: TensorSpec) -> int:
    """Return the bytes of an element; of what takes no noise, bytes are the elements."""
    return FLOAT_DTYPES.get(tensor.dtype, 1)


def _out_unit(step: Step) -> int:
    """Return the bytes of an element in the output."""
    return _unit(step.tensor) if step.out_dtype is None else FLOAT_DTYPES[step.out_dtype]


def _narrows(dtype: str, out_dtype: str) -> bool:
    return LARGEST[dtype] > LARGEST[out_dtype]
