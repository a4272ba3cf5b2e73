"""One tensor's walk: read, measure, add each output's noise, write.

A tensor that fits the slab is read once and kept there between measuring and adding; a larger one is read
twice, tile by tile, whatever the number of outputs. A tile counts elements, for in an output its bytes may be
more or fewer. Noise does not depend on who computes a tile, or when; digests need the tiles in order, so each
tile is hashed in its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from blake3 import blake3

from noisytune_cli.checkpoint.formats import Sink, Source
from noisytune_cli.engine.matrices import EXACT_AT_ONCE, Counts, Matrices, Outcomes
from noisytune_cli.engine.matrix import Spread
from noisytune_cli.engine.threads import Hands, Pass
from noisytune_cli.errors import InputInvalid
from noisytune_cli.noise.std import new_exact_sums
from noisytune_cli.noise.stream import LARGEST
from noisytune_cli.records import FLOAT_DTYPES, Receipt, Step, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from noisytune_cli.engine.walk import Variant, Walk


class TensorWalk:
    """One tensor, the `index`-th of every output's plan: what is known of it, and the passes over its tiles.

    `spreads` are, for each output, what it scales the noise of each matrix with: to be set between `measure`
    and `write`.
    """

    def __init__(self, walk: Walk, outputs: Sequence[Variant], index: int, source: Source) -> None:
        steps = [output.plan.steps[index] for output in outputs]
        self.tensor = steps[0].tensor
        #: Whether an output needs its std.
        self.is_measured = any(output.measures(index) for output in outputs)
        self.spreads: Sequence[Sequence[Spread | None]] = [()] * len(outputs)
        self._walk, self._outputs, self._index, self._source = walk, outputs, index, source
        self._size = _unit(self.tensor)
        self._tiles = self._divide(max(self._size, *(_out_unit(step) for step in steps)))
        self.matrices = Matrices(walk.device, self.tensor, steps[0].parts)
        self._slab: memoryview | None = None
        self._source_hash = blake3()
        self.receipts: tuple[Receipt, ...] = ()

    def measure_and_write(self, hands: Hands) -> None:
        """Do the whole walk of a tensor whose std is its own."""
        if self.is_measured:
            if self.tensor.nbytes <= len(hands.slab):
                self._slab = hands.slab[: self.tensor.nbytes]
            self.measure(hands, report=False)
            self.spreads = [self._own_spreads(hands)] * len(self._outputs)
        self.write(hands)
        self._slab = None

    def measure(self, hands: Hands, report: bool = True) -> None:
        """Read the tensor for its moments and its source digest."""

        def tile(hands: Hands, index: int) -> None:
            data = self._read(hands, index)
            self.matrices.measure(index, self._tiles[index][0], data)
            with work.in_turn(index):
                self._source_hash.update(data)
            if report:
                self._walk.progress(len(data))

        work = Pass(len(self._tiles), tile)
        self._do(work, hands)

    def write(self, hands: Hands) -> None:
        """Write every output's tensor with its noise, or as it is, and leave the receipts."""
        written = [
            _Written(output, self._index, spreads)
            for output, spreads in zip(self._outputs, self.spreads, strict=True)
        ]
        work = Pass(len(self._tiles), lambda hands, index: self._write_tile(hands, work, index, written))
        self._do(work, hands)
        for one in written:
            one.check_range(self._source)
        source_digest = f"blake3:{self._source_hash.hexdigest()}"
        self.receipts = tuple(one.receipt(source_digest) for one in written)

    def add_exact_sums(self, sums: Mapping[int, NDArray[np.int64]], hands: Hands) -> None:
        """Add the values of each matrix that `sums` has exact sums for to these."""
        for index, (first, _) in enumerate(self._tiles):
            hands.crew.check()
            data = self._slab_tile(index) if self._slab is not None else self._read(hands, index)
            self.matrices.add_exact_sums(sums, first, data)

    def _own_spreads(self, hands: Hands) -> list[Spread | None]:
        """Return the spread of each matrix alone, None for one that has none."""
        sums = self.matrices.sums
        spreads = [one.spread() if one.has_std else None for one in sums]
        undecided = [i for i, spread in enumerate(spreads) if spread is None and sums[i].has_std]
        for at in range(0, len(undecided), EXACT_AT_ONCE):
            exact = {i: new_exact_sums() for i in undecided[at : at + EXACT_AT_ONCE]}
            self.add_exact_sums(exact, hands)
            for i, found in exact.items():
                spreads[i] = sums[i].exact_spread(found)
        return spreads

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
                out, counts, overflowed = one.make(self._walk, hands, data, first)
                one.write(first, out)
                with work.in_turn(index, lane):
                    one.hash.update(out)
                    one.outcomes.count(counts)
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

    def __init__(self, output: Variant, index: int, spreads: Sequence[Spread | None]) -> None:
        self._step = step = output.plan.steps[index]
        recorded = output.recorded.get(step.tensor.name)
        self.outcomes = Outcomes(output.plan.noise, step, recorded, spreads)
        self.hash = blake3()
        #: How many of the source's finite values the output's dtype cannot hold.
        self.overflowed = 0
        self._unit = _out_unit(step)
        self._target = output.target(step)
        self._sink: Sink = output.sinks[step.tensor.file]

    @property
    def is_plain_copy(self) -> bool:
        """Whether the output has the source's bytes."""
        return not self.outcomes.perturbs and self._step.out_dtype is None

    def make(
        self, walk: Walk, hands: Hands, data: memoryview, first: int
    ) -> tuple[memoryview, list[Counts], int]:
        """Return the elements from `first` as the output has them, their counts, and how many overflowed."""
        dtype, out_dtype = self._step.tensor.dtype, self._step.out_dtype
        out = hands.out[: len(data) // _unit(self._step.tensor) * self._unit]
        overflowed = 0
        if out_dtype is not None and (not self.outcomes.perturbs or _narrows(dtype, out_dtype)):
            overflowed = walk.device.convert(data, out, dtype, out_dtype)
        if not self.outcomes.perturbs:
            return out, [], overflowed
        return out, self.outcomes.add(walk.device, data, out, first), overflowed

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
        digest = source_digest if self.is_plain_copy else f"blake3:{self.hash.hexdigest()}"
        return self.outcomes.receipt(source_digest, digest)


def _unit(tensor: TensorSpec) -> int:
    """Return the bytes of an element; of what takes no noise, bytes are the elements."""
    return FLOAT_DTYPES.get(tensor.dtype, 1)


def _out_unit(step: Step) -> int:
    """Return the bytes of an element in the output."""
    return _unit(step.tensor) if step.out_dtype is None else FLOAT_DTYPES[step.out_dtype]


def _narrows(dtype: str, out_dtype: str) -> bool:
    return LARGEST[dtype] > LARGEST[out_dtype]
