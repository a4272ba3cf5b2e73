"""The words of noise stream v1 in Triton: Philox4x32-10."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from noisytune_cli.noise import stream

_ROUNDS = tl.constexpr(stream.ROUNDS)
_M0, _M1, _W0, _W1 = map(tl.constexpr, (stream.M0, stream.M1, stream.W0, stream.W1))


@triton.jit
def words(c0, c1, k0, k1, c2, c3):
    """Return the four words of each counter (c0, c1, c2, c3); all are u32.

    Where c1 to c3 are scalars, half of the first two rounds is a scalar's, worked out once for all counters.
    """
    for _ in tl.static_range(_ROUNDS):
        # One wide multiplication each, where umulhi beside a product would be two.
        p0, p1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3
