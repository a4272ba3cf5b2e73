"""Outputs to verify whose manifest lies, is missing or no file, or belongs to other bytes.

Every manifest of `malformed_manifests.py`, laid out beside the files that the valid one describes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Content, Hostile, fifo, folder, link, sparse, tree
from malformed_manifests import FIELDS, TEXT, at, output, written

from noisytune_cli.manifest.write import MAX_BYTES, lay_out


def changed(change: Callable[[Any], Any]) -> bytes:
    """The valid manifest with its document changed."""
    document = json.loads(written())
    change(document)
    return json.dumps(document).encode()


def published(manifest: Callable[[], bytes], **more: Content) -> Callable[[Path], Path]:
    """An output with another manifest, made when it is laid out; `more` are files of other content."""
    return lambda root: tree({**output(), "noisytune.json": manifest(), **more})(root)


def large(nbytes: int) -> bytes:
    """A manifest of nearly so many bytes, every line of it valid, and wrong in its totals."""
    document = json.loads(written())
    entry = document["tensors"][0]
    line = json.dumps(entry | {"name": "N", "stream": "N"}).encode() + b",\n  "
    name = b"model.layers.12.mlp.experts.%06d.down_proj.weight"
    count = (nbytes - len(written())) // (len(line) + 2 * len(name % 0))
    document["tensors"] = []
    head, tail = b"".join(lay_out(document.items())).split(b'"tensors": []')
    lines = b"".join(line.replace(b'"N"', b'"' + name % place + b'"') for place in range(count))
    return head + b'"tensors": [\n  ' + lines[:-4] + b"\n ]" + tail


def instead(name: str, content: Content) -> Callable[[Path], Path]:
    """An output with something else under a name."""
    return lambda root: tree({**output(), name: content})(root)


def lacking(name: str) -> Callable[[Path], Path]:
    """An output without one of its files."""
    return lambda root: tree({key: content for key, content in output().items() if key != name})(root)


def _by_fields(index: int, change: Callable[[Any], Any], words: str) -> Hostile:
    return Hostile(
        f"manifest: field {index}: {words}", published(lambda: changed(change)), (words,), command="verify"
    )


def _by_text(index: int, change: Callable[[bytes], bytes], words: str) -> Hostile:
    return Hostile(
        f"manifest: text {index}: {words}", published(lambda: change(written())), (words,), command="verify"
    )


_FIRST = "model-00001-of-00002.safetensors"

OTHER_BYTES = tuple(
    Hostile(f"manifest: {name}", lay, words, code, command="verify")
    for name, lay, words, code in (
        ("absent", lacking("noisytune.json"), ("no manifest: ",), 4),
        ("a FIFO", instead("noisytune.json", fifo), ("a FIFO",), 3),
        ("a folder", lambda root: tree({"noisytune.json": folder})(root), ("a directory",), 3),
        ("a link to nothing", instead("noisytune.json", link("no")), ("No such file",), 4),
        ("a link to a device", instead("noisytune.json", link("/dev/zero")), ("a character device",), 3),
        ("200 MB", instead("noisytune.json", sparse(200 << 20)), ("larger than",), 3),
        (
            "of a folder, beside a file",
            lambda root: tree({"x": b"", "x.noisytune.json": written()}, "model/x")(root),
            ("that of a folder",),
            3,
        ),
        (
            "reformatted",
            published(lambda: json.dumps(json.loads(written())).encode()),
            ("spelt in another way",),
            8,
        ),
        ("weights absent", lacking(_FIRST), (_FIRST, "absent"), 8),
        ("weights a FIFO", instead(_FIRST, fifo), ("a FIFO",), 8),
        ("weights empty", instead(_FIRST, b""), ("it is empty",), 8),
        ("a copy absent", lacking("sub/config.json"), ("sub/config.json", "absent"), 8),
        ("a copy changed", instead("sub/config.json", b"[]"), ("not those recorded",), 8),
        ("a copy a FIFO", instead("sub/config.json", fifo), ("a FIFO",), 8),
        (
            "a copy whose name has an escape sequence",
            published(lambda: changed(at("copied", 0, "name", to="\x1b[2J\nOK"))),
            ("\\x1b[2J\\x0aOK",),
            8,
        ),
        (
            "a copy whose name is not there and turns the line",
            published(lambda: changed(at("copied", 0, "name", to="\u202e[red]"))),
            ("\\u202e[red]",),
            8,
        ),
    )
) + tuple(
    Hostile(
        f"manifest: {nbytes >> 20} MiB, wrong at its end",
        published(lambda nbytes=nbytes: large(nbytes)),  # type: ignore[misc]
        ("totals.tensors",),
        command="verify",
        times=nbytes >> 24,
    )
    for nbytes in (32 << 20, MAX_BYTES)
)

OUTPUTS = (
    tuple(_by_fields(i, change, words) for i, (change, words) in enumerate(FIELDS))
    + tuple(_by_text(i, change, words) for i, (change, words) in enumerate(TEXT))
    + OTHER_BYTES
    + (Hostile("manifest, accepted: as written", lambda root: tree(output())(root), command="verify"),)
)
