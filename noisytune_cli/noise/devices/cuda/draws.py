"""Coefficients in Triton: what each distribution makes of the four words of a counter.

Gaussian ones come from the very functions of `noise/distributions/gaussian.py`, whose float64 `+ - * / sqrt`
CUDA rounds as IEEE 754 says.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from noisytune_cli.noise.devices.cuda.add_pairs import STEP, centred
from noisytune_cli.noise.distributions import gaussian

_SQRT_HALF, _RADIANS = tl.constexpr(int(gaussian._SQRT_HALF)), tl.constexpr(gaussian._RADIANS)
_WORD_STEP = tl.constexpr(2.0**-32)


def _shared(function: Callable[..., Any]) -> Any:
    """Return a function of plain operators, with its module's constants, as one that kernels can call."""
    constants = {k: tl.constexpr(v) for k, v in function.__globals__.items() if isinstance(v, float)}
    # Beside its constants a kernel has to see triton's language, and the module that it is from.
    visible = {"tl": tl, "Any": tl.constexpr(None), "__name__": function.__module__, **constants}
    return triton.jit(types.FunctionType(function.__code__, visible, function.__name__))


_minus_two_ln, _turned = _shared(gaussian.minus_two_ln), _shared(gaussian.turned)


@triton.jit
def _uniform(w0, w1, w2, w3):
    """Return the coefficients of a counter's four words, as `uniform.coefficients`."""
    return centred(w0) * STEP, centred(w1) * STEP, centred(w2) * STEP, centred(w3) * STEP


@triton.jit
def _pair(word, turn_word):
    u = (word.to(tl.float64) + 0.5) * _WORD_STEP
    bits = u.to(tl.int64, bitcast=True)
    k = (bits - _SQRT_HALF) >> 52
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    length = tl.sqrt(_minus_two_ln(k.to(tl.float64), m))
    turn = turn_word.to(tl.int64)
    q = (turn + (1 << 29)) >> 30
    x = ((turn - (q << 30)).to(tl.float64) + 0.5) * _RADIANS
    odd = (q & 1).to(tl.float64)
    cos, sin = _turned(x, odd, (1 - ((q + 1) & 2)).to(tl.float64), (1 - (q & 2)).to(tl.float64))
    return (length * cos).to(tl.float32), (length * sin).to(tl.float32)


@triton.jit
def _gaussian(w0, w1, w2, w3):
    """Return the coefficients of a counter's four words, as `gaussian.coefficients`."""
    c0, c1 = _pair(w0, w1)
    c2, c3 = _pair(w2, w3)
    return c0, c1, c2, c3


@triton.jit
def in_order(c0, c1, c2, c3):
    """Return the coefficients of counters' words, [n] each, in the order of their elements, [4 · n]."""
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


#: The function of each distribution.
DRAWS = {"uniform": _uniform, "gaussian": _gaussian}
