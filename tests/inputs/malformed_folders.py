"""Checkpoint folders, and what else a user may name, that are wrong.

What lies there is no weight file, or cannot be told from others, or bears a name that would drive a terminal.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from hostile import Hostile, fifo, folder, hard_link, link, sparse, tree
from malformed import HEADER, frame

GOOD = frame(HEADER, bytes(range(1, 17)))
NAME = "model.safetensors"

#: How a manifest of noisytune begins.
BEGUN = '{"schema": 1, "tool": {"name": "noisytune", "version": "1"}, "source": '


def a_socket(path: Path) -> None:
    """A socket that nobody listens at; bound by a short name, which is all that sockets take."""
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def deep(root: Path) -> Path:
    """Folders in folders, beyond the longest path that a system call takes."""
    source = root / "model"
    source.mkdir()
    (source / NAME).write_bytes(GOOD)
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(source)
        for _ in range(20):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
    finally:
        os.fchdir(here)
        os.close(here)
    return source


def raw(name: bytes) -> Callable[[Path], Path]:
    """A folder whose only weights have this name."""

    def lay(root: Path) -> Path:
        (root / "model").mkdir()
        (root / "model" / os.fsdecode(name)).write_bytes(GOOD)
        return root / "model"

    return lay


SOURCES = tuple(
    Hostile(f"source: {name}", lay, words, code)
    for name, lay, words, code in (
        ("absent", tree({}, "other"), ("No such file",), 4),
        ("a link to nothing", tree({"x": link("no")}, "model/x"), ("No such file",), 4),
        ("a link to itself", tree({"x": link("x")}, "model/x"), ("symbolic links",), 4),
        ("two links in a circle", tree({"x": link("y"), "y": link("x")}, "model/x"), ("symbolic links",), 4),
        ("below a file", tree({NAME: GOOD}, f"model/{NAME}/x"), ("Not a directory",), 4),
        ("a name too long", tree({}, "x" * 300), ("too long",), 4),
        ("a path too long", tree({}, "x/" * 3000 + "x"), ("too long",), 4),
        ("an absent name with an escape sequence", tree({}, "\x1b[2J\n[red]"), ("\\x1b[2J\\x0a[red]",), 4),
        ("an absent name that is not UTF-8", tree({}, os.fsdecode(b"\xff\x9b")), ("\\udcff\\udc9b",), 4),
        ("a FIFO", tree({NAME: fifo}, f"model/{NAME}"), ("a FIFO",), 3),
        ("a socket", tree({NAME: a_socket}, f"model/{NAME}"), ("a socket",), 3),
        ("a link to a device", tree({NAME: link("/dev/zero")}, f"model/{NAME}"), ("a character device",), 3),
        ("a link to a FIFO", tree({"p": fifo, NAME: link("p")}, f"model/{NAME}"), ("a FIFO",), 3),
        ("a sparse terabyte of zeros", tree({NAME: sparse(1 << 40)}, f"model/{NAME}"), ("zeros",), 3),
        ("a README", tree({"README.md": "# Model\n"}, "model/README.md"), ("not a",), 3),
        ("a config", tree({"config.json": '{"a": 1}'}, "model/config.json"), ("JSON",), 3),
    )
)

FOLDERS = tuple(
    Hostile(f"folder: {name}", lay, words, code)
    for name, lay, words, code in (
        ("empty", tree({}), ("it has no weights",), 3),
        ("a README alone", tree({"README.md": "x"}), ("it has no weights",), 3),
        ("a manifest alone", tree({"noisytune.json": "{}"}), ("it has no weights",), 3),
        ("a folder in a folder", tree({"a/b/c/README.md": "x"}), ("it has no weights",), 3),
        ("capitals in the suffix", tree({"MODEL.SAFETENSORS": GOOD}), ("it has no weights",), 3),
        ("a left-over of a killed run", tree({f".noisytune-0-1/{NAME}": GOOD}), ("it has no weights",), 3),
        ("weights in .git", tree({f".git/{NAME}": GOOD}), ("it has no weights",), 3),
        ("GGUF", tree({"model.gguf": b"GGUF"}), ("GGUF",), 3),
        ("ONNX", tree({"onnx/model.onnx": b"\x08\x07"}), ("ONNX",), 3),
        ("Keras", tree({"tf_model.h5": b"\x89HDF\r\n\x1a\n"}), ("TensorFlow",), 3),
        ("Flax", tree({"flax_model.msgpack": b"\x81"}), ("Flax",), 3),
        (
            "two weight files",
            tree({"a.safetensors": GOOD, "b.safetensors": GOOD}),
            ("a.safetensors, b.safet",),
            3,
        ),
        ("weights below only", tree({f"x/{NAME}": GOOD, f"y/{NAME}": GOOD}), (f"x/{NAME}, y/{NAME}",), 3),
        ("one shard of many", tree({"model-00001-of-00009.safetensors": GOOD}), ("no index",), 3),
        ("the weights are a folder", tree({NAME: folder}), ("it has no weights",), 3),
        ("the weights are a full folder", tree({f"{NAME}/{NAME}": GOOD}), ("Give that folder",), 3),
        ("the weights are a FIFO", tree({NAME: fifo}), ("a FIFO",), 3),
        ("the weights are a socket", tree({NAME: a_socket}), ("a socket",), 3),
        ("the weights are a link to nothing", tree({NAME: link("no")}), ("a broken link",), 3),
        ("the weights are a link to themselves", tree({NAME: link(NAME)}), ("a broken link",), 3),
        ("the weights are a link to a device", tree({NAME: link("/dev/zero")}), ("a device",), 3),
        (
            "the weights are a link to a FIFO outside",
            tree({"../p": fifo, NAME: link("../p")}),
            ("a FIFO",),
            3,
        ),
        (
            "the weights are a link out",
            tree({"../blob": GOOD, NAME: link("../blob")}),
            ("--follow-links",),
            3,
        ),
        ("a link out beside", tree({NAME: GOOD, "x.txt": link("/etc/passwd")}), ("--follow-links",), 3),
        ("the weights are a link to the folder", tree({NAME: link(".")}), ("it has no weights",), 3),
        ("the adapter is empty", tree({"adapter_model.safetensors": b""}), ("it is empty",), 3),
        ("the weights are a config", tree({NAME: '{"model_type": "bert"}'}), ("JSON document",), 3),
        ("the weights are Python", tree({NAME: "import os\n" * 9}), ("not a safetensors file",), 3),
        ("a path beyond the longest", deep, ("too long",), 4),
        ("a name that is not UTF-8", raw(b"\xff\xfe.safetensors"), ("\\\\udcff", "not UTF-8"), 3),
        (
            "two names with escape sequences",
            tree({"\x1b[2J.safetensors": GOOD, "b\nOK.safetensors": GOOD}),
            ("\\x1b[2J", "b\\x0aOK"),
            3,
        ),
        (
            "two names that turn the line",
            tree({"\u202ea.safetensors": GOOD, "\u2066b.safetensors": GOOD}),
            ("\\u202e", "\\u2066"),
            3,
        ),
        (
            "two names of markup",
            tree({"[red]a.safetensors": GOOD, "[b]b.safetensors": GOOD}),
            ("[red]a", "[b]b"),
            3,
        ),
        (
            "a name with an escape sequence, cut short",
            tree({"\x1b]0;x\x07.safetensors": GOOD[:-1]}),
            ("\\x1b]0;x\\x07", "truncated"),
            3,
        ),
        (
            "a name of a line break and an error, cut short",
            tree({"a\nnoisytune: error: b.safetensors": GOOD[:-2]}),
            ("a\\x0anoisytune: error", "truncated"),
            3,
        ),
    )
)

NOISED = tuple(
    Hostile(f"noised before: {name}", lay, ("noised before", "--again"), command="perturb")
    for name, lay in (
        ("a folder", tree({NAME: GOOD, "noisytune.json": BEGUN})),
        ("a file", tree({NAME: GOOD, f"{NAME}.noisytune.json": BEGUN}, f"model/{NAME}")),
        ("nested too deep", tree({NAME: GOOD, "noisytune.json": BEGUN + "[" * 100_000})),
    )
)

ODD = tuple(
    Hostile(f"folder, accepted: {name}", lay)
    for name, lay in (
        ("plain", tree({NAME: GOOD})),
        ("a hard link", tree({"a.bin.txt": GOOD, NAME: hard_link("a.bin.txt")})),
        ("names that differ in case", tree({NAME: GOOD, "Model.safetensors": GOOD, "Config.json": "{"})),
        ("links in a circle", tree({NAME: GOOD, "a/b": link(".."), "c": link("a")})),
        (
            "links out",
            tree({NAME: GOOD, "etc": link("/etc"), "up": link("..")}),
        ),
        ("pipes and sockets beside", tree({NAME: GOOD, "p": fifo, "s": a_socket, "z": link("/dev/zero")})),
        (
            "hostile names beside",
            tree(
                {
                    NAME: GOOD,
                    "\x1b[2J": "",
                    "a\nb": "",
                    "\u202ex": "",
                    "[red]": "",
                    "-rf": "",
                    "$(true)": "",
                    "a;true": "",
                    "'": "",
                    os.fsdecode(b"\xff"): "",
                }
            ),
        ),
        (
            "Python beside",
            tree(
                {
                    NAME: GOOD,
                    "modeling.py": "raise SystemExit(9)",
                    "__init__.py": "1/0",
                    "json.py": "raise SystemExit(9)",
                    "conftest.py": "1/0",
                    "x.pth": "import os",
                }
            ),
        ),
        ("a twin that is a FIFO", tree({NAME: GOOD, "pytorch_model.bin": fifo})),
    )
)

FOLDERS += SOURCES + NOISED + ODD
