"""The speed of noisytune beside what bounds it: every aim a row, its contenders in turn, medians and ratios.

    python benchmarks/bench.py [--minilm FILE] [--size GIB ...] [--dtype F32|BF16 ...] [--rounds N]
                               [--only WORD ...] [--folder DIR]

    durable copy    `cp SOURCE OUT && sync OUT`, from a source in the page cache (warm) or not (cold)
    digest          BLAKE3 of the file in threads, as b3sum does it: reading at its cheapest
    paper's loop    load_file, `p += (rand - 0.5) * λ * std` for every parameter, save_file (torch.load and
                    torch.save for the pickle)

Every run is a process of its own, start-up included, with its output on the file system of its source. The
contenders of a row take turns, round after round, so that a slow moment of the machine hits them alike, and a
ratio is the median of the rounds' ratios; that of CPU time, user and system, tells most where others are at
work. What a run left to be written is flushed before the next. A file leaves the page cache by posix_fadvise,
without rights. The row in little memory needs a cgroup that may be written to; what cannot be measured is
said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

HIDDEN, FEED_FORWARD, VOCABULARY = 2048, 5632, 32000
BYTES = {"F32": 4, "BF16": 2}

#: How many outputs one run makes, where it makes several, and seeds a mixture has.
OUTPUTS, SEEDS = 8, 64

#: Bytes of memory, page cache included, where there is little.
LITTLE = 300 << 20
_CGROUPS = Path("/sys/fs/cgroup")

LOOP = """
import sys, torch
from safetensors.torch import load_file, save_file
pickled = sys.argv[1].endswith(".bin")
tensors = torch.load(sys.argv[1]) if pickled else load_file(sys.argv[1])
for name, p in tensors.items():
    if p.is_floating_point() and p.numel() > 1:
        p += (torch.rand(p.size()) - 0.5) * 0.15 * torch.std(p)
if pickled:
    torch.save(tensors, sys.argv[2])
else:
    save_file(tensors, sys.argv[2], metadata={"format": "pt"})
"""

#: Writes the tensors of a safetensors file as torch.save does.
PICKLE = """
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
"""

DIGEST = """
import sys
from blake3 import blake3
print(blake3(max_threads=blake3.AUTO).update_mmap(sys.argv[1]).hexdigest())
"""


def layout(dtype: str, size: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of a Llama-like model of about `size` bytes; the output layer fills it up."""
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    square, wide = (HIDDEN, HIDDEN), (FEED_FORWARD, HIDDEN)
    layer = [(f"self_attn.{k}_proj", square) for k in "qkvo"]
    layer += [("mlp.gate_proj", wide), ("mlp.up_proj", wide), ("mlp.down_proj", wide[::-1])]
    layer += [("input_layernorm", (HIDDEN,)), ("post_attention_layernorm", (HIDDEN,))]
    elements = size // BYTES[dtype]
    each = sum(int(np.prod(shape)) for _, shape in layer)
    layers = max(0, elements - 2 * VOCABULARY * HIDDEN) // each
    for i in range(layers):
        tensors += [(f"model.layers.{i}.{name}.weight", shape) for name, shape in layer]
    rows = (elements - sum(int(np.prod(shape)) for _, shape in tensors)) // HIDDEN
    return [*tensors, ("lm_head.weight", (max(rows, 1), HIDDEN))]


