"""The compiled loops write over what they read, with the same bits and counts as beside it."""

from __future__ import annotations

import pytest
import torch

from noisytune_cli.noise import devices, stream


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "F16"])
def test_the_compiled_loop_works_in_place(dtype: str, distribution: str) -> None:
    cpu = devices.open_device("cpu")
    values = torch.linspace(-65504, 65504, 9001).to(
        getattr(torch, {"F32": "float32", "F64": "float64", "BF16": "bfloat16", "F16": "float16"}[dtype])
    )
    source = bytearray(values.view(torch.uint8).numpy().tobytes())
    apart = bytearray(len(source))
    first, noise = 2**32 - 5, stream.Noise.of(distribution, stream.stream_words(7, "w"), 900.0)
    counts = cpu.add_noise(memoryview(source), memoryview(apart), dtype, noise=noise, first=first)
    assert cpu.add_noise(memoryview(source), memoryview(source), dtype, noise=noise, first=first) == counts
    assert source == apart
    assert dtype != "F16" or counts[1] > 0
