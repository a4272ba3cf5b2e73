"""What a file is, told by its first bytes.

A name ending in `.safetensors` promises little: an interrupted `git clone` leaves a pointer, a proxy an
HTML page, a hurried rename a pickle. When a file turns out not to be what its name says, the user is told
what it is and what to do. Only then: a valid safetensors file may begin with any of these bytes.
"""

from __future__ import annotations

import re

#: How many of a file's first bytes `recognise` looks at.
HEAD = 512

_FETCH = "Download the file again and check that it is not an error or login page"
_PULL = "Run git lfs pull to fetch the weights"
_CONVERT = "Convert it to safetensors first, or name the checkpoint's .safetensors file"

_SIGNATURES = (
    (rb"version https://git-lfs\.github\.com/spec/", "a git-LFS pointer", _PULL),
    (rb"(?i)\s*<(!doctype\s+html|html|head)\b", "an HTML page", _FETCH),
    (rb"\s*<\?xml\b", "an XML document", _FETCH),
    (rb"PK\x03\x04", "a ZIP archive (as torch.save writes)", _CONVERT),
    (rb"\x80[\x02-\x05]", "a Python pickle (as older versions of torch.save write)", _CONVERT),
    (rb"GGUF", "a GGUF file", _CONVERT),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file (as Keras writes)", _CONVERT),
    (rb"\x93NUMPY", "a NumPy array", _CONVERT),
    (rb"\x1f\x8b", "a gzip archive", "Unpack it with gunzip first"),
    (rb"\x28\xb5\x2f\xfd", "a Zstandard archive", "Unpack it with unzstd first"),
    (rb"\s*\{\s*\"", "a JSON document", _FETCH),
)
_PATTERNS = tuple((re.compile(pattern), kind, next_step) for pattern, kind, next_step in _SIGNATURES)


def recognise(head: bytes) -> tuple[str, str] | None:
    """Return what a file that begins with `head` is, and what the user can do; None if it is not known."""
    for pattern, kind, next_step in _PATTERNS:
        if pattern.match(head):
            return kind, next_step
    return None
