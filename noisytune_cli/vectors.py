"""What a compiled loop may expect of the CPU's vectors: their full width, and conversions of half precisions.

For CPUs with AVX-512 LLVM prefers half of that width, because the first of them slowed down when they used
all of it. The loops here gain from the full one.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding
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
