"""What the loss of a node costs: the same job on two nodes of Ray, of which one is killed, or not, in turn.

    python benchmarks/node_loss.py [--rounds 7] [--shards 16] [--mib 16] [--folder DIR]

Both nodes are on this machine, with one CPU each, in a namespace with nothing but loopback (root, or a
kernel that lets users make one). The node that is not the driver's dies when the first receipt is there.
Prints the median seconds of `perturb --engine ray` with and without the loss, and of the rounds' differences.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "inputs"))

from namespaces import in_namespace
from ray_cluster import __file__ as cluster
from shares import shards


def main() -> None:
    """Build, run in turn, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--mib", type=int, default=16, help="of a shard")
    parser.add_argument("--folder")
    given = parser.parse_args()
    taken: dict[str, list[float]] = {"none": [], "one": []}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source, out = Path(folder) / "base", Path(folder) / "out"
        shards(source, given.shards, given.shards * given.mib << 20)
        for _ in range(given.rounds):
            for killed, seconds in taken.items():
                command = [sys.executable, cluster, str(source), str(out), killed]
                done = json.loads(in_namespace(command).splitlines()[-1])
                if done["code"]:
                    raise SystemExit(f"perturb ended with {done['code']}")
                seconds.append(done["seconds"])
                print(f"killed: {killed}; {seconds[-1]:.1f} s", file=sys.stderr)
                shutil.rmtree(out)
    without, with_loss = taken["none"], taken["one"]
    lost = statistics.median(b - a for a, b in zip(without, with_loss, strict=True))
    print(f"without a loss {statistics.median(without):.1f} s ({min(without):.1f} to {max(without):.1f})")
    print(
        f"with one       {statistics.median(with_loss):.1f} s ({min(with_loss):.1f} to {max(with_loss):.1f})"
    )
    print(f"lost           {lost:.1f} s")


if __name__ == "__main__":
    main()
