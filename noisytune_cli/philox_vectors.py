"""Philox4x32-10 on vectors of counters, as LLVM instructions inside a compiled loop.

LLVM's vectoriser turns a loop over counters into good code for the rounds, but not for what comes after: each
counter gives four words, and every fourth word has to go to its place. So the vectors are written out here. A
vector has 8 counters, each word in a 64-bit lane, whose upper half is left as it comes: the widening multiply
does not look at it. The last round puts two of a counter's words into each lane, those at even places into
one vector and those at odd ones into another: as they suit values of 16 bits, which lie in pairs. LLVM splits
the vectors where a CPU's are shorter. `CHAINS` vectors go through the rounds side by side, because a round
has to wait for its multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from noisytune_cli.stream import M0, M1, MASK, ROUNDS, W0, W1

#: Vectors at a time, and the counters and the words that they have.
CHAINS = 6
COUNTERS = 8 * CHAINS
WORDS = 4 * COUNTERS

#: The types of scalars and of vectors; a vector is 512 bits long.
I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VI16, VI32, VI64 = ir.VectorType(I16, 32), ir.VectorType(I32, 16), ir.VectorType(I64, 8)
VF16, VF32 = ir.VectorType(ir.HalfType(), 16), ir.VectorType(F32, 16)

#: The order of a vector's counters by which the words at even places follow each other, and those at odd …
APART = (0, 1, 2, 3, 4, 5, 6, 7)
#: … or by which `woven` gives 32 words in their own order.
WOVEN = (0, 4, 1, 5, 2, 6, 3, 7)

#: The halves of a lane as 32-bit values.
_LOWER, _UPPER = 0, 1


def constant(kind: Any, value: Any) -> Any:
    """Return a vector of one constant, or of a sequence of them."""
    values = value if isinstance(value, Sequence) else [value] * kind.count
    return ir.Constant(kind, [ir.Constant(kind.element, v) for v in values])


def shuffled(builder: Any, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    """Return the vector of these lanes of a and b, whose lanes are counted after those of a."""
    return builder.shuffle_vector(a, b, constant(ir.VectorType(I32, len(lanes)), lanes))


def woven(builder: Any, evens: Any, odds: Any) -> list[Any]:
    """Return two vectors of 32-bit values in order, from those at even and odd places of WOVEN counters."""
    return [
        shuffled(
            builder, evens, odds, [k for at in range(half, 16, 4) for k in (at, at + 16, at + 1, at + 17)]
        )
        for half in (0, 2)
    ]


def splat(builder: Any, kind: Any, value: Any) -> Any:
    """Return a vector of one value."""
    nothing = ir.Constant(kind, ir.Undefined)
    return shuffled(
        builder, builder.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, [0] * kind.count
    )


class Philox:
    """The words of consecutive counters, COUNTERS at a time: what is before a loop, and one turn of it."""

    def __init__(self, builder: Any, counter: Any, key: tuple[Any, Any], sid: tuple[Any, Any]) -> None:
        """Emit what is set up once, for the first counter and the words of key and stream id, all u64 values.

        No turn of the loop may pass a multiple of 2^32 counters: what is above is taken from the first one.
        """
        b = self._builder = builder
        low = ir.Constant(I64, MASK)
        self._keys = []
        for _ in range(ROUNDS):
            self._keys.append(tuple(splat(b, VI64, word) for word in key))
            key = (b.add(key[0], ir.Constant(I64, W0)), b.add(key[1], ir.Constant(I64, W1)))
        #: What the words at even places still need of the last round: an exclusive or with this.
        self.last_keys = self._interleaved(_LOWER, *self._keys[-1])
        self._c1, c2, self._c3 = (
            splat(b, VI64, v) for v in (b.lshr(counter, ir.Constant(I64, 32)), sid[0], sid[1])
        )
        # The first round's products: one is the same for all counters, one grows by M0 with each of them.
        self._second = self._times(c2, M1)
        self._base = b.mul(b.and_(counter, low), ir.Constant(I64, M0))

    def start(self, order: Sequence[int]) -> Any:
        """Return the first turn's vector; the next one's is `step` more. `order` is that of 8 counters."""
        products = constant(VI64, [place * M0 for place in order])
        return self._builder.add(splat(self._builder, VI64, self._base), products)

    @staticmethod
    def step() -> Any:
        """Return what a turn's vector is more than that of the turn before."""
        return constant(VI64, COUNTERS * M0)

    def turn(self, products: Any) -> list[tuple[Any, Any]]:
        """Return the words at even and at odd places for each of the CHAINS, from a turn's vector.

        Those at even places are without the last round's keys, `last_keys`, which may join another constant.
        """
        b = self._builder
        p0 = [b.add(products, constant(VI64, 8 * chain * M0)) for chain in range(CHAINS)]
        p1 = [self._second] * CHAINS
        x1, x3 = [self._c1] * CHAINS, [self._c3] * CHAINS
        for key in self._keys[:-1]:
            x0 = [self._mixed(p, x, key[0]) for p, x in zip(p1, x1, strict=True)]
            x2 = [self._mixed(p, x, key[1]) for p, x in zip(p0, x3, strict=True)]
            x1, x3 = p1, p0
            p0, p1 = [self._times(x, M0) for x in x0], [self._times(x, M1) for x in x2]
        return [self._words(*four) for four in zip(p1, x1, p0, x3, strict=True)]

    def _words(self, p1: Any, x1: Any, p0: Any, x3: Any) -> tuple[Any, Any]:
        """Return the last round's words: even places get products' upper halves ^ x, odd ones the lower."""
        uppers, lowers = (self._interleaved(half, p1, p0) for half in (_UPPER, _LOWER))
        return self._builder.xor(uppers, self._interleaved(_LOWER, x1, x3)), lowers

    def _times(self, x: Any, multiplier: int) -> Any:
        """Return the 64-bit products of the lower halves."""
        low = self._builder.and_(x, constant(VI64, MASK))
        return self._builder.mul(low, constant(VI64, multiplier))

    def _mixed(self, product: Any, x: Any, key: Any) -> Any:
        """Return a round's word: the product's upper half ^ x ^ key."""
        b = self._builder
        return b.xor(b.lshr(product, constant(VI64, 32)), b.xor(x, key))

    def _interleaved(self, half: int, first: Any, second: Any) -> Any:
        """Return one half of each lane of two vectors, in turn, as 32-bit values."""
        b = self._builder
        lanes = [lane for at in range(half, 16, 2) for lane in (at, 16 + at)]
        return shuffled(b, b.bitcast(first, VI32), b.bitcast(second, VI32), lanes)
