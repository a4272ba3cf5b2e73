"""The torch device against the NumPy reference and the compiled loops, bit for bit.

Everything runs on torch's CPU; the same checks run on a GPU where there is one.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noisytune_cli.errors import ResourceExhausted, UsageError
from noisytune_cli.noise import devices, stream
from noisytune_cli.noise import std as moments
from noisytune_cli.noise.devices import cpu
from noisytune_cli.noise.devices import torch as torch_device
from noisytune_cli.noise.devices.torch import operations as torch_kernels

NUMPY = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "BF16": np.uint16}
CPU = cpu.open_device("cpu")


def _absent(name: str) -> str | None:
    """Say why a device cannot be tested here."""
    return torch_device.why_missing(torch.device(name))


DEVICES = [
    "torch:cpu",
    *(
        pytest.param(name, marks=pytest.mark.skipif(bool(why := _absent(name)), reason=str(why)))
        for name in ("cuda", "cuda:1", "mps")
    ),
]


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return devices.open_device(request.param)


def finite(dtype: str, count: int, seed: int = 0, *, subnormals: bool = True) -> np.ndarray:
    """Return random finite stored values of every exponent, both zeros and both largest values among them."""
    rng = np.random.default_rng(seed)
    size = torch_kernels.DTYPES[dtype].itemsize
    drawn = np.frombuffer(rng.bytes(4 * count * size), f"u{size}")
    wide = stream.upcast(drawn.view(NUMPY[dtype]), dtype)
    smallest = np.finfo(wide.dtype).tiny
    kept = np.isfinite(wide) if subnormals else np.isfinite(wide) & (np.abs(wide) >= smallest)
    values = drawn[kept][:count].copy()
    infinity = torch_kernels.BITS[torch_kernels.DTYPES[dtype]][1]
    sign = 1 << (8 * size - 1)
    edges = [infinity - 1, infinity - 1 + sign, 0, sign]
    values[: min(4, count)] = np.array(edges, values.dtype)[:count]
    return values.view(NUMPY[dtype])


def noised(device, stored, dtype, distribution, name, seed, first, amplitude):
    tile = stored.tobytes()  # read-only, as a mapped file is
    out = bytearray(len(tile))
    counts = device.add_noise(
        memoryview(tile),
        memoryview(out),
        dtype,
        noise=stream.Noise.of(distribution, stream.stream_words(seed, name), float(amplitude)),
        first=first,
    )
    return bytes(out), *counts


def reference(stored, dtype, distribution, name, seed, first, amplitude):
    c = stream.coefficients(distribution, seed, name, first, stored.size)
    values, unchanged, clamped = stream.add_noise(stored, dtype, c, np.float32(amplitude))
    return values.tobytes(), unchanged, clamped


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(sorted(NUMPY)),
    distribution=st.sampled_from(["uniform", "gaussian"]),
    count=st.integers(1, 3000),
    first=st.integers(0, 2**64 - 3001) | st.integers(2**31 - 3000, 2**31) | st.integers(0, 9),
    seed=st.integers(0, 2**64 - 1),
    exponent=st.integers(-45, 38),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    values=st.integers(0, 99),
)
def test_bits_are_those_of_the_reference_and_of_the_cpu(
    dtype, distribution, count, first, seed, exponent, name, values
):
    stored = finite(dtype, count, values)
    amplitude = np.float32(10.0**exponent)
    arguments = (stored, dtype, distribution, name, seed, first, amplitude)
    got = noised(torch_device.Torch(torch.device("cpu")), *arguments)
    assert got == reference(*arguments)
    assert got == noised(CPU, *arguments)


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_every_device_gives_the_bits_of_the_reference(device, dtype, distribution):
    stored = finite(dtype, 100_003, subnormals=getattr(device, "has_float64", True))
    arguments = (stored, dtype, distribution, "w", 42, 2**33 + 3, np.float32(0.07))
    assert noised(device, *arguments) == reference(*arguments)


@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_the_largest_values_are_clamped_and_counted(device, dtype):
    infinity = torch_kernels.BITS[torch_kernels.DTYPES[dtype]][1]
    bits = np.full(1001, infinity - 1, f"u{torch_kernels.DTYPES[dtype].itemsize}")
    bits[500:] |= np.array(1 << (8 * bits.itemsize - 1), bits.dtype)
    # F64 never gets there: float32's largest amplitude is far below half a unit of its largest value.
    amplitude = np.finfo(np.float32).max
    arguments = (bits.view(NUMPY[dtype]), dtype, "uniform", "w", 1, 0, amplitude)
    got = noised(device, *arguments)
    assert got == reference(*arguments)
    assert (got[2] > 300) == (dtype != "F64")
    assert np.isfinite(stream.upcast(np.frombuffer(got[0], NUMPY[dtype]), dtype)).all()


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_chunks_do_not_show(monkeypatch, distribution):
    stored = finite("F16", 5 * moments.BLOCK + 77)
    arguments = (stored, "F16", distribution, "w", 5, 3, np.float32(2.0))
    one = torch_device.Torch(torch.device("cpu"))
    whole = noised(one, *arguments)
    monkeypatch.setattr(torch_kernels, "CHUNK", moments.BLOCK)
    assert noised(one, *arguments) == whole


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(sorted(NUMPY)),
    count=st.integers(1, 5000),
    centre=st.sampled_from([0.0, 1.0, -1e4]),
    seed=st.integers(0, 99),
)
def test_moments_keep_the_error_bound_of_the_exact_sums(dtype, count, centre, seed):
    drawn = centre + np.random.default_rng(seed).normal(0, 1e-3, count)
    tensor = torch.from_numpy(drawn).to(torch_kernels.DTYPES[dtype])
    tile = memoryview(tensor.view(torch.uint8).numpy()).cast("B")
    got = torch_device.Torch(torch.device("cpu")).moments(tile, dtype)
    deviations = [Fraction(x) - Fraction(got.pivot) for x in tensor.double().tolist()]
    first, second = sum(deviations, Fraction(0)), sum((d * d for d in deviations), Fraction(0))
    bound = Fraction(moments.RELATIVE_ERROR)
    assert abs(Fraction(got.s1[0]) + Fraction(got.s1[1]) - first) <= bound * sum(
        map(abs, deviations), Fraction(0)
    )
    assert abs(Fraction(got.s2[0]) + Fraction(got.s2[1]) - second) <= bound * second
    assert (got.count, got.finite, got.wide) == (count, True, dtype == "F64")


@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_std_is_that_of_the_cpu(device, dtype):
    rng = np.random.default_rng(3)
    tensor = torch.from_numpy(rng.normal(0.01, 0.05, 70_001)).to(torch_kernels.DTYPES[dtype])
    tile = memoryview(tensor.view(torch.uint8).numpy()).cast("B")
    expected = moments.round_std([CPU.moments(tile, dtype)])
    assert expected is not None
    assert moments.round_std([device.moments(tile, dtype)]) == expected


@pytest.mark.parametrize("dtype", sorted(NUMPY))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_seen(device, dtype, bad):
    tensor = torch.ones(3000, dtype=torch_kernels.DTYPES[dtype])
    tensor[2999] = bad
    tile = memoryview(tensor.view(torch.uint8).numpy()).cast("B")
    assert not device.moments(tile, dtype).finite


def test_sums_past_float64_leave_the_std_to_the_exact_sums():
    """Squares overflow within a block, sums across blocks, and infinities of both signs meet."""
    one = torch_device.Torch(torch.device("cpu"))
    for values in (np.full(4000, 1e308), np.tile([1.7e308, -1.7e308], 3000), np.linspace(0, 1e154, 9000)):
        got = one.moments(memoryview(values.tobytes()), "F64")
        assert got.finite
        assert moments.round_std([got]) is None
        sums, expected = moments.new_exact_sums(), moments.new_exact_sums()
        one.add_exact_sums(memoryview(values.tobytes()), "F64", sums)
        CPU.add_exact_sums(memoryview(values.tobytes()), "F64", expected)
        assert sums.any()
        assert (sums == expected).all()


def test_statistics_are_those_of_the_cpu(device):
    tile = memoryview(finite("BF16", 5001).tobytes())
    assert device.summarize(tile, "BF16") == CPU.summarize(tile, "BF16")


def test_without_float64_the_cpu_does_what_needs_it(monkeypatch):
    """As on mps: F64 tensors, Gaussian noise and moments never reach the device."""
    one = torch_device.Torch(torch.device("cpu"))
    one.has_float64 = False
    calls = []
    add_noise = torch_kernels.add_noise
    monkeypatch.setattr(torch_kernels, "block_sums", lambda stored: pytest.fail("moments on the device"))
    monkeypatch.setattr(torch_kernels, "add_noise", lambda *a: calls.append(a[2]) or add_noise(*a))
    for dtype, distribution in (("F64", "uniform"), ("F32", "gaussian"), ("F32", "uniform")):
        arguments = (finite(dtype, 999), dtype, distribution, "w", 0, 1, np.float32(0.5))
        assert noised(one, *arguments) == reference(*arguments)
    assert [noise.distribution for noise in calls] == ["uniform"]
    tile = memoryview(np.arange(9, dtype=np.float32).tobytes())
    assert one.moments(tile, "F32") == CPU.moments(tile, "F32")


def test_threads_share_a_device(device):
    """More tiles than threads, of different sizes, so that staging buffers are reused and grown."""
    jobs = [
        (finite("F32", 1000 + 997 * i, i), "F32", "uniform", "w", i, i, np.float32(1.0)) for i in range(24)
    ]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda job: noised(device, *job), jobs))
    assert got == [noised(CPU, *job) for job in jobs]


@pytest.mark.parametrize(
    "name",
    ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps:0", "cpu:0", "torch:xpu", "cuda\n", "../cpu"],
)
def test_a_name_that_no_device_has_is_a_usage_error(name):
    with pytest.raises(UsageError, match="Choose cpu, cuda, cuda:N or mps"):
        devices.open_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps"])
def test_hardware_that_is_not_there_is_a_usage_error(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="Use --device=cpu, which gives the same bytes"):
        devices.open_device(name)


def test_a_gpu_number_past_the_last_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="finds 2 CUDA GPUs here"):
        devices.open_device("cuda:2")


def test_a_device_that_is_not_exact_is_refused(monkeypatch):
    round_nearest = torch_kernels.round_bits

    def truncate(y, dtype):
        return (
            (y.view(torch.int32) >> 16).to(torch.int16)
            if dtype == torch.bfloat16
            else round_nearest(y, dtype)
        )

    assert torch_device.is_exact(torch_device.Torch(torch.device("cpu")))
    monkeypatch.setattr(torch_kernels, "round_bits", truncate)
    with pytest.raises(UsageError, match="not exact"):
        devices.open_device("torch:cpu")


def test_a_fused_multiply_add_would_be_noticed(monkeypatch):
    def fused(stored, out, noise, first):
        assert stored.is_contiguous()
        ((words, amplitude),) = noise.terms
        c = torch_kernels.coefficients(noise.distribution, words, first, stored.numel(), stored.device)
        before = stored.clone()
        out.copy_((c.double() * amplitude + stored.double()).float())
        return torch.stack(((out == before).sum(), torch.tensor(0)))

    one = torch_device.Torch(torch.device("cpu"))
    stored = np.linspace(-2, 2, 4099, dtype=np.float32)
    arguments = (stored, "F32", "uniform", "w", 0, 0, np.float32(0.3))
    monkeypatch.setattr(torch_kernels, "add_noise", fused)
    got, expected = noised(one, *arguments)[0], reference(*arguments)[0]
    assert np.allclose(np.frombuffer(got, np.float32), np.frombuffer(expected, np.float32))
    assert got != expected
    assert not torch_device.is_exact(one)


def test_a_device_out_of_memory_says_so(monkeypatch):
    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    one = torch_device.Torch(torch.device("cpu"))
    monkeypatch.setattr(torch_kernels, "block_sums", exhausted)
    with pytest.raises(ResourceExhausted, match="use --device=cpu"):
        one.moments(memoryview(bytes(8)), "F32")


def test_neither_the_devices_nor_the_cpu_import_torch():
    program = (
        "import sys; from noisytune_cli.noise import devices, distributions; devices.open_device('cpu');"
        "devices.names(); [distributions.load(n) for n in distributions.names()];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
