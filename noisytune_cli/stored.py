"""The stored dtypes inside a compiled loop: how a value is loaded, and how a sum is rounded to any of them.

Half precisions are converted on the integer bits, with selects in place of branches: that needs no hardware
support, is the same on every machine and vectorises. F16, of which it takes many operations, is left to the
CPU where that has an instruction for it. Every integer is cast back to its width where Numba would have
widened it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from noisytune_cli.vectors import narrow_f16, narrows_to_f16, widen_f16

_U16, _U32, _U64, _F32, _F64 = np.uint16, np.uint32, np.uint64, np.float32, np.float64

#: What scales the bits of a half shifted into a float32 to its value; infinities and NaNs need more.
_HALF_SCALE = _F32(2.0**112)

#: NumPy's view of each dtype's stored values; BF16 and F16 are handled as bits.
STORED: dict[str, Any] = {"F32": np.float32, "F64": np.float64, "BF16": np.uint16, "F16": np.uint16}

#: The bits of each dtype's infinity, and of the NaN that stands for all of its NaNs after a conversion.
INFINITE = {"F32": 0x7F800000, "F64": 0x7FF0000000000000, "BF16": 0x7F80, "F16": 0x7C00}
NAN = {"F32": 0x7FC00000, "F64": 0x7FF8000000000000, "BF16": 0x7FC0, "F16": 0x7E00}


@register_jitable
def load_f32(stored: Any, i: Any) -> Any:
    """Return element i of float32 or float64 values as it is."""
    return stored[i]


@register_jitable
def load_bf16(stored: Any, i: Any) -> Any:
    """Return element i of BF16 bits as float32."""
    return _U32(_U32(stored[i]) << _U32(16)).view(_F32)


@register_jitable
def load_f16_by_bits(stored: Any, i: Any) -> Any:
    """Return element i of F16 bits as float32."""
    half = _U32(stored[i])
    magnitude = _U32(half & _U32(0x7FFF))
    bits = _F32(_U32(magnitude << _U32(13)).view(_F32) * _HALF_SCALE).view(_U32)
    special = _U32(0x7F800000) if magnitude >= _U32(0x7C00) else _U32(0)  # infinity, or a NaN's exponent
    return _U32(bits | special | _U32(_U32(half & _U32(0x8000)) << _U32(16))).view(_F32)


@register_jitable
def load_f16_by_cpu(stored: Any, i: Any) -> Any:
    """Return element i of F16 bits as float32; a NaN becomes a quiet one."""
    return widen_f16(stored[i])


load_f16 = load_f16_by_cpu if narrows_to_f16() else load_f16_by_bits

#: How each dtype is loaded: (stored, index) -> float32, or float64 for F64.
LOAD = {"F32": load_f32, "F64": load_f32, "BF16": load_bf16, "F16": load_f16}


@register_jitable
def round_bf16(y: Any) -> Any:
    """Return the BF16 bits nearest to a float32 that is not NaN, ties to even."""
    bits = _F32(y).view(_U32)
    even = _U32(_U32(bits >> _U32(16)) & _U32(1))
    return _U16(_U32(bits + _U32(0x7FFF) + even) >> _U32(16))


@register_jitable
def round_f16_by_bits(y: Any) -> Any:
    """Return the F16 bits nearest to a float32 that is not NaN, ties to even."""
    bits = _F32(y).view(_U32)
    sign = _U32(_U32(bits >> _U32(16)) & _U32(0x8000))
    magnitude = _U32(bits & _U32(0x7FFFFFFF))
    even = _U32(_U32(magnitude >> _U32(13)) & _U32(1))
    normal = _U32(_U32(_U32(magnitude + _U32(0xFFF) + even) >> _U32(13)) - _U32(112 << 10))
    # Adding 1/2 lines a subnormal half's last bit up with a float32's, so the addition does the rounding.
    subnormal = _U32(_F32(abs(y) + _F32(0.5)).view(_U32) - _U32(0x3F000000))
    rounded = subnormal if magnitude < _U32(0x38800000) else normal
    rounded = _U32(0x7C00) if magnitude >= _U32(0x47800000) else rounded
    return _U16(rounded | sign)


@register_jitable
def round_f16_by_cpu(y: Any) -> Any:
    """Return the F16 bits nearest to a float32 that is not NaN, ties to even."""
    return narrow_f16(_F32(y))


round_f16 = round_f16_by_cpu if narrows_to_f16() else round_f16_by_bits


@register_jitable
def _bits_f32(y: Any) -> Any:
    return _F32(y).view(_U32)


@register_jitable
def _bits_f64(y: Any) -> Any:
    return _F64(y).view(_U64)


@register_jitable
def _round_to_odd(y: Any) -> Any:
    """Return a float64 cut off to float32, the last bit set where something was lost.

    That bit keeps what a second rounding, to a much shorter dtype, has to know: so the two are one rounding
    (Boldo, Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
    odd", IEEE Transactions on Computers 57, 2008).
    """
    nearest = _F32(y)
    back = _F64(nearest)
    past = _U32(1) if abs(back) > abs(y) else _U32(0)
    lost = _U32(1) if back != y else _U32(0)
    return _U32(_U32(nearest.view(_U32) - past) | lost).view(_F32)


@register_jitable
def _round_bf16_once(y: Any) -> Any:
    return round_bf16(_round_to_odd(y))


@register_jitable
def _round_f16_once(y: Any) -> Any:
    return round_f16(_round_to_odd(y))


#: How a value that is not NaN is rounded once, nearest-even, infinity past the range: (the dtype that it is
#: computed in, the dtype it is stored in) -> function that returns the bits.
ROUND = {
    ("F32", "F32"): _bits_f32,
    ("F32", "F64"): _bits_f64,
    ("F32", "BF16"): round_bf16,
    ("F32", "F16"): round_f16,
    ("F64", "F32"): _bits_f32,
    ("F64", "F64"): _bits_f64,
    ("F64", "BF16"): _round_bf16_once,
    ("F64", "F16"): _round_f16_once,
}
