"""Two nodes of Ray on this machine, of which one is killed while noisytune perturbs: run in a namespace.

    python ray_cluster.py SOURCE OUT [none]

With `none` no node is killed. Writes JSON: the exit code, the seconds, how many receipts were there when the
node was killed, what stdout had.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ADDRESS = "127.0.0.1:6399"


def ray(*arguments: str) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def raylets() -> dict[int, bool]:
    """Return the raylets by process id, and whether each is of the head."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if command.split(b"\0")[0].endswith(b"/raylet"):
                found[int(process.name)] = b"--head" in command
    return found


def main(source: str, out: str, killed: str = "one") -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    common = ("--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=80000000")
    ray("start", "--head", "--port=6399", "--include-dashboard=false", *common)
    head = set(raylets())
    ray("start", f"--address={ADDRESS}", *common)
    (other,) = set(raylets()) - head
    command = [sys.executable, "-P", "-m", "noisytune_cli", "perturb", source, "-o", out, "--json"]
    command += ["--engine", "ray", "--address", ADDRESS, "--share-bytes", "1"]
    started = time.monotonic()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    receipts: list[Path] = []
    while run.poll() is None and not receipts:
        # Folders are renamed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            receipts = list(Path(out).parent.glob(".noisytune-job-*/*/receipts/*.json"))
        time.sleep(0.005)
    if killed == "one":
        os.kill(other, signal.SIGKILL)
    told, _ = run.communicate()
    seconds = time.monotonic() - started
    done = {"code": run.returncode, "seconds": seconds, "receipts": len(receipts), "stdout": told}
    print(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
