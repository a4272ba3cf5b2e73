"""A job on Ray of a model in an object store, and the same run without shares: in a namespace.

    python ray_on_store.py SOURCE

Writes JSON: both exit codes, whether the objects of both outputs are the same, the names of the job's, what
stdout had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from object_store import proxied, started


def main(source: str) -> None:
    with started() as moto, proxied(moto) as (store, environment):
        store.put_folder(Path(source), "base")
        os.environ |= {**environment, "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-P", "-m", "noisytune_cli", "perturb", f"{store.url}/base", "--json"]
        runs = [
            subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=False)
            for options in (
                ["-o", f"{store.url}/single"],
                ["-o", f"{store.url}/job", "--engine", "ray", "--share-bytes", "1"],
            )
        ]
        single, job = (
            {name: store.get(f"{out}{name}") for name in store.keys(out)} for out in ("single/", "job/")
        )
    done = {"codes": [run.returncode for run in runs], "same": single == job, "names": sorted(job)}
    print(json.dumps({**done, "stdout": runs[1].stdout}))


if __name__ == "__main__":
    main(*sys.argv[1:])
