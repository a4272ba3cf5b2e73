"""The element types, each once: their names in safetensors, their sizes, and which of them get noise."""

from __future__ import annotations

#: The element types that get noise, with their size in bytes.
FLOAT_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
#: The dtypes of safetensors; one string for each, not one for each tensor.
DTYPES = {name: name for name in _BITS}

_OTHER_BITS = {"C32": 32, "C128": 128}
#: The dtypes of all formats, as a manifest names them.
ALL_DTYPES = {name: name for name in (*_BITS, *_OTHER_BITS)}

#: Names as torch and the command line have them.
BY_TORCH_NAME = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

#: The largest finite value of each dtype that gets noise; results are clamped to it.
LARGEST = {
    "F64": float.fromhex("0x1.FFFFFFFFFFFFFp1023"),
    "F32": float.fromhex("0x1.FFFFFEp127"),
    "F16": 65504.0,
    "BF16": float.fromhex("0x1.FEp127"),
}

_MAX_BYTES = 2**63 - 1


def stored_bytes(dtype: str, shape: list[int]) -> int:
    """Return the bytes that a tensor takes; ValueError, which says why, where none could."""
    bits = _BITS.get(dtype) or _OTHER_BITS[dtype]
    # A 0 does not excuse the other dimensions: [2^63, 4, 0] overflows in any reader that multiplies in order.
    for dimension in shape:
        bits *= dimension or 1
        if bits > 8 * _MAX_BYTES:
            raise ValueError("its shape multiplies to more than 2^63 - 1 bytes")
    if 0 in shape:
        return 0
    if bits % 8:
        raise ValueError(f"its {bits:,} bits do not fill whole bytes")
    return bits // 8
