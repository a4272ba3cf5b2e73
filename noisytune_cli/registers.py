"""Noise in registers: draw, add and round without a step through memory.

What the general loop of `kernels.py` does block by block by way of scratch space, these loops do for `WORDS`
values at a time in vector registers, where distribution and dtype allow it: evenly spaced noise
(`Distribution.EVEN_BITS`) on values of the dtypes that `register_sums.py` has. They stop before values that
overflow, which the general loop then clamps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic

from noisytune_cli.philox_vectors import I64, VI64, WOVEN, Philox, woven
from noisytune_cli.register_sums import element, store, sums_of

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
        loop = _Turns(builder, turns, [(philox.start(WOVEN), VI64)])
        vectors = []
        for evens, odds in philox.turn(loop.values[0]):
            vectors += woven(builder, builder.xor(evens, philox.last_keys), odds)
        for place, vector in enumerate(vectors):
            store(builder, vector, target, element(builder, loop.turn, place * 16))
        loop.end([builder.add(loop.values[0], Philox.step())])
        return context.get_dummy_value()

    return signature, generate


#: What a loop calls: to Numba the intrinsic, which types as a function of its first argument alone.
draw_words: Any = _draw_words


def even_noise(bits: int, dtype: str) -> Callable[..., Any] | None:
    """Return the function that adds evenly spaced noise of so many bits to values of a dtype, or None.

    It takes (x, y, start, turns, counter, k0, k1, s0, s1, amplitude) and writes x + noise to y, which is x or
    apart from it, from element `start` on, `turns` · WORDS values, the first of which is the counter's first.
    It stops before a turn with a value that would be infinite or NaN, and returns how many turns it did and
    how many values stayed what they were. The turns must not pass a multiple of 2^32 counters, and the
    amplitude must be SMALLEST_AMPLITUDE or more.
    """
    sums = sums_of(dtype)
    if sums is None:
        return None

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
            adding = sums(builder, bits, amplitude, source, philox.last_keys)
            zero = ir.Constant(I64, 0)
            loop = _Turns(builder, turns, [(philox.start(adding.ORDER), VI64), (zero, I64)])
            words = philox.turn(loop.values[0])
            noised = [adding.add(loop.turn, chain, *pair) for chain, pair in enumerate(words)]
            loop.leave_if(adding.may_overflow(), adding.overflows)
            for value, place in (one for group in noised for one in group):
                store(builder, value, target, place)
            loop.end([builder.add(loop.values[0], Philox.step()), builder.add(loop.values[1], adding.same())])
            return context.make_tuple(builder, _TWO_COUNTS, [loop.turn, loop.values[1]])

        return signature, generate

    return add


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

    def leave_if(self, suspected: Any, certain: Callable[[], Any]) -> None:
        """End the loop before this turn counts, if what is suspected is certain."""
        looking, going_on = (self._builder.append_basic_block() for _ in range(2))
        self._builder.cbranch(suspected, looking, going_on)
        self._builder.position_at_end(looking)
        self._builder.cbranch(certain(), self._after, going_on)
        self._builder.position_at_end(going_on)

    def end(self, carried: Any) -> None:
        """Go on with the next turn; what is emitted from here on comes after the loop."""
        last = self._builder.block
        self.turn.add_incoming(self._builder.add(self.turn, ir.Constant(I64, 1)), last)
        for value, following in zip(self.values, carried, strict=True):
            value.add_incoming(following, last)
        self._builder.branch(self._head)
        self._builder.position_at_end(self._after)
