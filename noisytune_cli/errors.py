"""Every way in which noisytune refuses, fails or stops, each with its exit code.

    NoisytuneError
    ├── UsageError           2   the request makes no sense (shown as Typer shows usage errors)
    ├── InputInvalid         3   the input is malformed, incomplete, unsafe or not supported
    ├── InputUnreadable      4   the input is missing or cannot be read
    ├── OutputUnsafe         5   the output exists, is in use, or is unsafe to write
    ├── ResourceExhausted    6   out of a resource, or a write failed
    │   └── PackageMissing       a package is not installed (an ImportError too)
    ├── HubError             7   the hub, an object store or the network failed
    ├── Mismatch             8   the input changed while read, or the answer is "does not match"
    └── Stopped      130, 143, 129   a signal asked us to stop
        └── PipeClosed         141   the reader of our output went away

An error is one line: WHAT: PATH[: tensor "NAME"]: WHY. NEXT STEP. Everything that came from a file is
escaped here, once, so no caller has to remember. Errors can be pickled: one of a worker process reaches its
caller with all its fields.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import ClassVar

from noisytune_cli.escape import escape

#: What ends the cause of a failed write, unless an earlier output of the same run is there already.
NOTHING_PUBLISHED = "nothing was published"


#: How pickle makes an error again: from its class, what it was raised with and its fields.
_Again = tuple[
    Callable[..., BaseException], tuple[type[BaseException], tuple[object, ...], Mapping[str, object]]
]


class NoisytuneError(Exception):
    """The base of all expected errors; `exit_code` is what the process ends with.

    `what` says what could not be done, `why` the cause, `next_step` what the user can do; `path` and
    `tensor` say where. `what`, `why` and `next_step` may hold text from files: all is escaped.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        why: str,
        next_step: str,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
    ) -> None:
        self.what, self.why, self.next_step, self.tensor = what, why, next_step, tensor
        self.path = place = None if path is None else os.fspath(path)
        super().__init__(self.line())
        self.path = place  # an ImportError's own __init__ clears it

    def __reduce__(self) -> _Again:
        # An ImportError keeps its path elsewhere.
        return _again, (type(self), self.args, vars(self) | {"path": self.path})

    def move(self, here: str | os.PathLike[str], there: str) -> None:
        """Name a file below the folder `here` by where it is meant to be."""
        start = os.fspath(here)
        if self.path is not None and (self.path == start or self.path.startswith(f"{start}/")):
            self.path = there + self.path[len(start) :]
            self.args = (self.line(),)

    def reword(self, spelled: Callable[[str], str]) -> None:
        """Say the same with other names for what is meant, as for the options of the command line."""
        self.what, self.why, self.next_step = map(spelled, (self.what, self.why, self.next_step))
        self.args = (self.line(),)

    def line(self) -> str:
        """The error as one printable line, without the program's name."""
        where = [] if self.path is None else [escape(self.path, 500)]
        if self.tensor is not None:
            where.append(f'tensor "{escape(self.tensor)}"')
        head = ": ".join([escape(self.what, 300), *where, escape(self.why, 500).rstrip(".")])
        return f"{head}. {escape(self.next_step, 300).rstrip('.')}."


class UsageError(NoisytuneError):
    """The request makes no sense: exit code 2."""

    exit_code = 2


class InputInvalid(NoisytuneError):
    """The input is malformed, incomplete, unsafe or not supported: exit code 3."""

    exit_code = 3


class InputUnreadable(NoisytuneError):
    """The input is missing or cannot be read: exit code 4."""

    exit_code = 4


class OutputUnsafe(NoisytuneError):
    """The output exists, is in use, or is unsafe to write: exit code 5."""

    exit_code = 5


class ResourceExhausted(NoisytuneError):
    """Out of disk, memory or descriptors, or a write failed: exit code 6."""

    exit_code = 6


class PackageMissing(ResourceExhausted, ImportError):
    """What is asked for needs a package that is not installed: exit code 6, an ImportError in Python."""


class HubError(NoisytuneError):
    """The hub, an object store or the network failed: exit code 7."""

    exit_code = 7


class Mismatch(NoisytuneError):
    """The input changed while it was read, or two things that must agree do not: exit code 8."""

    exit_code = 8


class Stopped(BaseException):
    """A signal asked the process to stop; a BaseException so that no `except Exception` swallows it.

    `left` says what it leaves behind, where that is not nothing.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.left: str | None = None
        super().__init__(f"stopped by {signal.Signals(signum).name}")

    def __reduce__(self) -> _Again:
        return _again, (type(self), self.args, vars(self))

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it."""
        return 128 + self.signum


class PipeClosed(Stopped):
    """Whoever read our output closed the pipe (`| head -1`): not worth a word, exit code 141."""

    def __init__(self) -> None:
        super().__init__(signal.SIGPIPE)


def _again(
    kind: type[BaseException], args: tuple[object, ...], fields: Mapping[str, object]
) -> BaseException:
    """Make an error from another process again, not by its `__init__`, which takes other arguments."""
    error: BaseException = kind.__new__(kind, *args)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def to_plain(error: NoisytuneError) -> dict[str, str | None]:
    """Return an error as plain data, for another machine's noisytune to raise."""
    fields = ("what", "why", "next_step", "path", "tensor")
    return {"kind": type(error).__name__, **{name: getattr(error, name) for name in fields}}


