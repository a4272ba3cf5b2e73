"""Sums of stored values and evenly spaced noise in vector registers, as LLVM instructions in a compiled loop.

An evenly spaced c = (2k + 1 - 2^b) · 2^-(b+1), k the top b bits of a word, is an int32 times 2^-32: the word
with the bit after its top b set, those below cleared and the sign bit turned over. Converted to float32 it is
exact, and where the amplitude times 2^-32 is exact too, one multiplication gives float32(c · a).

Half precisions are converted by the CPU's own instructions where it has them and they round as the general
loop does. BF16 without them is converted on the integer bits; F16, of which that would take many, is left to
the general loop.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from noisytune_cli.philox_vectors import (
    F32,
    I64,
    IN_HALVES,
    IN_ORDER,
    VF16,
    VF32,
    VI16,
    VI32,
    VI64,
    WORDS,
    constant,
    shuffled,
    splat,
)
from noisytune_cli.stored import INFINITE
from noisytune_cli.vectors import narrows_to_bf16, narrows_to_f16

#: The smallest amplitude for these sums. Its product with 2^-32 is not subnormal; nor is a sum with its noise
#: (2^-95 or more, in steps of 2^-119), and the instruction that narrows to BF16 takes subnormals as 0.
SMALLEST_AMPLITUDE = 2.0**-70


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
            place = element(b, turn, 32 * chain + 16 * half)
            x = load(b, VF32, self._source, place)
            y = b.fadd(x, self._noise(words))
            self._equal.append(b.icmp_unsigned("==", b.bitcast(x, VI32), b.bitcast(y, VI32)))
            # This sum alone may become a fused multiply-add: it is there for its NaN.
            nothing = b.fmul(y, constant(VF32, 0.0), flags=("contract",))
            self._seen = nothing if self._seen is None else b.fadd(self._seen, nothing, flags=("contract",))
            noised.append((y, place))
        return noised

    def _noise(self, words: Any) -> Any:
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


class _AddingHalves(_AddingF32):
    """Sums in float32 of 16-bit values, 32 at a time; overflow shows in the largest magnitude."""

    INFINITE = INFINITE["BF16"]

    def add(self, turn: Any, chain: int, first: Any, second: Any) -> list[tuple[Any, Any]]:
        """Return the vector of a chain with its noise, and its first element."""
        b = self._builder
        place = element(b, turn, 32 * chain)
        x = load(b, VI16, self._source, place)
        noise = (self._noise(words) for words in (first, second))
        y = self._narrowed([b.fadd(wide, n) for wide, n in zip(self._widened(x), noise, strict=True)])
        self._equal.append(b.icmp_unsigned("==", x, y))
        magnitude = b.and_(y, constant(VI16, 0x7FFF))
        if self._seen is None:
            self._seen = magnitude
        else:
            self._seen = b.select(b.icmp_unsigned(">", magnitude, self._seen), magnitude, self._seen)
        return [(y, place)]

    def _widened(self, x: Any) -> list[Any]:
        """Return the values of a vector as two of float32, in the order of the words."""
        raise NotImplementedError

    def _narrowed(self, sums: list[Any]) -> Any:
        """Return the bits of the sums of what `_widened` gave, rounded to nearest, ties to even."""
        raise NotImplementedError

    def overflows(self) -> Any:
        """Return whether any value so far is infinite or NaN."""
        return _any(
            self._builder, self._builder.icmp_unsigned(">=", self._seen, constant(VI16, self.INFINITE))
        )


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
    """Sums of BF16 values, widened and narrowed where they lie."""

    ORDER = IN_HALVES

    def _widened(self, x: Any) -> list[Any]:
        b = self._builder
        wide = []
        for half in range(2):
            # Zeros below and the value above, for 4 of every 8 values.
            lanes = [lane for at in range(4 * half, 32, 8) for i in range(4) for lane in (32, at + i)]
            wide.append(b.bitcast(shuffled(b, x, constant(VI16, 0), lanes), VF32))
        return wide

    def _narrowed(self, sums: list[Any]) -> Any:
        b = self._builder
        low, high = (b.bitcast(self._rounded(y), VI16) for y in sums)
        upper = [at + 1 + 2 * i for at in range(0, 32, 8) for i in range(4)]
        in_place = [
            lane for at in range(0, 16, 4) for k in (0, 32) for lane in (u + k for u in upper[at : at + 4])
        ]
        return shuffled(b, low, high, in_place)

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
        both = b.bitcast(b.asm(narrow, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v", sums, False), VI64)
        return b.bitcast(shuffled(b, both, both, (0, 4, 1, 5, 2, 6, 3, 7)), VI16)


def sums_of(dtype: str) -> Any:
    """Return the class that adds values of a dtype on this CPU, or None.

    It is made, before a loop, of (builder, bits, amplitude, pointer to the values); `ORDER` is that which the
    words of its chains must have. `add` gives the vectors to store in a turn, and after all of its chains
    `overflows` and `same` speak for the turn.
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
