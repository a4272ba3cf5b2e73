"""File systems made for a test: small, read-only, or on a device whose power can be cut.

Each is a context that mounts and always unmounts. `Unavailable` says why this machine cannot: no root, no
loop devices, a container without the right to mount.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, linux/fs.h of ext4 and XFS
_WITHOUT_LOG_FLUSH = 2

#: Seconds in which another mount namespace, such as a test's, ends.
_PATIENCE = 60.0


class Unavailable(Exception):
    """This machine cannot mount what is asked for."""


@contextmanager
def tmpfs(at: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs (`size=64k`, `nr_inodes=8`) at a new directory."""
    at.mkdir()
    _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at))
    try:
        yield at
    finally:
        _run("umount", str(at))


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Make a folder read-only: a mount of itself."""
    _run("mount", "--bind", str(folder), str(folder))
    try:
        _run("mount", "-o", "remount,bind,ro", str(folder))
        yield folder
    finally:
        _run("umount", str(folder))


@contextmanager
def mirror(folder: Path, at: Path) -> Iterator[Path]:
    """Show a folder at a second place, through a file system of its own, which no lock crosses."""
    at.mkdir()
    _run("bindfs", str(folder), str(at))
    try:
        yield at
    finally:
        _run("umount", str(at))


class Device:
    """A disk in a file with an ext4 on it, which is mounted between `mount` and `unmount`."""

    def __init__(self, image: Path, at: Path) -> None:
        """Make the image; nothing is mounted yet."""
        self._image, self._at = image, at
        at.mkdir()
        with image.open("wb") as file:
            file.truncate(16 << 20)
        _run("mkfs.ext4", "-q", "-F", str(image))

    def mount(self) -> None:
        """Mount it, and not what a namespace that was made meanwhile keeps from before the power was cut."""
        until = time.monotonic() + _PATIENCE
        while True:
            _run("mount", "-o", "loop", str(self._image), str(self._at))
            try:
                (self._at / "probe").mkdir()
                (self._at / "probe").rmdir()
            except OSError as error:
                self.unmount()
                if time.monotonic() > until:
                    raise Unavailable(f"{self._image} is mounted elsewhere too") from error
                time.sleep(0.2)
            else:
                return

    def flush(self) -> None:
        """Have on the device whatever was written, and of no other file system: those may be busy."""
        fd = os.open(self._at, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(fd):
                raise OSError(ctypes.get_errno(), "syncfs")
        finally:
            os.close(fd)

    def cut_power(self) -> None:
        """Lose whatever has not reached the device, the journal included; the file system is dead then."""
        fd = os.open(self._at, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        if os.path.ismount(self._at):
            _run("umount", str(self._at))


@contextmanager
def device(folder: Path) -> Iterator[Device]:
    """Make an ext4 device in `folder`, mounted at its `disk`."""
    if shutil.which("mkfs.ext4") is None:
        raise Unavailable("there is no mkfs.ext4")
    made = Device(folder / "image", folder / "disk")
    made.mount()
    try:
        yield made
    finally:
        made.unmount()


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unavailable(f"there is no {command[0]}") from error
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")
