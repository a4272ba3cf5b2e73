"""What a compiled loop gets from the CPU's vectors: their full width, and conversions of half precisions.

For CPUs with AVX-512 LLVM prefers half of that width, because the first of them slowed down when they used
all of it. The loops here gain from the full one.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def _prefer_wide_vectors(typing_context: Any) -> Any:
    """Let LLVM use vectors of 512 bits in the function that calls this, where the CPU has them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # llvmlite's own `add` takes attributes without a value only.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


#: What a loop calls: to Numba the intrinsic, which types as a function without arguments.
prefer_wide_vectors: Any = _prefer_wide_vectors


@intrinsic
def _widen_f16(typing_context: Any, bits: Any) -> Any:
    """Return the float32 of F16 bits, which only a CPU that `narrows_to_f16` can do without a library."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_f16(typing_context: Any, value: Any) -> Any:
    """Return the F16 bits of a float32, as above."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


widen_f16: Any = _widen_f16
narrow_f16: Any = _narrow_f16


def narrows_to_f16() -> bool:
    """Say whether the CPU converts F16 to float32 and back, nearest-even."""
    return _has("f16c") or platform.machine() in ("aarch64", "arm64")


def narrows_to_bf16() -> bool:
    """Say whether the CPU rounds vectors of 512 bits to BF16, nearest-even, with subnormals as zeros."""
    return _has("avx512bf16") and _has("avx512bw")


def _has(feature: str) -> bool:
    try:
        return bool(binding.get_host_cpu_features().get(feature))
    except RuntimeError:  # LLVM cannot tell on every architecture
        return False
