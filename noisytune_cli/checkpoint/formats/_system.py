"""Linux system calls that the `os` module lacks.

Each is a thin binding: same arguments, same errors (OSError), nothing decided here. Where libc has no such
symbol (macOS), a function says so in its docstring and callers keep working without it. Calls release the
GIL, so a thread that waits for the device holds up no other.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h

_libc = ctypes.CDLL(None, use_errno=True)


def reserve(fd: int, length: int) -> None:
    """Allocate the file's first `length` bytes and set its size; OSError (ENOSPC, EOPNOTSUPP…) if it cannot.

    Unlike `os.posix_fallocate`, libc does not fall back to writing into every block where the file system
    cannot reserve: that would write the file twice. EOPNOTSUPP as well where libc has no such call.
    """
    if _fallocate is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    while _fallocate(fd, 0, 0, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def free_memory() -> int | None:
    """Return the bytes that are available, no more than cgroups allow; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        free = int(fields["MemAvailable"].split()[0]) << 10
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except (OSError, KeyError, ValueError):
        return None
    for _, controllers, path in groups:
        # Of cgroups of version 2 and 1. A container may see its own group as the root.
        for place, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
            if place in controllers.split(","):
                own = PurePosixPath("/sys/fs/cgroup", place, path.lstrip("/"))
                for group in (own, *own.parents):
                    with suppress(OSError, ValueError), open(group / name, encoding="ascii") as file:
                        free = min(free, int(file.read()))
    return free


def _bind(name: str, *argument_types: type[ctypes._SimpleCData[Any]]) -> ctypes._NamedFuncPointer | None:
    function: ctypes._NamedFuncPointer | None = getattr(_libc, name, None)
    if function is not None:
        function.argtypes = argument_types
        function.restype = ctypes.c_int
    return function


def rename_without_replacing(source: str, target: str) -> None:
    """Rename, failing with EEXIST where the target exists; EINVAL or ENOSYS where it cannot be asked for."""
    _rename(source, target, _RENAME_NOREPLACE)


def exchange(first: str, second: str) -> None:
    """Swap two names atomically; EINVAL or ENOSYS where the system or the file system cannot."""
    _rename(first, second, _RENAME_EXCHANGE)


def _rename(source: str, target: str, flags: int) -> None:
    if _renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), source, None, target)


_fallocate = _bind("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_renameat2 = _bind("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
