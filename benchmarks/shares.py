"""What a job costs beside a plain run: the same checkpoint in shards, run after run in turn.

    python benchmarks/shares.py [--size GIB] [--shards 16] [--rounds 5] [--folder DIR] [--ray]

Prints the median seconds of `noisytune perturb`, of `--engine local`, with `--ray` of `--engine ray` (its
start is in them), on the wall and of the CPU, and the medians of the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from bench import build, noisytune, timed


def shards(root: Path, count: int, nbytes: int) -> None:
    """Make a folder of F32 shards of so many bytes in all."""
    root.mkdir()
    rows = nbytes // count // 4 // 4096
    weight_map = {}
    for number in range(1, count + 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        tensors = [(f"model.layers.{number}.w{i}.weight", (rows // 4, 4096)) for i in range(4)]
        build(root / name, "F32", tensors)
        weight_map |= {tensor: name for tensor, _ in tensors}
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    """Build, run in turn, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder")
    parser.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source, out = Path(folder) / "base", Path(folder) / "out"
        shards(source, given.shards, int(given.size * (1 << 30)))
        plain = noisytune("perturb", source, "-o", out, "-q")
        in_shares = [*plain, "--share-bytes", "1"]
        runs = {"perturb": plain, "--engine local": [*in_shares, "--engine", "local"]}
        if given.ray:
            runs["--engine ray"] = [*in_shares, "--engine", "ray"]
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(given.rounds):
            for name, command in runs.items():
                taken[name].append(timed(command))
                shutil.rmtree(out)
        for name, found in taken.items():
            ratios = np.median(np.array(found) / np.array(taken["perturb"]), axis=0)
            seconds, of_cpu = np.median(np.array(found), axis=0)
            print(f"{name:16} {seconds:6.2f} s, of the CPU {of_cpu:6.2f} s;", end=" ")
            print(f"beside perturb {ratios[0]:.2f} and {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
