"""Build the kernels' library with the package: `kernels.c`, once for each level of CPU.

The C compiler is that of the `ziglang` package, so pip alone can do it, on a machine that has none, and for
other machines too.

    pip install .                                             for this machine
    NOISYTUNE_TARGET=aarch64-macos pip wheel --no-deps .      for another (`TARGETS`)
    NOISYTUNE_CC="gcc -fsanitize=address" pip install -e .    by another compiler, for tests
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

#: target -> (zig's name for it, the wheel's platform). The systems are the oldest that wheels are made for.
TARGETS = {
    "x86_64-linux": ("x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64"),
    "aarch64-linux": ("aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64"),
    "x86_64-macos": ("x86_64-macos.11.0", "macosx_11_0_x86_64"),
    "aarch64-macos": ("aarch64-macos.11.0", "macosx_11_0_arm64"),
}

#: Machine -> its levels, lowest first, each with what the compiler takes it by.
LEVELS = {
    "x86_64": (("v2", "x86-64-v2"), ("v3", "x86-64-v3"), ("v4", "x86-64-v4")),
    "aarch64": (("neon", ""),),
}

#: No operation is fused or reordered, and no level's functions are seen but those that are called.
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
)


def target() -> str:
    """Return the name in TARGETS of what is built for; "" for a machine that has no levels here."""
    here = f"{_machine()}-{'macos' if sys.platform == 'darwin' else sys.platform}"
    name = os.environ.get("NOISYTUNE_TARGET", here)
    return name if name in TARGETS else ""


def _machine() -> str:
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())


def compile_library(source: Path, library: Path, name: str, folder: Path) -> None:
    """Compile kernels.c for a target to a shared library, by way of object files in `folder`."""
    other, *extra = shlex.split(os.environ.get("NOISYTUNE_CC", "")) or [""]
    compiler = [other] if other else [sys.executable, "-m", "ziglang", "cc", "-target", TARGETS[name][0]]
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    # zig keeps what it made of its C library; a home that can be written to is not asked for.
    environment = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    environment |= os.environ
    objects: list[str] = []
    for at, (level, march) in enumerate(LEVELS[name.partition("-")[0]]):
        chosen = [f"-march={march if other else march.replace('-', '_')}"] if march else []  # zig's spelling
        lowest = ["-DLOWEST"] if at == 0 else []
        objects.append(str(folder / f"kernels-{level}.o"))
        options = [*FLAGS, *extra, *chosen, f"-DLEVEL={level}", *lowest, "-c", str(source), "-o", objects[-1]]
        subprocess.run([*compiler, *options], check=True, env=environment)
    strip = [] if other else ["-s"]
    subprocess.run(
        [*compiler, *extra, "-shared", *strip, *objects, "-o", str(library)], check=True, env=environment
    )


class BuildKernels(build_ext):  # type: ignore[misc]
    """`build_ext` whose extension is the kernels' library, which Python does not import but ctypes loads."""

    def build_extension(self, ext: Extension) -> None:
        """Compile; where there is no target for this machine, the package does without (NumPy's way)."""
        library = Path(self.get_ext_fullpath(ext.name))
        name = target()
        if name:
            compile_library(Path(ext.sources[0]), library, name, Path(self.build_temp))
        else:
            library.parent.mkdir(parents=True, exist_ok=True)
            library.write_bytes(b"")  # what setuptools expects; it does not load

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path, which says nothing of a version of Python."""
        return os.path.join(*fullname.split(".")) + ".so"


class KernelsWheel(bdist_wheel):  # type: ignore[misc]
    """A wheel for any Python 3 on the target's platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tag."""
        _, _, here = super().get_tag()
        name = target()
        return "py3", "none", TARGETS[name][1] if name else here


def build_in_place() -> None:
    """Compile the library where a source tree looks for it, for who works on kernels.c; needs ziglang."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        compile_library(here / "kernels.c", here / "kernels.so", target(), Path(folder))


if __name__ == "__main__":
    build_in_place()
