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
from noisytune_cli.noise.devices.cuda import mix as triton_mix
from noisytune_cli.noise.devices.cuda.draws import DRAWS
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
    _, even = triton_noise._WAYS[name]
    how = {"draw": DRAWS[name], "unroll": 1, "even": even, "capability": int(sys.argv[1]) // 10}
    counted = {**tables, "counts": "i64"}
    text = ptx(triton_noise._add_noise, counted, in_place=True, **how, **kind)
    texts = [text, ptx(triton_mix._mix, {**counted, "terms": "i64"}, draw=DRAWS[name], **kind)]
    texts += [ptx(triton_noise._add_noise, counted, in_place=False, **how, **kind)] * even
    for one in texts:
        assert "add.rn.f32" in one and "mul.rn.f32" in one
        assert not re.search(r"fma|\\\\.ftz|\\\\.approx|st\\\\.shared\\\\.v", one), name
        assert "ld.global.v2" in one and "st.global.v2" in one
        assert name == "uniform" or "div.rn.f64" in one
    assert ("cvt.rn.bf16x2.f32" in text) == even
    assert ("min.u16x2" in text) == (even and sys.argv[1] >= "90")
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
