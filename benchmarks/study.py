"""Carry out the published studies, one folder each; what is finished is not done again.

python benchmarks/study.py MODEL GLUE OUT [--only NAME]… [--dry-run] [-- OPTIONS of `noisytune study`]
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

#: 1,000 labels: the low-resource setting in which the papers report their largest gains. The rate is the one
#: of two (1e-4, 3e-4) with the better held-out score on CoLA of a plain run with a seed that no study has.
LOW = (
    *("--train-rows", "1000", "--epochs", "5", "--batch-size", "32", "--learning-rate", "1e-4"),
    *("--group-by-length", "--threads", "1"),
)

#: Plain and noisytune over many seeds, round by round, as far as time allows: tasks in which plain learns
#: something and whose runs are short. A study goes seed by seed, so wherever time ends both methods have the
#: same seeds.
_ROUNDS = (("cola,sst2", 5), ("cola,sst2", 10), ("stsb", 10), ("cola,sst2", 20), ("cola,sst2,stsb", 20))

#: Each study's options, in the order in which they are carried out.
STUDIES: dict[str, tuple[str, ...]] = {
    **{
        f"{tasks}-{seeds}-seeds": (
            *("--task", tasks, *LOW, "--method", "plain,noisytune", "--lambda", "0.15"),
            *("--seed", f"0-{seeds - 1}"),
        )
        for tasks, seeds in _ROUNDS
    },
    "cola": ("--task", "cola", *LOW, "--method", "plain,noisytune,r3f,mixout", "--seed", "0-4"),
    "sst2": ("--task", "sst2", *LOW, "--method", "plain,noisytune", "--seed", "0-4"),
    # In CoLA's folder: the runs at λ 0.15 and the plain ones are there already.
    "cola-lambda": (
        *("--task", "cola", *LOW, "--method", "plain,noisytune,r3f,mixout"),
        *("--lambda", "0.05,0.1,0.15,0.2", "--seed", "0-4"),
    ),
}

#: Studies that continue in another's folder.
FOLDERS = {
    # Of several tasks each has a folder of its own there.
    **{f"{t}-{seeds}-seeds": "pairs" if "," in t else f"pairs/{t}" for t, seeds in _ROUNDS},
    "cola-lambda": "cola",
}


def main() -> int:
    """Run the studies; return the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the checkpoint's folder")
    parser.add_argument("glue", help="the folder of the GLUE tasks")
    parser.add_argument("out", type=Path, help="where each study gets a folder")
    parser.add_argument("--only", action="append", choices=STUDIES, help="carry out this study only")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    arguments, options = parser.parse_args(given[:end]), given[end + 1 :]
    for name in arguments.only or STUDIES:
        command = [
            *(sys.executable, "-m", "noisytune_cli", "study", arguments.model, "--data", arguments.glue),
            *(*STUDIES[name], *options, "-o", str(arguments.out / FOLDERS.get(name, name))),
        ]
        print(f"$ {shlex.join(command)}", flush=True)
        if not arguments.dry_run and (code := subprocess.run(command, check=False).returncode):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
