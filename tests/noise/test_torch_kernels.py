"""Words, roundings and sums in torch operations, at the ends of their ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from noisytune_cli.noise import std as moments
from noisytune_cli.noise import stream
from noisytune_cli.noise.devices.torch import operations as torch_kernels


def test_bfloat16_rounds_every_tie_to_even():
    """Add nothing to each float32 midway between two BF16 numbers, and to its two neighbours."""
    midway = (np.arange(0x7F80, dtype=np.uint32) << 16) + 0x8000
    bits = np.concatenate([midway - 1, midway, midway + 1])
    values = np.concatenate([bits, bits | 0x80000000]).view(np.float32)
    got = torch_kernels.round_bits(torch.from_numpy(values), torch.bfloat16).numpy().view(np.uint16)
    assert got.tobytes() == stream._round_to(values, "BF16").tobytes()


def test_float16_rounds_as_numpy_does_at_every_tie():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    midway = (halves[:-1] + halves[1:]) / 2
    around = [np.nextafter(midway, np.float32(side), dtype=np.float32) for side in (-1, 1e9)]
    values = np.concatenate([halves, midway, *around, np.float32([65519.0, 65520.0, 1e-8])])
    values = np.concatenate([values, -values])
    got = torch_kernels.round_bits(torch.from_numpy(values), torch.float16).numpy().view(np.float16)
    with np.errstate(over="ignore"):
        assert got.tobytes() == values.astype(np.float16).tobytes()


def test_words_at_the_ends_of_the_index_and_of_the_multiplication():
    for first in (0, 2**34 - 2, 2**64 - 7):
        got = torch_kernels.words(stream.stream_words(2**64 - 1, "é"), first, 7, torch.device("cpu"))
        assert got.tolist() == stream.words(2**64 - 1, "é", first, 7).tolist()
    edge = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    for multiplier in (stream.M0, stream.M1):
        high, low = torch_kernels._multiply(edge, multiplier)
        assert [h << 32 | w for h, w in zip(high.tolist(), low.tolist(), strict=True)] == [
            word * multiplier for word in edge.tolist()
        ]


def test_addition_in_place_counts_what_stayed():
    stored = torch.tensor([1.0, 1e30, -1e30, 2.0])
    noise = stream.Noise.of("uniform", stream.stream_words(0, "w"), 1.0)
    counts = torch_kernels.add_noise(stored, stored, noise, first=0)
    assert counts.tolist() == [2, 0]
    assert stored[0] == np.float32(1.0) + np.float32(0.09509900212287903)


@pytest.mark.parametrize("count", [1, moments.BLOCK, 5 * moments.BLOCK + 77])
def test_block_sums_are_the_same_for_any_chunks(monkeypatch, count):
    values = torch.from_numpy(np.random.default_rng(0).normal(size=count))
    whole = torch_kernels.moments(torch_kernels.block_sums(values).tolist(), count, wide=True)
    monkeypatch.setattr(torch_kernels, "CHUNK", moments.BLOCK)
    assert torch_kernels.moments(torch_kernels.block_sums(values).tolist(), count, wide=True) == whole
    assert whole.s2[0] > 0 or count == 1
