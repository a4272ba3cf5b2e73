"""The CPU's kernels at every level: the reference's bits where a block, a counter or a range ends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import oracle
import pytest
from checkpoints import save, weights
from levels import LEVELS, compiled, cpu_at

from noisytune_cli.errors import NoisytuneWarning, UsageError
from noisytune_cli.noise import distributions, stream
from noisytune_cli.noise.devices.cpu import Cpu, library, reference
from noisytune_cli.noise.std import new_exact_sums

SEED, NAME = 2**63 + 7, "w"
DTYPES = library.DTYPES
DISTRIBUTIONS = distributions.names()

#: The most values that a level works on at a time (BLOCK in kernels.c, with four chains).
BLOCK = 128


@pytest.fixture(scope="module", params=LEVELS)
def cpu(request: pytest.FixtureRequest) -> Iterator[Cpu]:
    with cpu_at(request.param) as device:
        yield device


def check(
    cpu: Cpu, stored: np.ndarray, dtype: str, first: int, amplitude: float, distribution: str = "uniform"
) -> tuple[int, int]:
    """Hold noise in place and apart to the reference, and return its counts."""
    c = stream.coefficients(distribution, SEED, NAME, first, stored.size)
    expected, unchanged, clamped = stream.add_noise(stored, dtype, c, np.float32(amplitude))
    for apart in (False, True):
        source = stored.copy()
        tile = oracle.tile(source)
        out = oracle.tile(np.empty_like(stored)) if apart else tile
        counts = cpu.add_noise(
            tile,
            out,
            dtype,
            noise=stream.Noise.of(distribution, stream.stream_words(SEED, NAME), amplitude),
            first=first,
        )
        assert out.tobytes() == expected.tobytes()
        assert counts == (unchanged, clamped)
    return unchanged, clamped


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 5 * BLOCK + 17, 40 * BLOCK - 1, 40 * BLOCK + 2])
def test_one_value_that_overflows(cpu: Cpu, dtype: str, at: int) -> None:
    # The noise at this element must go outwards, so its sign decides that of the value.
    large = float(oracle.LARGEST[dtype])
    stored = oracle.encode([large / 4] * (40 * BLOCK + 3), dtype)
    (c,) = stream.coefficients("uniform", SEED, NAME, at, 1)
    stored[at] = oracle.encode([math.copysign(large, float(c))], dtype)[0]
    _, clamped = check(cpu, stored, dtype, 0, float(np.float32(min(large / 4, 2.0**126))))
    assert clamped == (dtype != "F64")  # whose largest no float32 amplitude can move


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_overflow_everywhere(cpu: Cpu, dtype: str) -> None:
    stored = oracle.encode([oracle.LARGEST[dtype], -oracle.LARGEST[dtype], 0.0] * 3000, dtype)
    _, clamped = check(cpu, stored, dtype, 4, float(np.finfo(np.float32).max))
    assert clamped > 1000 or dtype == "F64"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "first", [2**34 - 4 * k for k in (1, 7, 8, 31, 32, 1000)] + [2**34, 2**34 + 4, 2**63 - 2**34 - 128]
)
def test_the_counters_low_word_runs_over(cpu: Cpu, dtype: str, first: int, distribution: str) -> None:
    stored = oracle.weights(np.random.default_rng(3), 40 * BLOCK + 5, dtype)
    check(cpu, stored, dtype, first, 0.003, distribution)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amplitude", [2.0**-70, 2.0**-126, 2.0**-149])
def test_the_smallest_amplitudes(cpu: Cpu, dtype: str, amplitude: float) -> None:
    tiny = np.random.default_rng(5).standard_normal(20 * BLOCK) * amplitude
    check(cpu, oracle.encode(tiny.tolist(), dtype), dtype, 0, amplitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amplitude", [2.0**-70, 2.0**-20, 0.01])
def test_sums_that_nearly_cancel(cpu: Cpu, dtype: str, amplitude: float) -> None:
    # Each value is the negative of its noise as far as its dtype can say it, so that next to nothing is left.
    c = stream.coefficients("uniform", SEED, NAME, 0, 20 * BLOCK)
    opposite = -(c * np.float32(amplitude))
    check(cpu, oracle.encode([float(x) for x in opposite], dtype), dtype, 0, amplitude)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_and_starts(cpu: Cpu, dtype: str, distribution: str) -> None:
    for count in (0, 1, 15, 16, 17, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK):
        for first in range(4):
            stored = oracle.weights(np.random.default_rng(count), count, dtype)
            check(cpu, stored, dtype, first, 0.003, distribution)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unchanged_values_are_counted_in_long_runs(cpu: Cpu, dtype: str) -> None:
    stored = oracle.encode([1.0, 0.0], dtype).repeat(2**18)
    unchanged, _ = check(cpu, stored, dtype, 0, float(np.float32(2.0**-60)))
    assert unchanged >= 2**18  # the ones; of F16, zeros too


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_noise_into_every_dtype(cpu: Cpu, dtype: str, out_dtype: str, distribution: str) -> None:
    rng = np.random.default_rng(8)
    for stored in (oracle.any_finite(rng, 1003, dtype), oracle.weights(rng, 1003, dtype)):
        for amplitude in (2.0**-140, 2.0**-9, 2.0**15, 2.0**127):
            c = stream.coefficients(distribution, SEED, NAME, 5, stored.size)
            expected, *counts = stream.add_noise(stored, dtype, c, np.float32(amplitude), out_dtype)
            out = np.empty(stored.size, oracle.STORED[out_dtype][0])
            got = cpu.add_noise(
                oracle.tile(stored),
                oracle.tile(out),
                dtype,
                out_dtype,
                noise=stream.Noise.of(distribution, stream.stream_words(SEED, NAME), amplitude),
                first=5,
            )
            assert out.tobytes() == expected.tobytes()
            assert list(got) == counts


@pytest.mark.parametrize("out_dtype", ["F32", "F64"])
def test_every_f16_is_widened(cpu: Cpu, out_dtype: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16)
    out = np.empty(halves.size, oracle.STORED[out_dtype][0])
    assert cpu.convert(oracle.tile(halves), oracle.tile(out), "F16", out_dtype) == 0
    assert out.tobytes() == stream.convert(halves.view(np.float16), "F16", out_dtype)[0].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_values_of_every_kind_are_converted(cpu: Cpu, dtype: str, out_dtype: str) -> None:
    stored, bits, infinite = oracle.STORED[dtype]
    rng = np.random.default_rng(12)
    special = np.array([infinite, infinite | 1, infinite - 1, 0], bits).repeat(7).view(stored)
    for values in (oracle.any_finite(rng, 1003, dtype), special, special[:5], special[:0]):
        out = np.empty(values.size, oracle.STORED[out_dtype][0])
        overflowed = cpu.convert(oracle.tile(values), oracle.tile(out), dtype, out_dtype)
        expected, lost = stream.convert(values, dtype, out_dtype)
        assert (out.tobytes(), overflowed) == (expected.tobytes(), lost)


def test_float32_is_rounded_to_f16(cpu: Cpu) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    ordered = np.unique(np.append(halves[np.isfinite(halves)].astype(np.float64), [65536.0, -65536.0]))
    midpoints = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)  # exact: one bit more than F16 has
    above, below = (np.nextafter(midpoints, np.float32(to)) for to in (np.inf, -np.inf))
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e38, -1e38, 1e-40, -1e-45], np.float32)
    values = np.concatenate([midpoints, above, below, ordered.astype(np.float32), special])
    out = np.empty(values.size, np.uint16)
    cpu.convert(oracle.tile(values), oracle.tile(out), "F32", "F16")
    with np.errstate(over="ignore"):
        assert (out == values.astype(np.float16).view(np.uint16)).all()


def hostile(dtype: str) -> Iterator[np.ndarray]:
    """Yield values whose sums show their order: of any size, far from zero, and of odd numbers of them."""
    rng = np.random.default_rng(11)
    for count in (0, 1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 70_001):
        yield oracle.weights(rng, count, dtype)
        yield oracle.weights(rng, count, dtype, 3.0, 1e-3)
        yield oracle.any_finite(rng, count, dtype)
    signed = oracle.encode([0.0, 0.0, 1.0], dtype)
    signed.view(oracle.STORED[dtype][1])[0] |= 1 << (8 * signed.itemsize - 1)
    yield from (signed, signed[:1], signed[:2])
    bits, infinite = oracle.STORED[dtype][1:]
    special = np.array([infinite, infinite | 1, 0, infinite - 1], bits).repeat(700)
    yield special.view(oracle.STORED[dtype][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_adds_up_in_one_order(dtype: str) -> None:
    for stored in hostile(dtype):
        found = []
        for level in LEVELS:
            with cpu_at(level) as cpu:
                tile = oracle.tile(stored)
                exact = new_exact_sums()
                if np.isfinite(oracle.values(stored, dtype)).all():
                    cpu.add_exact_sums(tile, dtype, exact)
                moments, summary = cpu.moments(tile, dtype), cpu.summarize(tile, dtype)
                found.append((repr(moments if moments.finite else False), repr(summary), exact.tobytes()))
        for one, other in pairwise(found):
            assert one == other


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_compares_in_one_order(dtype: str, other: str) -> None:
    rng = np.random.default_rng(5)
    for count in (0, 1, 15, 16, 17, 1023, 1024, 1025, 70_001):
        a, b = (oracle.weights(rng, count, kind, 0.1) for kind in (dtype, other))
        found = []
        for level in LEVELS:
            with cpu_at(level) as cpu:
                found.append(repr(cpu.compare(oracle.tile(a), oracle.tile(b), dtype, other)))
        assert set(found) == {found[0]}
        x, y = np.array(oracle.values(a, dtype)), np.array(oracle.values(b, other))
        sums, largest, equal = cpu.compare(oracle.tile(a), oracle.tile(b), dtype, other)
        d = y - x
        expected = [abs(x), abs(y), abs(d), x, d, x * x, y * y, d * d, d**4, x * y]
        assert sums == pytest.approx([math.fsum(term) for term in expected], rel=1e-12, abs=1e-12)
        assert largest == max(abs(d), default=0.0)
        assert equal == np.count_nonzero(x == y)


def test_tiles_of_other_lengths_are_not_compared(cpu: Cpu) -> None:
    with pytest.raises(ValueError, match="as many"):
        cpu.compare(memoryview(bytes(8)), memoryview(bytes(8)), "F32", "BF16")


def test_a_zero_of_either_sign_is_an_extreme_without_one(cpu: Cpu) -> None:
    for values in ([-0.0, 0.0], [0.0, -0.0], [-0.0]):
        found = cpu.summarize(oracle.tile(np.array(values, np.float32)), "F32")
        assert repr((found.minimum, found.maximum)) == "(0.0, 0.0)"


def test_the_variable_forces_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    load = library.choose
    for level in LEVELS:
        monkeypatch.setenv(library.LEVEL_VARIABLE, level)
        assert (load() is reference) == (level == "numpy")
    monkeypatch.delenv(library.LEVEL_VARIABLE)
    assert isinstance(load(), library.Library)
    for wrong in ("v9", "NUMPY", " "):
        monkeypatch.setenv(library.LEVEL_VARIABLE, wrong)
        with pytest.raises(UsageError, match=r"must be one of .*numpy here"):
            load()


def test_a_level_above_the_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = library.levels(compiled())
    monkeypatch.setattr(library, "levels", lambda _: here[:1])
    for level in set(library.LEVELS) - set(here[:1]):
        monkeypatch.setenv(library.LEVEL_VARIABLE, level)
        with pytest.raises(UsageError, match=f"must be one of {here[0]}, numpy here"):
            library.choose()


@pytest.mark.parametrize("content", [None, b"", b"no library", b"\x7fELF" + bytes(60)])
def test_without_a_library_numpy_does_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    path = tmp_path / "kernels.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(library, "_PATH", path)
    monkeypatch.delenv(library.LEVEL_VARIABLE, raising=False)
    with pytest.warns(NoisytuneWarning, match=r"NumPy does their work, with the same results"):
        assert library.choose() is reference


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled()
    monkeypatch.delenv(library.LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(library, "levels", lambda _: ["v9"])  # whose functions this one lacks
    with pytest.warns(NoisytuneWarning, match=r"undefined symbol.*NumPy does their work"):
        assert library.choose() is reference


def perturb(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Perturb in a process; on stderr are warnings, and the summary last."""
    command = [sys.executable, "-m", "noisytune_cli", "perturb", str(source), "-o", str(out)]
    return subprocess.run(
        command,
        env=os.environ | environment,
        cwd=source.parent,  # Python looks for modules where it is started
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {"f.weight": weights("F32", 3000), "h.weight": weights("BF16", 500), "g": weights("F16", 77)}
    return save(tmp_path / "in.safetensors", tensors)


def test_the_same_output_and_manifest_at_every_level(source: Path, tmp_path: Path) -> None:
    written = set()
    for level in LEVELS:
        out = tmp_path / f"{level}.safetensors"
        done = perturb(source, out, NOISYTUNE_CPU_LEVEL=level)
        assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
        written.add((out.read_bytes(), (tmp_path / f"{level}.safetensors.noisytune.json").read_bytes()))
    assert len(written) == 1


def test_a_level_that_is_none_is_a_usage_error(source: Path, tmp_path: Path) -> None:
    done = perturb(source, tmp_path / "out.safetensors", NOISYTUNE_CPU_LEVEL="v1")
    assert done.returncode == 2
    assert "NOISYTUNE_CPU_LEVEL must be one of" in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "out.safetensors").exists()


def test_a_package_without_its_library_says_so_once(source: Path, tmp_path: Path) -> None:
    import noisytune_cli

    package = Path(noisytune_cli.__file__).parent
    (tmp_path / "copy").mkdir()
    for path in package.rglob("*"):  # a source tree on the path, in which nothing was built
        if path.suffix in (".py", ".json"):
            copied = tmp_path / "copy" / "noisytune_cli" / path.relative_to(package)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
    compiled, without = tmp_path / "compiled.safetensors", tmp_path / "without.safetensors"
    assert perturb(source, compiled).returncode == 0
    done = perturb(source, without, PYTHONPATH=str(tmp_path / "copy"))
    assert done.returncode == 0
    assert done.stderr.count("noisytune: warning: the compiled kernels cannot be used") == 1
    assert len(done.stderr.splitlines()) == 2
    assert without.read_bytes() == compiled.read_bytes()
