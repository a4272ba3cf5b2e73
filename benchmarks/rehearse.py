"""Plan a job of a trillion bytes of weights without having them: sparse files with real headers.

    python benchmarks/rehearse.py [--shards 400] [--tensors 100000] [--terabytes 1]

Prints what `noisytune plan` and `noisytune status` take of time, of the CPU and of memory. Nothing is read of
the weights but what decides on ties and buffers. `make rehearse` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def build(root: Path, shards: int, tensors: int, nbytes: int) -> None:
    """Make a folder of `shards` safetensors files of `nbytes` in all, with `tensors` BF16 matrices."""
    root.mkdir()
    weight_map = {}
    each = tensors // shards
    columns = 1024
    rows = nbytes // tensors // (2 * columns)
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for index in range(shard * each, (shard + 1) * each):
            tensor = f"model.layers.{index // 1000}.mlp.experts.{index % 1000}.down_proj.weight"
            size = rows * columns * 2
            header[tensor] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, at + size]}
            weight_map[tensor] = name
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(root / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text('{"model_type": "rehearsed"}')


def measure(*arguments: str) -> tuple[float, float, float]:
    """Run noisytune; return its seconds, those of the CPU, and its largest resident memory in MB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-P", "-m", "noisytune_cli", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"noisytune {arguments[0]} ended with {os.waitstatus_to_exitcode(status)}")
    scale = 1 if sys.platform == "darwin" else 1024
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale / 1e6


def main() -> None:
    """Build, plan, ask."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--terabytes", type=float, default=1.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "base", str(Path(folder) / "out")
        build(source, given.shards, given.tensors, int(given.terabytes * 1e12))
        # As if there were room: a share's files are made when it is done.
        for verb, arguments in (("plan", (str(source), "-o", out, "--recipe-only")), ("status", (out,))):
            seconds, of_cpu, megabytes = measure(verb, *arguments)
            print(f"{verb}: {seconds:.1f} s, of the CPU {of_cpu:.1f} s, {megabytes:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
