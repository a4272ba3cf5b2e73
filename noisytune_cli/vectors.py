"""How wide the vectors of a compiled loop are: as wide as the CPU has them.

For CPUs with AVX-512 LLVM prefers half of that width, because the first of them slowed down when they used
all of it. The loops here gain from the full one.
"""

from __future__ import annotations

from typing import Any

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
