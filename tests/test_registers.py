"""Noise in registers: where it begins, stops and gives way to the general loop, and other CPUs' vectors."""

from __future__ import annotations

import platform
from collections.abc import Callable

import numpy as np
import oracle
import pytest
from llvmlite import binding

from noisytune_cli import compiled, distributions, kernels, register_sums, stream
from noisytune_cli import stored as conversions
from noisytune_cli.devices.cpu import NOISE_BLOCK, Cpu
from noisytune_cli.philox_vectors import WORDS
from noisytune_cli.register_sums import SMALLEST_AMPLITUDE

SEED, NAME = 2**63 + 7, "w"
DTYPES = ("F32", "BF16", "F16")


def reference(
    stored: np.ndarray, dtype: str, first: int, amplitude: float
) -> tuple[np.ndarray, tuple[int, int]]:
    c = stream.coefficients("uniform", SEED, NAME, first, stored.size)
    out, unchanged, clamped = stream.add_noise(stored, dtype, c, np.float32(amplitude))
    return out, (unchanged, clamped)


def in_place(
    stored: np.ndarray, dtype: str, first: int, amplitude: float
) -> tuple[np.ndarray, tuple[int, int]]:
    out = stored.copy()
    tile = oracle.tile(out)
    counts = Cpu().add_noise(
        tile,
        tile,
        dtype,
        distribution="uniform",
        stream=stream.stream_words(SEED, NAME),
        first=first,
        amplitude=amplitude,
    )
    return out, counts


def check(stored: np.ndarray, dtype: str, first: int, amplitude: float) -> tuple[int, int]:
    """Hold noise in place to the reference, and return its counts."""
    expected, expected_counts = reference(stored, dtype, first, amplitude)
    out, counts = in_place(stored, dtype, first, amplitude)
    assert out.tobytes() == expected.tobytes()
    assert counts == expected_counts
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, WORDS - 1, WORDS, 5 * WORDS + 17, 40 * WORDS - 1, 40 * WORDS + 2])
def test_one_value_that_overflows_in_place(dtype: str, at: int) -> None:
    # The noise at this element must go outwards, so its sign decides that of the value.
    large = float(oracle.LARGEST[dtype])
    stored = oracle.encode([large / 4] * (40 * WORDS + 3), dtype)
    (c,) = stream.coefficients("uniform", SEED, NAME, at, 1)
    stored[at] = oracle.encode([float(np.copysign(large, c))], dtype)[0]
    _, clamped = check(stored, dtype, 0, float(np.float32(large / 4)))
    assert clamped == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_overflow_everywhere(dtype: str) -> None:
    stored = oracle.encode([oracle.LARGEST[dtype], -oracle.LARGEST[dtype], 0.0] * 3000, dtype)
    _, clamped = check(stored, dtype, 4, float(np.finfo(np.float32).max))
    assert clamped > 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [0, 1, 2, 14])
def test_large_values_that_do_not_overflow(dtype: str, power: int) -> None:
    # From 2 on each turn is looked at twice.
    values = np.random.default_rng(power).standard_normal(30 * WORDS).clip(-1.9, 1.9) * 2.0**power
    assert check(oracle.encode(values.tolist(), dtype), dtype, 0, 0.125)[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "first", [2**34 - 4 * k for k in (1, 31, 32, 33, 64, 1000)] + [2**34, 2**34 + 4, 2**63 - 2**34 - 128]
)
def test_the_counters_low_word_runs_over(dtype: str, first: int) -> None:
    check(oracle.weights(np.random.default_rng(3), 40 * WORDS + 5, dtype), dtype, first, 0.003)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "amplitude", [SMALLEST_AMPLITUDE, SMALLEST_AMPLITUDE * (1 - 2.0**-24), 2.0**-126, 2.0**-149]
)
def test_the_smallest_amplitudes(dtype: str, amplitude: float) -> None:
    tiny = np.random.default_rng(5).standard_normal(20 * WORDS) * amplitude
    check(oracle.encode(tiny.tolist(), dtype), dtype, 0, amplitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amplitude", [SMALLEST_AMPLITUDE, 2.0**-20, 0.01])
def test_sums_that_nearly_cancel(dtype: str, amplitude: float) -> None:
    # Each value is the negative of its noise as far as its dtype can say it, so that next to nothing is left.
    c = stream.coefficients("uniform", SEED, NAME, 0, 20 * WORDS)
    opposite = -(c * np.float32(amplitude))
    check(oracle.encode([float(x) for x in opposite], dtype), dtype, 0, amplitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, WORDS - 1, WORDS, WORDS + 1, 9 * WORDS, NOISE_BLOCK + WORDS + 1])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_counts_and_starts(dtype: str, count: int, first: int) -> None:
    check(oracle.weights(np.random.default_rng(count), count, dtype), dtype, first, 0.003)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unchanged_values_are_counted_in_long_runs(dtype: str) -> None:
    stored = oracle.encode([1.0, 0.0], dtype).repeat(2**20)
    unchanged, _ = check(stored, dtype, 0, float(np.float32(2.0**-40)))
    assert unchanged >= 2**20  # the ones; of F16, zeros too


def cpus() -> list[str]:
    """Return kinds of x86-64 CPU with shorter vectors, some without a fused multiply-add."""
    if platform.machine() != "x86_64":
        return []
    features = binding.get_host_cpu_features()
    return ["x86-64", "x86-64-v2"] + ["x86-64-v3"] * all(map(features.get, ("avx2", "fma", "f16c")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cpu", cpus())
def test_other_cpus_vectors(dtype: str, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def machine() -> binding.TargetMachine:
        target = binding.Target.from_default_triple()
        return target.create_target_machine(
            cpu=cpu, features="", opt=3, jit=True, reloc="default", codemodel="jitdefault"
        )

    code = compile_for(machine, cpu, dtype, monkeypatch)
    loop = compiled.Loop(compiled._map(code), "ppiuuuuufpppp")
    stored = oracle.weights(np.random.default_rng(1), 40 * WORDS + 3, dtype)
    largest = oracle.LARGEST[dtype]
    stored[3 * WORDS] = oracle.encode([largest], dtype)[0]
    out, counts = np.empty_like(stored), np.empty(2, np.int64)
    scratch = [np.zeros(NOISE_BLOCK, kind) for kind in (np.uint32, np.float32, np.float64)]
    addresses = [array.ctypes.data for array in (*scratch, counts)]
    words = stream.stream_words(SEED, NAME)
    amplitude = float(np.float32(float(largest) / 4))
    loop(stored.ctypes.data, out.ctypes.data, stored.size, 0, *words, amplitude, *addresses)
    expected, expected_counts = reference(stored, dtype, 0, amplitude)
    assert out.tobytes() == expected.tobytes()
    assert tuple(counts.tolist()) == expected_counts


def compile_for(
    machine: Callable[[], binding.TargetMachine], cpu: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> bytes:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "_machine", machine)
        if cpu != "x86-64-v3":
            patched.setattr(register_sums, "narrows_to_f16", lambda: False)
            patched.setattr(kernels, "load_f16", conversions.load_f16_by_bits)
            patched.setattr(kernels, "round_f16", conversions.round_f16_by_bits)
        patched.setattr(register_sums, "narrows_to_bf16", lambda: False)
        uniform = distributions.load("uniform")
        return compiled._compile("ppiuuuuufpppp", kernels.noise_loop(uniform, dtype, dtype, NOISE_BLOCK))
