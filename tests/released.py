"""What `make release` does with the wheel, in an environment that has nothing else but what it depends on.

torch is not there, as for a user of the command line on the CPU. Run in any folder but the source's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import noisytune_cli
from noisytune_cli.errors import PackageMissing

PROGRAM = Path(sys.executable).with_name("noisytune")


def noisytune(*arguments: str) -> str:
    """Run the installed program; what it prints."""
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr  # such as that of a missing library
    return done.stdout


def main() -> None:
    """Do what a user does in the first hour."""
    installed = Path(noisytune_cli.__file__)
    assert installed.is_relative_to(sys.prefix), f"{installed} is not the wheel's"
    assert importlib.util.find_spec("torch") is None, "torch is here"
    for packed in ("noise/devices/cpu/kernels.so", "cli/page.html", "py.typed"):
        assert (installed.parent / packed).stat().st_size or packed == "py.typed", packed
    assert noisytune_cli.__version__ in noisytune("--version")
    assert "Examples:" in noisytune("perturb", "--help")
    save_file({"w": np.random.default_rng(0).standard_normal((64, 48), np.float32)}, "in.safetensors")
    noisytune("perturb", "in.safetensors", "-o", "out.safetensors")
    noisytune("verify", "out.safetensors", "--base", "in.safetensors")
    noisytune(
        "replay", "out.safetensors.noisytune.json", "--base", "in.safetensors", "-o", "again.safetensors"
    )
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()
    noisytune("inspect", "out.safetensors", "-q", "--format", "json")
    noisytune("compare", "in.safetensors", "out.safetensors", "-o", "report.html")
    assert noisytune_cli.verify("out.safetensors", base="in.safetensors").ok
    try:
        noisytune_cli.perturb_({}, lam=0.1)
    except PackageMissing as error:
        said = error.line()
    assert "pip install torch" in said


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=".") as folder:
        os.chdir(folder)
        main()
