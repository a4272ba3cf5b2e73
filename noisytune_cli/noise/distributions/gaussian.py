"""Gaussian noise by the Box-Muller transform, exact on every device that has float64.

    u = (word + 1/2) · 2^-32
    c0 = sqrt(-2 ln u0) · cos(2π u1)        c1 = sqrt(-2 ln u0) · sin(2π u1)

Words 0, 1 of a counter give elements 0, 1; words 2, 3 give elements 2, 3. The amplitude is
λ · std / sqrt(12), so that at the same λ the variance is that of the uniform noise.

ln, cos and sin are written out below in + - * / sqrt on float64, in one fixed order. IEEE 754 rounds each of
these correctly, so every device gives the same bits, which no library's logarithm promises.

- ln u: u = m · 2^k with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.1716,
  by the series 2 (s + s³/3 + … + s¹⁷/17), whose remainder is below 1e-14 of its value.
- cos, sin: the word itself gives the nearest quarter turn q and the rest x exactly, |x| <= π/4; the Taylor
  series to x¹⁵ and x¹⁶ leave less than 1e-16; the quarter turns then swap and negate.

The coefficients are those of the series. The arithmetic (`minus_two_ln`, `turned`) is in plain operators, so
that NumPy arrays and torch tensors go through the same lines; around it, torch has its own way
of taking words apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import factorial
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.noise.distributions import to_float32

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_L3, _L5, _L7, _L9, _L11, _L13, _L15, _L17 = (1.0 / n for n in range(3, 18, 2))
_S3, _S5, _S7, _S9, _S11, _S13, _S15 = ((-1.0) ** (n // 2) / factorial(n) for n in range(3, 16, 2))
_C2, _C4, _C6, _C8, _C10, _C12, _C14, _C16 = ((-1.0) ** (n // 2) / factorial(n) for n in range(2, 17, 2))

#: ln 2, the float64 nearest to it.
_LN2 = 0.6931471805599453
#: One step of a word in radians: 2π · 2^-32.
_RADIANS = 2.0 * 3.141592653589793 * 2.0**-32
#: The bits of sqrt(1/2): taken from those of u they leave k above bit 52, with m in [sqrt(1/2), sqrt(2)).
_SQRT_HALF = np.int64(0x3FE6A09E667F3BCC)
_FRACTION_BITS = np.int64(52)
_ONE, _TWO, _EIGHTH, _QUARTER_BITS = np.int64(1), np.int64(2), np.int64(1 << 29), np.int64(30)
_SQRT_12 = 3.4641016151377544

FLOAT64 = True


def minus_two_ln(k: Any, m: Any) -> Any:
    """Return -2 ln(m · 2^k) for float64 k and m, m in [sqrt(1/2), sqrt(2))."""
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = _L15 + z * _L17
    p = _L13 + z * p
    p = _L11 + z * p
    p = _L9 + z * p
    p = _L7 + z * p
    p = _L5 + z * p
    p = _L3 + z * p
    return -2.0 * (k * _LN2 + 2.0 * (s + s * (z * p)))


def turned(x: Any, odd: Any, cos_sign: Any, sin_sign: Any) -> Any:
    """Return (cos, sin) of x, |x| <= π/4, after quarter turns: swapped where odd is 1.0, times the signs."""
    z = x * x
    p = _S13 + z * _S15
    p = _S11 + z * p
    p = _S9 + z * p
    p = _S7 + z * p
    p = _S5 + z * p
    p = _S3 + z * p
    sin = x + x * (z * p)
    p = _C14 + z * _C16
    p = _C12 + z * p
    p = _C10 + z * p
    p = _C8 + z * p
    p = _C6 + z * p
    p = _C4 + z * p
    p = _C2 + z * p
    cos = 1.0 + z * p
    # Products with 0.0 and 1.0 select without a branch, and exactly: neither cos nor sin is ever zero.
    even = 1.0 - odd
    return cos_sign * (even * cos + odd * sin), sin_sign * (even * sin + odd * cos)


def radius(word: Any) -> Any:
    """Return sqrt(-2 ln u) in float64 for [n] u32 words."""
    u = np.float64((np.float64(word) + 0.5) * 2.0**-32)
    bits = np.float64(u).view(np.int64)
    k = (bits - _SQRT_HALF) >> _FRACTION_BITS
    m = np.int64(bits - (k << _FRACTION_BITS)).view(np.float64)
    return np.sqrt(minus_two_ln(np.float64(k), m))


def cos_sin(word: Any) -> Any:
    """Return (cos 2πu, sin 2πu) in float64 for [n] u32 words."""
    turn = np.int64(word)
    q = (turn + _EIGHTH) >> _QUARTER_BITS
    x = (np.float64(turn - (q << _QUARTER_BITS)) + 0.5) * _RADIANS
    cos_sign = np.float64(_ONE - ((q + _ONE) & _TWO))
    sin_sign = np.float64(_ONE - (q & _TWO))
    return turned(x, np.float64(q & _ONE), cos_sign, sin_sign)


def coefficients(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return standard normal c for [n] u32 words, n even."""
    length = radius(words[0::2])
    cos, sin = cos_sin(words[1::2])
    c = np.empty(words.size, dtype=np.float32)
    c[0::2], c[1::2] = length * cos, length * sin
    return c


def tensor_coefficients(words: Tensor) -> Tensor:
    """Return `coefficients` for [n] u32 words in an int64 tensor, n even, on a device that has float64."""
    import torch

    u = (words[0::2].double() + 0.5) * 2.0**-32
    bits = u.view(torch.int64)
    k = (bits - int(_SQRT_HALF)) >> 52
    m = (bits - k * 2**52).view(torch.float64)
    squared = minus_two_ln(k.double(), m)
    # On the CPU torch's sqrt may be a vector library's, which is off by one bit in about one value of eighty.
    on_cpu = squared.device.type == "cpu"
    length = torch.from_numpy(np.sqrt(squared.numpy())) if on_cpu else squared.sqrt()
    turn = words[1::2]
    q = (turn + 2**29) >> 30
    x = ((turn - q * 2**30).double() + 0.5) * _RADIANS
    cos, sin = turned(x, (q & 1).double(), (1 - ((q + 1) & 2)).double(), (1 - (q & 2)).double())
    return torch.stack((length * cos, length * sin), dim=1).flatten().float()


def amplitude(lam: Any, std: float) -> Any:
    """Return float32(λ · std / sqrt(12)), the noise's std; infinite where float32 cannot hold it."""
    return to_float32(lam * float(std) / _SQRT_12)


def absolute_amplitude(sigma: Any) -> Any:
    """Return float32(σ): the amplitude is the noise's std."""
    return to_float32(sigma)


def overall_amplitude(found: Sequence[float]) -> float:
    """Return the std of a sum of noises: √Σ a²."""
    return math.hypot(*found)


def noise_range(amplitude: float) -> dict[str, float]:
    """Return {noise_std}: the noise has no bounds."""
    return {"noise_std": abs(amplitude)}
