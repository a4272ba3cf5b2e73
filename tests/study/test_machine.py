"""What a study finds out about the machine it runs on."""

from __future__ import annotations

import pytest
import torch

from noisytune_cli.study import machine


@pytest.mark.parametrize(
    ("cpuinfo", "chosen"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile", "bfloat16"),
        ("flags\t\t: fpu avx512f amx_bf16", "bfloat16"),
        ("Features\t: fp asimd bf16 i8mm", "bfloat16"),
        # These emulate it, as does AVX-512 before the extension.
        ("flags\t\t: fpu avx avx2 f16c", "float32"),
        ("flags\t\t: fpu avx512f avx512_vnni", "float32"),
        ("", "float32"),
    ],
)
def test_bfloat16_is_chosen_only_where_the_cpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, chosen: str
) -> None:
    told = dict([[part.strip() for part in cpuinfo.split(":")]]) if cpuinfo else {}
    monkeypatch.setattr(machine, "_cpu_fact", lambda name: told.get(name, ""))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    assert machine.choose_precision("auto", "cpu") == chosen
    assert machine.choose_precision("float32", "cpu") == "float32"
    assert machine.choose_precision("bfloat16", "cpu") == "bfloat16"


def test_bfloat16_is_not_chosen_where_torch_has_no_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpu_fact", lambda name: "avx512_bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert machine.choose_precision("auto", "cpu") == "float32"


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_that_emulates_bfloat16_gets_float32(
    monkeypatch: pytest.MonkeyPatch, native: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert machine.choose_precision("auto", "cuda:0") == chosen