def from_plain(data: Mapping[str, str | None]) -> NoisytuneError:
    """Return the error that `to_plain` made data of."""
    kinds: list[type[NoisytuneError]] = [NoisytuneError, *NoisytuneError.__subclasses__()]
    named = {kind.__name__: kind for kind in kinds}
    return named.get(data["kind"] or "", ResourceExhausted)(
        data["what"] or "",
        why=data["why"] or "",
        next_step=data["next_step"] or "",
        path=data["path"],
        tensor=data["tensor"],
    )


def unreadable(error: OSError, path: str | os.PathLike[str]) -> NoisytuneError:
    """Map an OSError met while opening or reading an input to the error the user sees."""
    if isinstance(error, FileNotFoundError):
        next_step = "Check the spelling"
    elif isinstance(error, PermissionError):
        next_step = "Make it readable for this user, or copy it somewhere that is"
    else:
        next_step = "Check the disk or the network share it is on, then run again"
    why = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _RESOURCE_ERRNOS:
        return ResourceExhausted(
            "cannot read",
            path=path,
            why=why,
            next_step=_RAISE_LIMIT,
        )
    return InputUnreadable("cannot read", path=path, why=why, next_step=next_step)


def unwritable(error: OSError, path: str | os.PathLike[str]) -> NoisytuneError:
    """Map an OSError met while writing output to the error the user sees (nothing was published)."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    why = f"{reason}; {NOTHING_PUBLISHED}"
    if next_step := _IMPOSSIBLE_OUTPUT.get(error.errno or 0):
        return OutputUnsafe("cannot write there", path=path, why=why, next_step=next_step)
    next_step = _WRITE_ERRNOS.get(
        error.errno or 0,
        "Check the disk or the network share it is on, or choose another place with -o, then run again",
    )
    return ResourceExhausted("cannot write", path=path, why=why, next_step=next_step)


def exhausted(error: OSError | MemoryError) -> ResourceExhausted:
    """Map what the system refuses at a place where nobody can tell input from output (a name, a close)."""
    if isinstance(error, MemoryError):
        return ResourceExhausted(
            "out of memory",
            why="the process may not have more",
            next_step="Raise the limit (ulimit -v), or use fewer --threads",
        )
    # The current directory alone is asked for without a name.
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return ResourceExhausted(
            "the current directory is gone",
            why="it was removed or replaced",
            next_step="Change into it again, or into another one, then run again",
        )
    return ResourceExhausted(
        "the system failed",
        path=error.filename if isinstance(error.filename, str) else None,
        why=os.strerror(error.errno) if error.errno else str(error),
        next_step="Check the disk or the network share, then run again",
    )


def not_supported() -> PackageMissing:
    """Return the error for a system that is not POSIX."""
    return PackageMissing(
        "this system is not supported",
        why="files are written safely on Linux and macOS alone",
        next_step="On Windows, install noisytune in WSL",
    )


#: Of Python's own modules those that Windows lacks.
_POSIX = {"fcntl", "resource"}

#: What pip calls packages that are imported by another name.
_INSTALLED_AS = {"yaml": "pyyaml"}


def lacking(error: ModuleNotFoundError) -> PackageMissing | None:
    """Map an import that failed for want of a package to the error the user sees; None for a bug of ours.

    torch and what else is large is imported where it is used, in many places; here it is said for all.
    """
    package, _, inside = (error.name or "").partition(".")
    if package in _POSIX:
        return not_supported()
    if not package or inside or package == "noisytune_cli" or package in sys.stdlib_module_names:
        return None
    return PackageMissing(
        f"this needs {package}",
        why="it is not installed",
        next_step=f"Install it: pip install {_INSTALLED_AS.get(package, package)}",
    )


class NoisytuneWarning(UserWarning):
    """What a user should know though all goes on; the command line shows it as one line."""


_RAISE_LIMIT = "Raise the limit (ulimit -n, ulimit -v), then run again"
_RESOURCE_ERRNOS = (errno.ENOMEM, errno.ENFILE, errno.EMFILE)

#: Next steps where no output can have that path.
_IMPOSSIBLE_OUTPUT = {
    errno.ENAMETOOLONG: "Choose a shorter name with -o",
    errno.ENOTDIR: "Something in this path is no folder: choose another output with -o",
    errno.ELOOP: "A link in it leads back to itself: choose another output with -o",
}

#: Next steps where writing failed for a reason that tells what to do.
_WRITE_ERRNOS = {
    **dict.fromkeys(_RESOURCE_ERRNOS, _RAISE_LIMIT),
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "Free space or choose another place with -o, then run again"
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "Choose a place with -o where this user may write, or have it permitted"
    ),
    errno.EROFS: "Choose a place with -o that is not mounted read-only",
    errno.EFBIG: "Raise the limit (ulimit -f), or choose a file system with -o that holds larger files",
    errno.ENOENT: "The folder it was to lie in is gone: choose another place with -o, then run again",
}
