"""What README's table comes from: noisytune against `cp`, a durable copy, and the paper's loop.

    python benchmarks/bench.py [--minilm FILE] [--size GIB] [--rounds N] [--folder DIR]

Builds a float32 and a bfloat16 checkpoint of SIZE GiB (the shapes of a Llama-like model), the first as a
pickle too, and one of a single tensor, then runs every contender in turn, round after round, so that a slow
moment of the machine hits all of them alike, and prints medians and ratios. Every run is a process of its
own, start-up included, with the source in the page cache and the output on the same file system.

    durable copy    cp SOURCE OUT && sync OUT
    before fsync    noisytune up to its first fsync of weights, against cp alone
    paper's loop    load_file, `p += (rand - 0.5) * λ * std` for every parameter, save_file (torch.load and
                    torch.save for the pickle)

A second table sets several outputs of one run against as many runs of one output each.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np

HIDDEN, FEED_FORWARD, VOCABULARY = 2048, 5632, 32000
BYTES = {"F32": 4, "BF16": 2}

#: How many outputs one run makes, where it makes several.
OUTPUTS = 4

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

#: Runs noisytune and prints when its first fsync of a weight file began, counted from the process's start.
BEFORE_FSYNC = """
import os, sys, time
started = float(sys.argv.pop(1))
real = os.fsync
def fsync(fd):
    if os.fstat(fd).st_size > 1 << 20:
        print(f"BEFORE {time.time() - started}", file=sys.stderr)
        os.fsync = real
    return real(fd)
os.fsync = fsync
from noisytune_cli.__main__ import main
main()
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


def timed(*commands: list[str]) -> tuple[float, str]:
    """Run commands one after the other; return the seconds they took and the last one's stderr."""
    start, errors = time.perf_counter(), ""
    for command in commands:
        errors = subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ).stderr
    return time.perf_counter() - start, errors


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


def noisytune(source: Path, out: Path, *options: str) -> list[str]:
    """Return the command that perturbs a file."""
    return [
        sys.executable,
        "-m",
        "noisytune_cli",
        "perturb",
        str(source),
        "--lambda",
        "0.15",
        "-o",
        str(out),
        "-q",
        *options,
    ]


def compare(source: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Return each contender's median seconds for one source."""
    out = folder / f"out{source.suffix}"
    manifest = folder / f"{out.name}.noisytune.json"

    def before_fsync() -> float:
        command = noisytune(source, out)
        runner = [sys.executable, "-c", BEFORE_FSYNC, str(time.time()), *command[3:]]
        return float(re.search(r"BEFORE (\S+)", timed(runner)[1])[1])  # type: ignore[index]

    contenders: dict[str, Callable[[], float]] = {
        "noisytune": lambda: timed(noisytune(source, out))[0],
        "durable copy": lambda: timed(["cp", str(source), str(out)], ["sync", str(out)])[0],
        "before fsync": before_fsync,
        "cp": lambda: timed(["cp", str(source), str(out)])[0],
        "loop": lambda: timed([sys.executable, "-c", LOOP, str(source), str(out)])[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            # Dirty pages of the run before would be written at this one's expense.
            os.sync()
            seconds[name].append(run())
            out.unlink()
            manifest.unlink(missing_ok=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare_outputs(source: Path, folder: Path, rounds: int) -> tuple[float, float]:
    """Return the median seconds of one run that makes `OUTPUTS` outputs, and of as many single runs."""
    out = folder / "out-{seed}.safetensors"
    runs = [
        noisytune(source, Path(str(out).format(seed=seed)), "--seed", str(seed)) for seed in range(OUTPUTS)
    ]
    contenders = [[noisytune(source, out, "--seed", f"0-{OUTPUTS - 1}")], runs]
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for commands, taken in zip(contenders, seconds, strict=True):
            os.sync()
            taken.append(timed(*commands)[0])
            for made in folder.glob("out-*"):
                made.unlink()
    together, apart = map(statistics.median, seconds)
    return together, apart


def report(label: str, median: dict[str, float]) -> None:
    """Print one row of the table."""
    own, durable, before = median["noisytune"], median["durable copy"], median["before fsync"]
    cells = [label, f"{own:.2f} s", f"{durable:.2f} s", f"{own / durable:.2f}"]
    cells += [f"{before:.2f} s", f"{median['cp']:.2f} s", f"{before / median['cp']:.2f}"]
    cells += [f"{median['loop']:.1f} s", f"{median['loop'] / own:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run the benchmark and print its tables as Markdown."""
    parser = argparse.ArgumentParser(description="Measure noisytune against cp and the paper's loop.")
    parser.add_argument("--minilm", type=Path, help="a real model.safetensors")
    parser.add_argument("--size", type=float, default=2.0, help="GiB of the built checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work: a disk, not a tmpfs")
    options = parser.parse_args()
    size = int(options.size * 2**30)
    print(
        f"{cpu()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; medians of {options.rounds}\n"
    )
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix="bench-") as name:
        folder = Path(name)
        columns = ["checkpoint", "noisytune", "durable copy", "ratio", "before fsync", "cp", "ratio"]
        columns += ["paper's loop", "ratio"]
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        peaks, several = {}, {}
        for dtype, suffix in (("F32", ".safetensors"), ("F32", ".bin"), ("BF16", ".safetensors")):
            label = f"{options.size:g} GiB {dtype}{', .bin' if suffix == '.bin' else ''}"
            source = folder / f"{dtype}.safetensors"
            build(source, dtype, layout(dtype, size))
            if suffix == ".bin":
                pickled = source.with_suffix(suffix)
                timed([sys.executable, "-c", PICKLE, str(source), str(pickled)])
                source.unlink()
                source = pickled
            timed(noisytune(source, folder / "warm"))  # compiles, and fills the page cache
            peaks[label] = peak_memory(noisytune(source, folder / "memory"))
            for leftover in ("warm", "memory"):
                (folder / leftover).unlink()
                (folder / f"{leftover}.noisytune.json").unlink()
            report(label, compare(source, folder, options.rounds))
            if suffix == ".safetensors":
                several[label] = compare_outputs(source, folder, options.rounds)
            source.unlink()
        if options.minilm:
            report("MiniLM, 91 MB F32", compare(options.minilm, folder, options.rounds))
        source = folder / "one.safetensors"
        build(source, "F32", [("w", (size // 4 // HIDDEN, HIDDEN))])
        peaks[f"one {options.size:g} GiB tensor"] = peak_memory(noisytune(source, folder / "memory"))
    columns = [f"{OUTPUTS} outputs", "from one read", f"{OUTPUTS} single runs", "ratio"]
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for label, (together, apart) in several.items():
        print(f"| {label} | {together:.2f} s | {apart:.2f} s | {together / apart:.2f} |")
    print("\n| peak memory, file-backed pages left out | |\n| --- | --- |")
    for label, peak in peaks.items():
        print(f"| {label} | {peak / 1e6:.0f} MB |")


def cpu() -> str:
    """Return the CPU's name."""
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
