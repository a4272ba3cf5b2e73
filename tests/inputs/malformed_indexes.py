"""Indexes of sharded checkpoints that are wrong, or do not fit their shards.

The shards are valid: `a` and `b` in the first, `c` in the second, unless the row is about them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Content, Hostile, fifo, folder, hard_link, link, sparse, tree, weight_file
from malformed import DATA, HEADER, frame

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WHOLE = {"a": FIRST, "b": FIRST, "c": SECOND}
INTACT = json.dumps({"weight_map": WHOLE})
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"1" * 64 + b"\nsize 99\n"


def indexed(index: Content, **shards: Content) -> Callable[[Path], Path]:
    """A folder with this index; `first` and `second` are other contents of the shards, `more` a third."""
    files: dict[str, Content] = {FIRST: weight_file("a", "b"), SECOND: weight_file("c"), INDEX: index}
    names = {"first": FIRST, "second": SECOND, "more": "model-00003.safetensors"}
    return tree(files | {names[key]: content for key, content in shards.items()})


def mapped(weight_map: Any, **more: Any) -> Callable[[Path], Path]:
    """A folder whose index has this weight_map, and more members."""
    return indexed(json.dumps({"weight_map": weight_map, **more}))


def shard(name: str) -> Callable[[Path], Path]:
    """A folder whose index says that `c` is in the shard `name`."""
    return mapped(WHOLE | {"c": name})


TEXT = tuple(
    Hostile(f"index: {name}", indexed(content), words)
    for name, content, words in (
        ("empty", b"", ("not valid JSON",)),
        ("a list", b"[]", ("not a JSON object",)),
        ("null", b"null", ("not a JSON object",)),
        ("a string", b'"weight_map"', ("not a JSON object",)),
        ("a number", b"7", ("not a JSON object",)),
        ("an open brace", b"{", ("not valid JSON",)),
        ("cut off", INTACT.encode()[:-9], ("not valid JSON",)),
        ("two documents", INTACT.encode() * 2, ("Extra data",)),
        ("a comment", b'{"weight_map": {} // none\n}', ("not valid JSON",)),
        ("a trailing comma", b'{"weight_map": {"a": "b",}}', ("not valid JSON",)),
        ("single quotes", b"{'weight_map': {}}", ("not valid JSON",)),
        ("byte FF", b'{"weight_map": {"\xff": "x.safetensors"}}', ("not UTF-8",)),
        ("UTF-16", INTACT.encode("utf-16"), ("not UTF-8",)),
        ("a byte-order mark", b"\xef\xbb\xbf{}", ("not valid JSON",)),
        ("NUL bytes", bytes(64), ("not valid JSON",)),
        ("2,000 deep", b'{"weight_map":' + b"[" * 2000 + b"]" * 2000 + b"}", ("index",)),
        ("100,000 deep", b'{"weight_map":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ("nested too deep",)),
        ("a number of 5,000 digits", b'{"metadata":' + b"9" * 5000 + b"}", ("5,000 digits",)),
        ("a tensor twice", INTACT.replace('"a"', f'"a": "{FIRST}", "a"').encode(), ('"a" twice',)),
        ("weight_map twice", f'{{"weight_map": {{}}, {INTACT[1:]}'.encode(), ('"weight_map" twice',)),
        ("a key twice, spelt apart", INTACT.replace('"a"', '"\\u0061": "x", "a"').encode(), ('"a" twice',)),
        ("a key twice deep in it", (INTACT[:-1] + ', "x": [{"y": 1, "y": 1}]}').encode(), ('"y" twice',)),
        ("NaN", (INTACT[:-1] + ', "metadata": {"total_size": NaN}}').encode(), ("NaN",)),
        ("-Infinity", (INTACT[:-1] + ', "metadata": [-Infinity]}').encode(), ("-Infinity",)),
        ("-0", (INTACT[:-1] + ', "metadata": [-0]}').encode(), ("-0 for an integer",)),
        ("numbers of 301 digits", (INTACT[:-1] + f', "x": {10**300}}}').encode(), ("301 digits",)),
        ("an HTML page", b"<!DOCTYPE html><html></html>", ("not valid JSON",)),
        ("a git-LFS pointer", _POINTER, ("not valid JSON",)),
        ("a safetensors file", frame(HEADER), ("not valid JSON",)),
        ("17 MB", sparse(17 << 20), ("larger than 16,777,216",)),
        ("5 million lists", b'{"a":[' + b"[]," * 5_000_000 + b"[]]}", ("more than 1,000,000 values",)),
        ("a text of 16 MB that is wide", '{"a":"😀' + "a" * 16_700_000 + '"}', ("no weight_map",)),
        ("a FIFO", fifo, ("a FIFO",)),
        ("a folder", folder, ("no index",)),
    )
)

SCHEMA = tuple(
    Hostile(f"index: {name}", lay, words)
    for name, lay, words in (
        ("no weight_map", indexed("{}"), ("has no weight_map",)),
        ("weight_map null", mapped(None), ("has no weight_map",)),
        ("weight_map a list", mapped([]), ("is no object",)),
        ("weight_map a string", mapped("a"), ("is no object",)),
        ("weight_map a number", mapped(0), ("is no object",)),
        ("weight_map empty", mapped({}), ("lists no tensor",)),
        ("another key's name", indexed(json.dumps({"Weight_map": WHOLE})), ("has no weight_map",)),
        ("a shard null", mapped({"a": None}), ("not a string",)),
        ("a shard a number", mapped({"a": 1}), ("not a string",)),
        ("a shard true", mapped({"a": True}), ("not a string",)),
        ("a shard a list", mapped({"a": [FIRST]}), ("not a string",)),
        ("a shard an object", mapped({"a": {"file": FIRST}}), ("not a string",)),
        (
            "a name with an escape sequence, a shard that is none",
            mapped({"\x1b]0;x\x07": 1}),
            ("\\x1b]0;x\\x07",),
        ),
    )
)

NAMES = tuple(
    Hostile(f"index: the shard {name[:40]!a}", shard(name), words)
    for name, words in (
        *(
            (name, ("no plain name",))
            for name in (
                *("", ".", "..", "../x.safetensors", "a/../../x.safetensors", "/etc/x.safetensors"),
                *("a\0.safetensors", "\x1b[2J.safetensors", "a\nb.safetensors", "a\rb.safetensors"),
                *("\ud800.safetensors", "\u202ex.safetensors", "a\u200bb.safetensors", "\u2066x.safetensors"),
                *("sub//x.safetensors", "sub/", "./x.safetensors", "a/./x.safetensors", "//x.safetensors"),
                *(
                    "file:///etc/x.safetensors",
                    "\x9b2J.safetensors",
                    "\x7f.safetensors",
                    "\u2028.safetensors",
                ),
            )
        ),
        *(
            (name, ("no *.safetensors file",))
            for name in ("pytorch_model.bin", FIRST.upper(), "a", INDEX, "x.safetensors ", "x.safetensors.py")
        ),
        *(
            (name, ("absent (1 of 2 are)",))
            for name in (
                *(
                    "other.safetensors",
                    FIRST.capitalize(),
                    f"sub/{SECOND}",
                    "~/x.safetensors",
                    "x" * 5000 + ".safetensors",
                ),
                *("C:\\x.safetensors", "[red].safetensors", "%2e%2e%2fx.safetensors", "http:x.safetensors"),
            )
        ),
    )
)

SHARDS = tuple(
    Hostile(f"shards: {name}", lay, words)
    for name, lay, words in (
        ("a listed tensor is in none", mapped(WHOLE | {"d": SECOND}), ('tensor "d"', "lacks it")),
        ("a tensor is not listed", mapped({"a": FIRST, "c": SECOND}), ('tensor "b"', "nowhere")),
        ("a tensor is listed in the other", mapped(WHOLE | {"b": SECOND}), ('tensor "b"',)),
        ("swapped", mapped({"a": SECOND, "b": SECOND, "c": FIRST}), ("index and shards disagree",)),
        ("a tensor is in both", indexed(INTACT, second=weight_file("c", "a")), ('tensor "a"', "too")),
        (
            "the second is a hard link to the first",
            indexed(INTACT, second=hard_link(FIRST)),
            ('tensor "a"', "too"),
        ),
        ("the second is a link to the first", indexed(INTACT, second=link(FIRST)), ('tensor "a"', "too")),
        ("a FIFO", indexed(INTACT, second=fifo), ("a FIFO",)),
        ("a folder", indexed(INTACT, second=folder), ("absent",)),
        ("a link to nothing", indexed(INTACT, second=link("no")), ("a broken link",)),
        ("a link to itself", indexed(INTACT, second=link(SECOND)), ("a broken link",)),
        ("a link to a device", indexed(INTACT, second=link("/dev/zero")), ("a device",)),
        ("a link to a folder", indexed(INTACT, second=link(".")), ("absent",)),
        ("empty", indexed(INTACT, second=b""), ("it is empty",)),
        ("a git-LFS pointer", indexed(INTACT, second=_POINTER), ("git lfs pull",)),
        ("truncated", indexed(INTACT, second=weight_file("c")[:-1]), ("truncated",)),
        ("the first has no tensors", indexed(INTACT, first=frame("{}", b"")), ('tensor "a"', "lacks it")),
        ("the index is absent", tree({FIRST: weight_file("a"), SECOND: weight_file("c")}), ("no index",)),
        (
            "two indexes",
            tree({FIRST: weight_file("a"), f"one{INDEX[5:]}": "{}", f"two{INDEX[5:]}": "{}"}),
            ("--weights",),
        ),
        ("the index itself is given", tree({INDEX: "{}"}, f"model/{INDEX}"), ("this is an index",)),
    )
)

ODD = tuple(
    Hostile(f"index, accepted: {name}", lay)
    for name, lay in (
        ("whole", mapped(WHOLE)),
        ("total_size wrong", mapped(WHOLE, metadata={"total_size": 1})),
        ("total_size negative text", mapped(WHOLE, metadata={"total_size": "-\x1b[2J[red]"})),
        ("total_size a megabyte of text", mapped(WHOLE, metadata={"total_size": "x" * 1_000_000})),
        (
            "total_size a deep list",
            indexed(INTACT[:-1] + ', "metadata": {"total_size": ' + "[" * 900 + "]" * 900 + "}}"),
        ),
        ("total_size ten thousand numbers", mapped(WHOLE, metadata={"total_size": [10**19] * 10_000})),
        ("metadata a list", mapped(WHOLE, metadata=[1])),
        ("another member", mapped(WHOLE, auto_map={"x": "os.system"})),
        ("a stray file", indexed(INTACT, more=frame("{}", DATA[:0]))),
    )
)

UNREADABLE = (
    Hostile("index: a link to nothing", indexed(link("no")), ("No such file",), 4),
    Hostile("index: a link to itself", indexed(link(INDEX)), ("symbolic links",), 4),
)

INDEXES = UNREADABLE + TEXT + SCHEMA + NAMES + SHARDS + ODD
