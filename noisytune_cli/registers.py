"""Noise in registers: draw, add and round without a step through memory.

What the general loop of `kernels.py` does block by block by way of scratch space, these loops do for `WORDS`
values at a time in vector registers, where distribution and dtype allow it: evenly spaced noise
(`Distribution.EVEN_BITS`) on F32 and BF16 values. They stop before values that overflow, which the general
loop then clamps.

An evenly spaced c = (2k + 1 - 2^b) · 2^-(b+1), k the top b bits of a word, is an int32 times 2^-32: the word
with the bit after its top b set, those below cleared and the sign bit turned over. Converted to float32 it is
exact, and where the amplitude times 2^-32 is exact too, one multiplication gives float32(c · a).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic

from noisytune_cli.philox_vectors import (
    F32,
    I64,
    IN_HALVES,
    IN_ORDER,
    VF32,
    VI16,
    VI32,
    VI64,
    WORDS,
    Philox,
    constant,
    shuffled,
    splat,
)
from noisytune_cli.stored import INFINITE

#: The smallest amplitude whose product with 2^-32 is not subnormal.
SMALLEST_AMPLITUDE = 2.0**-94

_types: Any = numba.types
_U64, _I64 = _types.uint64, _types.int64
_TWO_COUNTS = _types.Tuple((_I64, _I64))


@intrinsic
def _draw_words(
    typing_context: Any, words: Any, turns: Any, counter: Any, k0: Any, k1: Any, s0: Any, s1: Any
) -> Any:
    """Write `turns` · WORDS words from a counter on, which must not pass a multiple of 2^32, to [n] u32."""
    signature = _types.void(words, _I64, _U64, _U64, _U64, _U64, _U64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, turns, counter, *stream = arguments
        philox = Philox(builder, counter, (stream[0], stream[1]), (stream[2], stream[3]))
        target = context.make_array(signature.args[0])(context, builder, words).data
        loop = _Turns(builder, turns, [(philox.start(IN_ORDER), VI64)])
        vectors = [vector for pair in philox.turn(loop.values[0]) for vector in pair]
        for place, vector in enumerate(vectors):
            _store(builder, vector, target, _element(builder, loop.turn, place * 16))
        loop.end([builder.add(loop.values[0], Philox.step())])
        return context.get_dummy_value()

    return signature, generate


#: What a loop calls: to Numba the intrinsic, which types as a function of its first argument alone.
draw_words: Any = _draw_words


def even_noise(bits: int, dtype: str) -> Callable[..., Any]:
    """Return the function that adds evenly spaced noise of so many bits to F32 or BF16 values.

    It takes (x, y, start, turns, counter, k0, k1, s0, s1, amplitude) and writes x + noise to y, which is x or
    apart from it, from element `start` on, `turns` · WORDS values, the first of which is the counter's first.
    It stops before a turn with a value that would be infinite or NaN, and returns how many turns it did and
    how many values stayed what they were. The turns must not pass a multiple of 2^32 counters, and the
    amplitude must be SMALLEST_AMPLITUDE or more.
    """

    @intrinsic
    def add(
        typing_context: Any,
        x: Any,
        y: Any,
        start: Any,
        turns: Any,
        counter: Any,
        k0: Any,
        k1: Any,
        s0: Any,
        s1: Any,
        amplitude: Any,
    ) -> Any:
        signature = _TWO_COUNTS(x, y, _U64, _I64, _U64, _U64, _U64, _U64, _U64, _types.float32)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, y, start, turns, counter, *stream, amplitude = arguments
            source, target = (
                builder.gep(context.make_array(kind)(context, builder, array).data, [start])
                for kind, array in zip(signature.args, (x, y), strict=False)
            )
            philox = Philox(builder, counter, (stream[0], stream[1]), (stream[2], stream[3]))
            adding = _Adding[dtype](builder, bits, amplitude, source)
            zero = ir.Constant(I64, 0)
            loop = _Turns(builder, turns, [(philox.start(adding.ORDER), VI64), (zero, I64)])
            words = philox.turn(loop.values[0])
            noised = [adding.add(loop.turn, chain, *pair) for chain, pair in enumerate(words)]
            loop.leave_if(adding.overflows())
            for value, place in (one for group in noised for one in group):
                _store(builder, value, target, place)
            loop.end([builder.add(loop.values[0], Philox.step()), builder.add(loop.values[1], adding.same())])
            return context.make_tuple(builder, _TWO_COUNTS, [loop.turn, loop.values[1]])

        return signature, generate

    return add


#: The dtypes that `even_noise` is there for.
DTYPES = ("F32", "BF16")


class _Turns:
    """A loop whose body is what is emitted until `end`; `values` are carried from turn to turn."""

    def __init__(self, builder: Any, turns: Any, carried: Any) -> None:
        self._builder = builder
        before = builder.block
        self._head, body, self._after = (builder.append_basic_block() for _ in range(3))
        builder.branch(self._head)
        builder.position_at_end(self._head)
        self.turn = builder.phi(I64)
        self.turn.add_incoming(ir.Constant(I64, 0), before)
        self.values = [builder.phi(kind) for _, kind in carried]
        for value, (first, _) in zip(self.values, carried, strict=True):
            value.add_incoming(first, before)
        builder.cbranch(builder.icmp_signed("<", self.turn, turns), body, self._after)
        builder.position_at_end(body)

    def leave_if(self, condition: Any) -> None:
        """End the loop before this turn counts."""
        going_on = self._builder.append_basic_block()
        self._builder.cbranch(condition, self._after, going_on)
        self._builder.position_at_end(going_on)

    def end(self, carried: Any) -> None:
        """Go on with the next turn; what is emitted from here on comes after the loop."""
        last = self._builder.block
        self.turn.add_incoming(self._builder.add(self.turn, ir.Constant(I64, 1)), last)
        for value, following in zip(self.values, carried, strict=True):
            value.add_incoming(following, last)
        self._builder.branch(self._head)
        self._builder.position_at_end(self._after)


class _AddingF32:
    """Sums of float32 values; overflow shows in a sum of y · 0, which is NaN from the first infinity on."""

    ORDER = IN_ORDER

    def __init__(self, builder: Any, bits: int, amplitude: Any, source: Any) -> None:
        self._builder, self._bits, self._source = builder, bits, source
        self._scale = splat(builder, VF32, builder.fmul(amplitude, ir.Constant(F32, 2.0**-32)))
        self._equal: list[Any] = []
        self._seen: Any = None

    def add(self, turn: Any, chain: int, first: Any, second: Any) -> list[tuple[Any, Any]]:
        """Return the vectors of a chain with their noise, each with its first element."""
        b = self._builder
        noised = []
        for half, words in enumerate((first, second)):
            place = _element(b, turn, 32 * chain + 16 * half)
            x = _load(b, VF32, self._source, place)
            y = b.fadd(x, self.noise(words))
            self._equal.append(b.icmp_unsigned("==", b.bitcast(x, VI32), b.bitcast(y, VI32)))
            # This sum alone may become a fused multiply-add: it is there for its NaN.
            nothing = b.fmul(y, constant(VF32, 0.0), flags=("contract",))
            self._seen = nothing if self._seen is None else b.fadd(self._seen, nothing, flags=("contract",))
            noised.append((y, place))
        return noised

    def noise(self, words: Any) -> Any:
        """Return float32(c · a) of 16 words."""
        b = self._builder
        after = 1 << (31 - self._bits)
        top = b.and_(words, constant(VI32, 2**32 - 2 * after))
        return b.fmul(b.sitofp(b.xor(top, constant(VI32, 2**31 | after)), VF32), self._scale)

    def overflows(self) -> Any:
        """Return whether any value so far is infinite or NaN."""
        return _any(self._builder, self._builder.fcmp_unordered("uno", self._seen, self._seen))

    def same(self) -> Any:
        """Return how many values so far are what they were."""
        return _count(self._builder, self._equal)


class _AddingBF16(_AddingF32):
    """Sums in float32 of BF16 values, held as their bits, widened and narrowed where they lie."""

    ORDER = IN_HALVES

    def add(self, turn: Any, chain: int, first: Any, second: Any) -> list[tuple[Any, Any]]:
        """Return the vector of a chain with its noise, and its first element."""
        b = self._builder
        place = _element(b, turn, 32 * chain)
        x = _load(b, VI16, self._source, place)
        rounded = []
        for half, words in enumerate((first, second)):
            # Zeros below and the value above, for 4 of every 8 values.
            lanes = [lane for at in range(4 * half, 32, 8) for i in range(4) for lane in (32, at + i)]
            wide = b.bitcast(shuffled(b, x, constant(VI16, 0), lanes), VF32)
            rounded.append(b.bitcast(self._rounded(b.fadd(wide, self.noise(words))), VI16))
        upper = [at + 1 + 2 * i for at in range(0, 32, 8) for i in range(4)]
        in_place = [
            lane for at in range(0, 16, 4) for k in (0, 32) for lane in (u + k for u in upper[at : at + 4])
        ]
        y = shuffled(b, rounded[0], rounded[1], in_place)
        self._equal.append(b.icmp_unsigned("==", x, y))
        magnitude = b.and_(y, constant(VI16, 0x7FFF))
        if self._seen is None:
            self._seen = magnitude
        else:
            self._seen = b.select(b.icmp_unsigned(">", magnitude, self._seen), magnitude, self._seen)
        return [(y, place)]

    def _rounded(self, y: Any) -> Any:
        """Return float32 bits whose upper halves are the nearest BF16, ties to even."""
        b = self._builder
        bits = b.bitcast(y, VI32)
        odd = b.icmp_unsigned("!=", b.and_(bits, constant(VI32, 1 << 16)), constant(VI32, 0))
        return b.select(odd, b.add(bits, constant(VI32, 0x8000)), b.add(bits, constant(VI32, 0x7FFF)))

    def overflows(self) -> Any:
        """Return whether any value so far is infinite or NaN."""
        return _any(
            self._builder, self._builder.icmp_unsigned(">=", self._seen, constant(VI16, INFINITE["BF16"]))
        )


_Adding = {"F32": _AddingF32, "BF16": _AddingBF16}


def _element(builder: Any, turn: Any, place: int) -> Any:
    """Return the index of an element in a turn."""
    return builder.add(builder.mul(turn, ir.Constant(I64, WORDS)), ir.Constant(I64, place))


def _load(builder: Any, kind: Any, base: Any, element: Any) -> Any:
    pointer = builder.bitcast(builder.gep(base, [element]), kind.as_pointer())
    return builder.load(pointer, align=_alignment(kind))


def _store(builder: Any, value: Any, base: Any, element: Any) -> None:
    pointer = builder.bitcast(builder.gep(base, [element]), value.type.as_pointer())
    builder.store(value, pointer, align=_alignment(value.type))


def _alignment(kind: Any) -> int:
    """Return the bytes that a vector in an array is aligned to: an element's."""
    return 64 // int(kind.count)


def _mask(builder: Any, condition: Any) -> Any:
    """Return a vector of conditions as the bits of a u64."""
    return builder.zext(builder.bitcast(condition, ir.IntType(condition.type.count)), I64)


def _any(builder: Any, condition: Any) -> Any:
    return builder.icmp_unsigned("!=", _mask(builder, condition), ir.Constant(I64, 0))


def _count(builder: Any, conditions: list[Any]) -> Any:
    """Return how many lanes of some vectors of conditions are true."""
    each = conditions[0].type.count
    total = ir.Constant(I64, 0)
    for at in range(0, len(conditions), 64 // each):
        bits = ir.Constant(I64, 0)
        for i, condition in enumerate(conditions[at : at + 64 // each]):
            bits = builder.or_(bits, builder.shl(_mask(builder, condition), ir.Constant(I64, each * i)))
        total = builder.add(total, builder.ctpop(bits))
    return total
