"""Sums of stored values and evenly spaced noise in vector registers, as LLVM instructions in a compiled loop.

An evenly spaced c = (2k + 1 - 2^b) · 2^-(b+1), k the top b bits of a word, is an int32 times 2^-32: the word
with the bit after its top b set, those below cleared and the sign bit turned over. Converted to float32 it is
exact, and where the amplitude times 2^-32 is exact too, one multiplication gives float32(c · a).

Half precisions are converted by the CPU's own instructions where it has them and they round as the general
loop does. BF16 without them is converted on the integer bits; F16, of which that would take many, is left to
the general loop.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir

from noisytune_cli.philox_vectors import (
    APART,
    F32,
    I64,
    VF16,
    VF32,
    VI16,
    VI32,
    WORDS,
    WOVEN,
    constant,
    shuffled,
    splat,
    woven,
)
from noisytune_cli.stored import INFINITE
from noisytune_cli.vectors import narrows_to_bf16, narrows_to_f16

#: The smallest amplitude for these sums. Its product with 2^-32 is not subnormal; nor is a sum with its noise
#: (2^-95 or more, in steps of 2^-119), and the instruction that narrows to BF16 takes subnormals as 0.
SMALLEST_AMPLITUDE = 2.0**-70

#: What leaves the upper halves of 32-bit values.
_UPPER = constant(VI32, 0xFFFF0000)


class _Adding:
    """Sums of stored values in float32: what the dtypes have in common."""

    #: The order of a chain's counters, and the bits of a stored value's sign and of infinity.
    ORDER = WOVEN
    SIGN: int
    INFINITE: int

    def __init__(self, builder: Any, bits: int, amplitude: Any, source: Any, even_keys: Any) -> None:
        self._builder, self._source = builder, source
        self._scale = splat(builder, VF32, builder.fmul(amplitude, ir.Constant(F32, 2.0**-32)))
        after = 1 << (31 - bits)
        self._top = constant(VI32, 2**32 - 2 * after)
        centred = constant(VI32, 2**31 | after)
        self._centred = builder.xor(builder.and_(even_keys, self._top), centred), centred
        self._equal: list[Any] = []
        self._sums: list[Any] = []

    def add(self, turn: Any, chain: int, evens: Any, odds: Any) -> list[tuple[Any, Any]]:
        """Return the vectors of a chain with their noise, each with its first element."""
        raise NotImplementedError

    def _noise(self, evens: Any, odds: Any) -> list[Any]:
        """Return float32(c · a) of the words at even and at odd places, in the order of the values."""
        b = self._builder
        centred = [b.xor(b.and_(w, self._top), c) for w, c in zip((evens, odds), self._centred, strict=True)]
        return [b.fmul(b.sitofp(words, VF32), self._scale) for words in self._ordered(*centred)]

    def _ordered(self, evens: Any, odds: Any) -> list[Any]:
        """Return what is at even and at odd places in the order of the values."""
        return woven(self._builder, evens, odds)

    def _done(self, x: Any, y: Any) -> None:
        """Take note of the stored bits of values without and with their noise."""
        self._equal.append(self._builder.icmp_unsigned("==", x, y))
        self._sums.append(y)

    def may_overflow(self) -> Any:
        """Return whether any value is 2 or more in magnitude: few turns have one, and it is quickly told."""
        b = self._builder
        either = functools.reduce(b.or_, self._sums)
        top = constant(either.type, self.SIGN >> 1)  # of the exponent
        return _any(b, b.icmp_unsigned("!=", b.and_(either, top), constant(either.type, 0)))

    def overflows(self) -> Any:
        """Return whether any value is infinite or NaN; it takes longer."""
        b = self._builder
        magnitudes = [b.and_(y, constant(y.type, self.SIGN - 1)) for y in self._sums]
        largest = functools.reduce(
            lambda one, other: b.select(b.icmp_unsigned(">", one, other), one, other), magnitudes
        )
        return _any(b, b.icmp_unsigned(">=", largest, constant(largest.type, self.INFINITE)))

    def same(self) -> Any:
        """Return how many values so far are what they were."""
        return _count(self._builder, self._equal)


class _AddingF32(_Adding):
    """Sums of float32 values."""

    SIGN, INFINITE = 1 << 31, INFINITE["F32"]

    def add(self, turn: Any, chain: int, evens: Any, odds: Any) -> list[tuple[Any, Any]]:
        """Return the vectors of a chain with their noise, each with its first element."""
        b = self._builder
        noised = []
        for half, noise in enumerate(self._noise(evens, odds)):
            place = element(b, turn, 32 * chain + 16 * half)
            x = load(b, VF32, self._source, place)
            y = b.fadd(x, noise)
            self._done(b.bitcast(x, VI32), b.bitcast(y, VI32))
            noised.append((y, place))
        return noised


class _AddingHalves(_Adding):
    """Sums of 16-bit values, 32 at a time."""

    SIGN = 1 << 15

    def add(self, turn: Any, chain: int, evens: Any, odds: Any) -> list[tuple[Any, Any]]:
        """Return the vector of a chain with its noise, and its first element."""
        b = self._builder
        place = element(b, turn, 32 * chain)
        x = load(b, VI16, self._source, place)
        wide = zip(self._widened(x), self._noise(evens, odds), strict=True)
        y = self._narrowed([b.fadd(value, noise) for value, noise in wide])
        self._done(x, y)
        return [(y, place)]

    def _widened(self, x: Any) -> list[Any]:
        """Return the values of a vector as two of float32, in the order of the noise."""
        raise NotImplementedError

    def _narrowed(self, sums: list[Any]) -> Any:
        """Return the bits of the sums of what `_widened` gave, rounded to nearest, ties to even."""
        raise NotImplementedError


class _AddingF16(_AddingHalves):
    """Sums of F16 values, widened and narrowed by the CPU."""

    INFINITE = INFINITE["F16"]

    def _widened(self, x: Any) -> list[Any]:
        b = self._builder
        halves = (shuffled(b, x, x, range(at, at + 16)) for at in (0, 16))
        return [b.fpext(b.bitcast(half, VF16), VF32) for half in halves]

    def _narrowed(self, sums: list[Any]) -> Any:
        b = self._builder
        low, high = (b.fptrunc(y, VF16) for y in sums)
        return b.bitcast(shuffled(b, low, high, range(32)), VI16)


class _AddingBF16(_AddingHalves):
    """Sums of BF16 values. Two lie in 32 bits; either is a float32 with zeros in place of the other."""

    ORDER = APART
    INFINITE = INFINITE["BF16"]

    def _ordered(self, evens: Any, odds: Any) -> list[Any]:
        return [evens, odds]

    def _widened(self, x: Any) -> list[Any]:
        b = self._builder
        pairs = b.bitcast(x, VI32)
        evens, odds = b.shl(pairs, constant(VI32, 16)), b.and_(pairs, _UPPER)
        return [b.bitcast(wide, VF32) for wide in (evens, odds)]

    def _narrowed(self, sums: list[Any]) -> Any:
        b = self._builder
        evens, odds = (self._rounded(y) for y in sums)
        return b.bitcast(b.or_(b.lshr(evens, constant(VI32, 16)), b.and_(odds, _UPPER)), VI16)

    def _rounded(self, y: Any) -> Any:
        """Return float32 bits whose upper halves are the nearest BF16, ties to even."""
        b = self._builder
        bits = b.bitcast(y, VI32)
        odd = b.icmp_unsigned("!=", b.and_(bits, constant(VI32, 1 << 16)), constant(VI32, 0))
        return b.select(odd, b.add(bits, constant(VI32, 0x8000)), b.add(bits, constant(VI32, 0x7FFF)))


class _AddingBF16Natively(_AddingBF16):
    """Sums of BF16 values, narrowed by an instruction of AVX-512."""

    def _narrowed(self, sums: list[Any]) -> Any:
        b = self._builder
        # In assembly, because the type of LLVM's intrinsic for it has changed between versions.
        narrow = ir.FunctionType(VI16, (VF32, VF32))
        both = b.asm(narrow, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v", sums, False)
        return shuffled(b, both, both, [lane for at in range(16) for lane in (at, at + 16)])


def sums_of(dtype: str) -> Any:
    """Return the class that adds values of a dtype on this CPU, or None.

    It is made, before a loop, of (builder, bits, amplitude, pointer to the values, `Philox.last_keys`);
    `ORDER` is that which the counters of its chains must have. `add` gives what to store in a turn, and
    after all of its chains `may_overflow`, `overflows` and `same` speak for the turn.
    """
    bf16 = _AddingBF16Natively if narrows_to_bf16() else _AddingBF16
    return {"F32": _AddingF32, "BF16": bf16, "F16": _AddingF16 if narrows_to_f16() else None}.get(dtype)


def element(builder: Any, turn: Any, place: int) -> Any:
    """Return the index of an element in a turn."""
    return builder.add(builder.mul(turn, ir.Constant(I64, WORDS)), ir.Constant(I64, place))


def load(builder: Any, kind: Any, base: Any, at: Any) -> Any:
    """Return the vector of an array from an element on."""
    pointer = builder.bitcast(builder.gep(base, [at]), kind.as_pointer())
    return builder.load(pointer, align=_alignment(kind))


def store(builder: Any, value: Any, base: Any, at: Any) -> None:
    """Write a vector to an array from an element on."""
    pointer = builder.bitcast(builder.gep(base, [at]), value.type.as_pointer())
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
