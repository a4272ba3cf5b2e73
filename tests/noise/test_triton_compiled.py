"""The fused CUDA kernels compiled for GPUs that need not be here: nothing is fused or flushed to zero."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_COMPILE = """
import re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from noisytune_cli.noise.devices.cuda import add as triton_noise
from noisytune_cli.noise.devices.cuda import add_pairs as triton_pairs
from noisytune_cli.noise.devices.cuda import sums as triton_sums
from noisytune_cli.noise.devices.cuda import launch as triton_tables
from noisytune_cli.noise.devices.cuda.launch import OPTIONS

def ptx(kernel, pointers, **constants):
    names = {name: f"*{kind}" for name, kind in pointers.items()}
    source = triton.compiler.ASTSource(
        kernel, signature={**names, **{k: "constexpr" for k in constants}}, constexprs=constants
    )
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=OPTIONS).asm["ptx"]

kind = {"dtype": tl.bfloat16, "bits_type": tl.uint16, "infinity": 0x7F80, "aligned": True}
tables = {"table": "i64", "owners": "i64"}
for name in ("uniform", "gaussian"):
    draw, _, even = triton_noise._DRAWS[name]
    how = {"draw": draw, "unroll": 1, "even": even, "capability": int(sys.argv[1]) // 10}
    text = ptx(triton_noise._add_noise, {**tables, "counts": "i64"}, **how, **kind)
    assert "add.rn.f32" in text and "mul.rn.f32" in text
    assert not re.search(r"fma|\\\\.ftz|\\\\.approx|st\\\\.shared\\\\.v", text), name
    assert ("cvt.rn.bf16x2.f32" in text) == even
    assert ("min.u16x2" in text) == (even and sys.argv[1] >= "90")
    assert "ld.global.v2" in text and "st.global.v2" in text
    if name == "gaussian":
        assert "div.rn.f64" in text and "sqrt.rn.f64" in text
        assert "0d3FD5555555555555" in text, "1/3 is not the float64"
text = ptx(triton_sums._sum_tiles, {**tables, "sums": "fp64", "partials": "fp64"}, **kind)
assert "ld.global.v4" in text and not re.search(r"\\\\.ftz|\\\\.approx", text)
ptx(triton_sums._find_pivot, {"table": "i64", "sums": "fp64"}, dtype=tl.bfloat16, bits_type=tl.uint16)
ptx(triton_sums._add_up, {"table": "i64", "partials": "fp64", "sums": "fp64"}, wide=False)
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_compiled_for_a_gpu_nothing_is_fused_or_flushed(capability: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_COMPILE.replace("\\\\", "\\"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, program, capability],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