def build(path: Path, dtype: str, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file of normal weights (norm weights near 1), a few rows at a time."""
    header, at = {}, 0
    for name, shape in tensors:
        nbytes = int(np.prod(shape)) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in tensors:
            left = int(np.prod(shape))
            while left:
                count = min(left, 1 << 22)
                values = rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
                if "norm" in name:
                    values += 1
                bits = values if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
                file.write(bits.tobytes())
                left -= count
        file.flush()
        os.fsync(file.fileno())


def timed(*commands: list[str]) -> tuple[float, float]:
    """Run commands one after the other; return the seconds they took, and those of CPU time."""
    start, before = time.perf_counter(), os.times()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, used


def peak_memory(command: list[str]) -> int:
    """Return the largest resident size less file-backed pages, in bytes, sampled while a command runs."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.005)
    if process.wait() != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    return peak


def noisytune(verb: str, *arguments: object) -> list[str]:
    """Return a command of noisytune."""
    return [sys.executable, "-m", "noisytune_cli", verb, *map(str, arguments), "-q"]


def python(program: str, *arguments: object) -> list[str]:
    """Return the command that runs a program of ours."""
    return [sys.executable, "-c", program, *map(str, arguments)]


def make_cold(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def make_warm(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb") as file:
        while file.read(8 << 20):
            pass


@contextmanager
def little_memory() -> Iterator[list[str]]:
    """Yield what goes before a command, to run it in a cgroup of LITTLE bytes; OSError if it cannot be."""
    controllers = _CGROUPS / "memory"
    group = (controllers if controllers.is_dir() else _CGROUPS) / f"noisytune-bench-{os.getpid()}"
    limit = "memory.limit_in_bytes" if controllers.is_dir() else "memory.max"
    group.mkdir()
    try:
        (group / limit).write_text(str(LITTLE))
        yield ["sh", "-c", f'echo $$ >"{group}/cgroup.procs" && exec "$@"', "-"]
    finally:
        group.rmdir()


@dataclass(frozen=True)
class Row:
    """Two contenders, each its name and commands in turn, what precedes every run, and the ratio aimed at."""

    what: str
    ours: tuple[list[str], ...]
    beside: str
    theirs: tuple[list[str], ...]
    aim: str = ""
    prepare: Callable[[], None] = lambda: None

    def measure(self, rounds: int, folder: Path) -> None:
        """Let both run `rounds` times, and print a line."""
        taken: tuple[list[tuple[float, float]], ...] = ([], [])
        for turn in range(rounds):
            for which in (0, 1) if turn % 2 else (1, 0):
                os.sync()
                self.prepare()
                taken[which].append(timed(*(self.ours, self.theirs)[which]))
                clear(folder)
        (ours, our_cpu), (theirs, their_cpu) = ([*zip(*one, strict=True)] for one in taken)
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        cells = [
            self.what,
            f"{statistics.median(ours):.2f} s",
            self.beside,
            f"{statistics.median(theirs):.2f} s",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{statistics.median(a / b for a, b in zip(our_cpu, their_cpu, strict=True)):.2f}",
            self.aim,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def clear(folder: Path) -> None:
    """Remove what a run wrote."""
    for made in folder.glob("out*"):
        made.unlink()


def copy(source: Path, folder: Path, count: int = 1) -> tuple[list[str], ...]:
    """Return the commands of durable copies."""
    outs = [folder / f"out{index}" for index in range(count)]
    return tuple(command for out in outs for command in (["cp", str(source), str(out)], ["sync", str(out)]))


def start_rows(folder: Path, minilm: Path | None) -> Iterator[Row]:
    """Yield what a small model takes, beside the start of Python with NumPy."""
    small = folder / "small.safetensors"
    build(small, "F32", [("w", (64, 64))])
    numpy = (python("import numpy"),)
    for what, source, aim in (("16 KB", small, "2.5"), ("MiniLM, 91 MB", minilm, "3.3")):
        if source is not None:
            ours = (noisytune("perturb", source, "-o", folder / "out.safetensors"),)
            yield Row(f"perturb {what}", ours, "import numpy", numpy, aim)
    yield Row("--version", ([sys.executable, "-m", "noisytune_cli", "--version"],), "import numpy", numpy)


def file_rows(folder: Path, source: Path, label: str, *, large: bool) -> Iterator[Row]:
    """Yield the rows of one large file."""
    out = folder / f"out{source.suffix}"
    ours = (noisytune("perturb", source, "-o", out),)
    once = copy(source, folder)
    yield Row(
        f"{label}, warm", ours, "durable copy", once, "0.9" if large else "1.0", lambda: make_warm(source)
    )
    yield Row(f"{label}, cold", ours, "durable copy", once, "1.0", lambda: make_cold(source))
    for state, prepare in (("warm", make_warm), ("cold", make_cold)):
        direct, buffered = ((*ours[0], f"--{way}direct") for way in ("", "no-"))
        yield Row(
            f"{label}, --direct, {state}",
            ([*direct],),
            "--no-direct",
            ([*buffered],),
            prepare=partial(prepare, source),
        )


def other_rows(folder: Path, source: Path, label: str) -> Iterator[Row]:
    """Yield what else is done with a file."""
    out, noisy = folder / f"out{source.suffix}", folder / f"noisy{source.suffix}"
    ours = (noisytune("perturb", source, "-o", out),)
    timed(noisytune("perturb", source, "-o", noisy))
    digest, once = (python(DIGEST, noisy),), copy(source, folder)
    several = (noisytune("perturb", source, "--seed", f"0-{OUTPUTS - 1}", "-o", folder / "out{seed}"),)
    yield Row(
        f"{label}, {OUTPUTS} outputs", several, f"{OUTPUTS} copies", copy(source, folder, OUTPUTS), "0.9"
    )
    yield Row(f"{label}, verify", (noisytune("verify", noisy),), "digest", digest, "1.1")
    based = (noisytune("verify", noisy, "--base", source),)
    yield Row(f"{label}, verify --base", based, "digest", digest, "1.2")
    both, cats = (noisytune("compare", source, noisy),), (["cat", str(source), str(noisy)],)
    yield Row(f"{label}, compare", both, "cat of both", cats, "1.0")

    def make_both_cold() -> None:
        make_cold(source)
        make_cold(noisy)

    yield Row(f"{label}, compare, cold", both, "cat of both", cats, "1.0", make_both_cold)
    listed = (noisytune("inspect", source, "-o", folder / "out.csv"),)
    yield Row(f"{label}, inspect", listed, "digest", digest, "1.1")
    absolute = (noisytune("perturb", source, "--sigma", "0.001", "-o", out),)
    gaussian = (noisytune("perturb", source, "--noise", "gaussian", "-o", out),)
    yield Row(f"{label}, --sigma", absolute, "--lambda, Gaussian", gaussian, "below 1")
    mix = folder / "mix.jsonl"
    mix.write_text("".join(f'{{"seed": {seed}, "sigma": 0.001}}\n' for seed in range(SEEDS)))
    mixed = (noisytune("perturb", source, "--mix", mix, "--noise", "uniform", "-o", out),)
    yield Row(f"{label}, a mix of {SEEDS}", mixed, "--sigma", absolute, f"{SEEDS / 10:g}")
    try:
        with little_memory() as within:
            inside = [tuple([*within, *command] for command in commands) for commands in (ours, once)]
            yield Row(
                f"{label}, cold in 300 MB", inside[0], "the same", inside[1], "1.0", lambda: make_cold(source)
            )
            buffered = ([*inside[0][0], "--no-direct"],)
            yield Row(
                f"{label}, --direct, cold in 300 MB",
                inside[0],
                "--no-direct",
                buffered,
                prepare=lambda: make_cold(source),
            )
    except OSError as error:
        print(f"| {label}, in {LITTLE >> 20} MiB | not measured: {error} | | | | | | |", flush=True)
    loop = (python(LOOP, source, out),)
    yield Row(f"{label}, the paper's loop", loop, "noisytune", ours)


def pickle_rows(folder: Path, source: Path, label: str) -> Iterator[Row]:
    """Yield what a pickle of the same tensors takes, beside the safetensors file."""
    pickled = source.with_suffix(".bin")
    timed(python(PICKLE, source, pickled))
    ours = (noisytune("perturb", pickled, "-o", folder / "out.bin"),)
    theirs = (noisytune("perturb", source, "-o", folder / "out.safetensors"),)
    yield Row(f"{label}, .bin", ours, "safetensors", theirs, "1.1", lambda: make_warm(pickled))
    loop = (python(LOOP, pickled, folder / "out.bin"),)
    yield Row(f"{label}, .bin, the paper's loop", loop, "noisytune", ours)
    pickled.unlink()


def rows(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield every row in its turn, with its files made."""
    yield from start_rows(folder, options.minilm)
    for size in options.size:
        for dtype in options.dtype:
            source, label = folder / f"{dtype}.safetensors", f"{size:g} GiB {dtype}"
            build(source, dtype, layout(dtype, int(size * 2**30)))
            yield from file_rows(folder, source, label, large=size >= 4)
            if size == options.size[0]:
                yield from other_rows(folder, source, label)
                (folder / f"noisy{source.suffix}").unlink()
                (folder / f"noisy{source.suffix}.noisytune.json").unlink()
            if size == options.size[0] and dtype == "F32":
                yield from pickle_rows(folder, source, label)
            source.unlink()


def report_memory(options: argparse.Namespace, folder: Path) -> None:
    """Print the most memory that a run takes."""
    size = int(options.size[0] * 2**30)
    print("\n| peak memory, file-backed pages left out | | aim |\n| --- | --- | --- |")
    shapes = {dtype: layout(dtype, size) for dtype in BYTES} | {
        "one tensor": [("w", (size // 4 // HIDDEN, HIDDEN))]
    }
    for label, tensors in shapes.items():
        source = folder / "memory.safetensors"
        build(source, label if label in BYTES else "F32", tensors)
        peak = peak_memory(noisytune("perturb", source, "-o", folder / "out"))
        clear(folder)
        print(f"| {options.size[0]:g} GiB {label} | {peak / 1e6:.0f} MB | 150 MB |", flush=True)
        source.unlink()


def main() -> None:
    """Run the benchmark and print its tables as Markdown."""
    parser = argparse.ArgumentParser(description="Measure noisytune beside what bounds it.")
    parser.add_argument("--minilm", type=Path, help="a real model.safetensors")
    parser.add_argument("--size", type=float, nargs="+", default=[1.0, 4.0], help="GiB of the built files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=[*BYTES], choices=[*BYTES])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name holds one")
    parser.add_argument("--folder", type=Path, help="where to work: a disk, not a tmpfs")
    options = parser.parse_args()
    print(
        f"{cpu()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; medians of {options.rounds}\n"
    )
    columns = ["", "noisytune", "beside", "takes", "ratio", "of single rounds", "ratio of CPU time", "aim"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix="bench-") as name:
        folder = Path(name)
        for row in rows(options, folder):
            if not options.only or any(word in row.what for word in options.only):
                row.measure(options.rounds, folder)
        if not options.only:
            report_memory(options, folder)


def cpu() -> str:
    """Return the CPU's name."""
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
