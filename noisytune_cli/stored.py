"""The stored dtypes inside a compiled loop: how a value is loaded, and how a sum is rounded back.

Half precisions are converted on the integer bits, with selects in place of branches: that needs no hardware
support, is the same on every machine and vectorises. Every integer is cast back to its width where Numba
would have widened it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

_U16, _U32, _F32 = np.uint16, np.uint32, np.float32

#: What scales the bits of a half shifted into a float32 to its value; infinities and NaNs need more.
_HALF_SCALE = _F32(2.0**112)

#: NumPy's view of each dtype's stored values; BF16 and F16 are handled as bits.
STORED: dict[str, Any] = {"F32": np.float32, "F64": np.float64, "BF16": np.uint16, "F16": np.uint16}


@register_jitable
def load_f32(stored: Any, i: Any) -> Any:
    """Return element i of float32 or float64 values as it is."""
    return stored[i]


@register_jitable
def load_bf16(stored: Any, i: Any) -> Any:
    """Return element i of BF16 bits as float32."""
    return _U32(_U32(stored[i]) << _U32(16)).view(_F32)


@register_jitable
def load_f16(stored: Any, i: Any) -> Any:
    """Return element i of F16 bits as float32."""
    half = _U32(stored[i])
    magnitude = _U32(half & _U32(0x7FFF))
    bits = _F32(_U32(magnitude << _U32(13)).view(_F32) * _HALF_SCALE).view(_U32)
    special = _U32(0x7F800000) if magnitude >= _U32(0x7C00) else _U32(0)  # infinity, or a NaN's exponent
    return _U32(bits | special | _U32(_U32(half & _U32(0x8000)) << _U32(16))).view(_F32)


#: How each dtype is loaded: (stored, index) -> float32, or float64 for F64.
LOAD = {"F32": load_f32, "F64": load_f32, "BF16": load_bf16, "F16": load_f16}


@register_jitable
def round_bf16(y: Any) -> Any:
    """Return the BF16 bits nearest to a float32 that is not NaN, ties to even."""
    bits = _F32(y).view(_U32)
    even = _U32(_U32(bits >> _U32(16)) & _U32(1))
    return _U16(_U32(bits + _U32(0x7FFF) + even) >> _U32(16))


@register_jitable
def round_f16(y: Any) -> Any:
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
