"""The kernels for CPUs other than this one, where an emulator of one is at hand: the reference's bits."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bochs
import numpy as np
import oracle
import pytest
from levels import cpu_at

from noisytune_cli.noise import distributions
from noisytune_cli.noise.devices.cpu import library
from noisytune_cli.noise.devices.cpu.rows import TERM
from noisytune_cli.noise.stream import Noise

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

#: Level -> its machine, as build.py has it; QEMU has no AVX-512.
MACHINES = {"neon": "aarch64", "v4": "x86_64"}
WORDS = (123, 2**31, 789, 2**32 - 1)

#: What mixtures are made of beside the first term; and how many terms, with what share of the values kept.
OTHERS = (((2**32 - 1, 0, 2**31, 7), -0.25), (WORDS, 0.0078125))
MIXTURES = ((3, 0.7), (1, 0.5), (0, 0.9))


#: Runs the kernels of a level on cases; returns the SHA-256 of what they write.
Emulated = Callable[[bytes], str]


@pytest.fixture(scope="module", params=MACHINES)
def level(request: pytest.FixtureRequest) -> str:
    if not os.environ.get("NOISYTUNE_EMULATE"):
        pytest.skip("takes minutes to compile and to run: make emulate")
    if request.param == "neon" and QEMU is None:
        pytest.skip("needs qemu-aarch64")
    if request.param == "v4" and bochs.missing():
        pytest.skip(bochs.missing())
    return str(request.param)


@pytest.fixture(scope="module")
def emulated(level: str, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    pytest.importorskip("ziglang")
    from noisytune_cli.noise.devices.cpu import build

    built = tmp_path_factory.mktemp(level) / "kernels"
    source, kernels = Path(bochs.__file__).with_name("emulated_kernels.c"), Path(library.__file__).parent
    machine = MACHINES[level]
    march = dict(build.LEVELS[machine])[level].replace("-", "_")
    options = ["-target", f"{machine}-linux-musl", "-static", *([f"-march={march}"] if march else [])]
    options += [f"-DLEVEL={level}", "-DLOWEST", f"-I{kernels}", str(source), "-o", str(built)]
    command = [sys.executable, "-m", "ziglang", "cc", *build.FLAGS, *options]
    subprocess.run(command, check=True, timeout=900)

    def emulate(cases: bytes) -> str:
        if level == "v4":
            return bochs.run(built, cases, built.parent / "machine")
        done = subprocess.run([str(QEMU), built], input=cases, capture_output=True, check=True, timeout=900)
        return hashlib.sha256(done.stdout).hexdigest()

    return emulate


def test_an_emulated_level_has_the_references_bits(level: str, emulated: Emulated) -> None:
    rng = np.random.default_rng(0)
    cases, expected = [], [struct.pack("<i", library.LEVELS[level])]
    settings = [(0, 0.003, 5000), (2**34 - 77, 2.0**100, 3001), (3, 2.0**-140, 17), (1, 1.0, 1)]
    kinds = itertools.product(distributions.names(), library.DTYPES, library.DTYPES, settings)
    with cpu_at("numpy") as cpu:
        for distribution, dtype, out_dtype, (first, wanted, n) in kinds:
            amplitude = float(np.float32(wanted))
            width = 1.0 if dtype == "F64" else 2.0**-6
            for stored in (oracle.weights(rng, n, dtype, 0.5, width), oracle.any_finite(rng, n, dtype)):
                if dtype == "F64":
                    stored = np.clip(stored, -1e150, 1e150)  # sums of squares that overflow mean nothing
                which = library.DISTRIBUTIONS.index(distribution)
                numbers = (which, library.DTYPES.index(dtype), library.DTYPES.index(out_dtype), n)
                terms, kept = MIXTURES[len(cases) % len(MIXTURES)]
                mixed = Noise(distribution, ((WORDS, amplitude), *OTHERS)[:terms], kept)
                cases.append(
                    struct.pack("<4iQ4Ifqd", *numbers, first, *WORDS, amplitude, terms, kept)
                    + np.array([*mixed.terms], TERM).tobytes()
                    + stored.tobytes()
                )
                out = np.empty(n, oracle.STORED[out_dtype][0])
                tile, room = oracle.tile(stored), oracle.tile(out)
                counts = cpu.add_noise(
                    tile,
                    room,
                    dtype,
                    out_dtype,
                    noise=Noise.of(distribution, WORDS, amplitude),
                    first=first,
                )
                expected.append(out.tobytes() + struct.pack("<2q", *counts))
                counts = cpu.add_noise(tile, room, dtype, out_dtype, noise=mixed, first=first)
                expected.append(out.tobytes() + struct.pack("<2q", *counts))
                sums, found = cpu.moments(tile, dtype), cpu.summarize(tile, dtype)
                expected.append(struct.pack("<5dq", sums.pivot, *sums.s1, *sums.s2, sums.finite))
                extremes = found.minimum, found.maximum, found.absolute_sum
                expected.append(struct.pack("<3d3q", *extremes, found.zeros, found.nans, found.infinities))
                overflowed = cpu.convert(tile, room, dtype, out_dtype)
                expected.append(out.tobytes() + struct.pack("<q", overflowed))
                between, largest, equal = cpu.compare(tile, room, dtype, out_dtype)
                between = [0.0 if math.isnan(one) else one for one in between]
                expected.append(struct.pack("<11dq", *between, largest, equal))
    assert emulated(b"".join(cases)) == hashlib.sha256(b"".join(expected)).hexdigest()
