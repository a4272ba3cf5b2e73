"""Bochs, an emulator of a PC whose CPU has AVX-512: a static program run there, alone with a Linux kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

#: All in Debian: what is found on the path, and what is put on the disc or into the machine.
_PROGRAMS = ("bochs", "xorriso", "busybox")
_LOADER = (Path("/usr/lib/ISOLINUX/isolinux.bin"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"))
_VGA = Path("/usr/share/vgabios/vgabios.bin")
_PACKAGES = (
    "bochs, bochs-term, vgabios, xorriso, isolinux, syslinux-common, busybox-static and linux-image-amd64"
)

_INIT = """#!/busybox sh
/program </given | /busybox sha256sum
/busybox sleep 1
/busybox poweroff -f
"""
_LOADING = """DEFAULT linux
LABEL linux
KERNEL kernel
APPEND initrd=files console=ttyS0 quiet mitigations=off
"""
_MACHINE = f"""cpu: model=corei7_skylake_x, ips=50000000
memory: guest=256, host=256
vgaromimage: file={_VGA}
ata0-master: type=cdrom, path=disc, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=printed
display_library: term
sound: waveoutdrv=dummy
clock: sync=none
log: log
"""


def missing() -> str:
    """Return what a machine lacks here; "" where it can be run."""
    if not all(map(shutil.which, _PROGRAMS)) or not all(map(Path.exists, (*_LOADER, _VGA))) or not _kernels():
        return f"needs Debian's {_PACKAGES}"
    helped = subprocess.run(["bochs", "--help"], capture_output=True, text=True, check=False, timeout=60)
    version = re.search(r"Emulator (\d+)", helped.stdout + helped.stderr)
    # Version 2.7 rounds what lies halfway between two F16 away from zero.
    return "" if version and int(version[1]) >= 3 else "needs Bochs 3.0 or later (Debian 13)"


def run(program: Path, given: bytes, folder: Path) -> str:
    """Run a program with standard input in a new folder; return its output's SHA-256, "" if none was told."""
    files, disc = folder / "files", folder / "on-disc"
    files.mkdir(parents=True)
    disc.mkdir()
    shutil.copy(program, files / "program")
    shutil.copy(str(shutil.which("busybox")), files)
    (files / "given").write_bytes(given)
    (files / "init").write_text(_INIT)
    (files / "init").chmod(0o755)
    with (disc / "files").open("wb") as archive:
        names = "\n".join(os.listdir(files))
        pack = ["busybox", "cpio", "-o", "-H", "newc"]
        subprocess.run(pack, input=names.encode(), cwd=files, stdout=archive, check=True, timeout=60)
    shutil.copy(_kernels()[-1], disc / "kernel")
    (disc / "isolinux.cfg").write_text(_LOADING)
    for path in _LOADER:
        shutil.copy(path, disc)
    burn = ["xorriso", "-as", "mkisofs", "-quiet", "-o", "disc", "-b", "isolinux.bin", "-no-emul-boot"]
    table = ["-boot-load-size", "4", "-boot-info-table"]
    subprocess.run([*burn, *table, disc.name], cwd=folder, capture_output=True, check=True, timeout=60)
    (folder / "machine").write_text(_MACHINE)
    # A Bochs that has a debugger waits for a word from it.
    subprocess.run(
        ["bochs", "-q", "-f", "machine"],
        input=b"continue\n",
        cwd=folder,
        env=os.environ | {"TERM": "linux"},
        capture_output=True,
        check=False,  # it ends with 1 where the machine is switched off
        timeout=1200,
    )
    told = re.search(r"\b[0-9a-f]{64}\b", (folder / "printed").read_text(errors="replace"))
    return told[0] if told else ""


def _kernels() -> list[Path]:
    return sorted(Path("/boot").glob("vmlinuz-*"))
