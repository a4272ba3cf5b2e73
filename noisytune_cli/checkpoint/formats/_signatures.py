"""What a file is, told by its first bytes.

A name ending in `.safetensors` promises little: an interrupted `git clone` leaves a pointer, a proxy an
HTML page, a hurried rename a pickle. When a file turns out not to be what its name says, the user is told
what it is and what to do. Only then: a valid safetensors file may begin with any of these bytes.
"""

from __future__ import annotations

import re

#: How many of a file's first bytes `recognise` looks at.
HEAD = 512

#: A ZIP archive that is none of torch.save's.
NUMPY_ARCHIVE = "a NumPy archive (.npz)"

#: Where a tar archive says that it is one; what NeMo and torch 0.1 call the first file in theirs.
_TAR, _TAR_AT = b"ustar", 257
_NEMO = ("model_config.yaml", "model_weights.ckpt")
_TORCH = ("sys_info", "pickle", "storages", "tensors")

#: What is taken for a text has so many characters, and so many are quoted.
_LEAST_TEXT, _QUOTED = 4, 40

FETCH = "Download the file again and check that it is not an error or login page"
_PULL = "Run git lfs pull to fetch the weights"
_XET = "Fetch the file that it points to, with git xet or from the hub"
CONVERT = "Convert it to safetensors first, or name the checkpoint's .safetensors file"

_UNPACK = "Unpack it with tar xf, and give the weights in it"

_SIGNATURES = (
    (rb"version https://git-lfs\.github\.com/spec/", "a git-LFS pointer", _PULL),
    (rb"(?i)\s*<(!doctype\s+html|html|head)\b", "an HTML page", FETCH),
    (rb"\s*<\?xml\b", "an XML document", FETCH),
    (rb"# xet version ", "a git-xet pointer", _XET),
    (rb"(?s)PK\x03\x04.{26}[^/\0]{1,200}\.npy", NUMPY_ARCHIVE, CONVERT),
    (rb"PK\x03\x04", "a ZIP archive (as torch.save writes)", CONVERT),
    (rb"\x80[\x02-\x05]", "a Python pickle (as older versions of torch.save write)", CONVERT),
    (rb"GGUF", "a GGUF file", CONVERT),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file (as Keras writes)", CONVERT),
    (rb"\x93NUMPY", "a NumPy array", CONVERT),
    (rb"\x1f\x8b", "a gzip archive", "Unpack it with gunzip first"),
    (rb"\x28\xb5\x2f\xfd", "a Zstandard archive", "Unpack it with unzstd first"),
    (rb"\s*\{\s*\"", "a JSON document", FETCH),
    (rb"\0{64}", "zeros, as a download that was cut short leaves", FETCH),
)


def recognise(head: bytes) -> tuple[str, str] | None:
    """Return what a file that begins with `head` is, and what the user can do; None if it is not known."""
    if is_tar(head):
        return _tar(head)
    for pattern, kind, next_step in _SIGNATURES:
        if re.match(pattern, head):
            return kind, next_step
    return _text(head)


def is_tar(head: bytes) -> bool:
    """Tell whether a file that begins with `head` says that it is a tar archive."""
    return head[_TAR_AT:].startswith(_TAR)


def _tar(head: bytes) -> tuple[str, str]:
    first = head[:100].split(b"\0")[0].decode("utf-8", "replace").removeprefix("./")
    if first in _TORCH:
        return "a tar archive of torch 0.1, which cannot be read safely", "Load it in torch and save it anew"
    kind = "a NeMo model, which is a tar archive" if first in _NEMO else "a tar archive"
    return (f'{kind} (first in it is "{first}")' if first else kind), _UNPACK


def _text(head: bytes) -> tuple[str, str] | None:
    """Recognise a text, such as a server's answer in place of the file."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return None
        text = head[: error.start].decode()
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if len(line) < _LEAST_TEXT or not all(c.isprintable() or c.isspace() for c in text):
        return None
    return f'text that begins with "{line[:_QUOTED]}"', FETCH
