"""config.json beside valid weights: not JSON, not a file, a quantised model's, or only odd."""

from __future__ import annotations

import json
from typing import Any

from hostile import Content, Hostile, fifo, folder, link, sparse, tree
from malformed import HEADER, frame

GOOD = frame(HEADER, bytes(range(1, 17)))


def beside(config: Content) -> Any:
    """A folder with this config."""
    return tree({"model.safetensors": GOOD, "config.json": config})


#: Those of other programs, which are copied and warned of.
TEXT = tuple(
    Hostile(f"config, not used: {name}", beside(content))
    for name, content in (
        ("empty", b""),
        ("an open brace", b"{"),
        ("plain words", b"not json"),
        ("a list", b"[]"),
        ("null", b"null"),
        ("a string", b'"bert"'),
        ("a number", b"1e999"),
        ("NaN", b"NaN"),
        ("byte FF", b'{"a": "\xff"}'),
        ("UTF-16", '{"a": 1}'.encode("utf-16")),
        ("a byte-order mark", b"\xef\xbb\xbf{}"),
        ("NUL bytes", bytes(32)),
        ("100,000 deep", b"[" * 100_000 + b"]" * 100_000),
        ("20,000 objects deep", b'{"a":' * 20_000),
        ("5,000 digits", b'{"a": ' + b"9" * 5000 + b"}"),
        ("two documents", b"{}{}"),
        ("a comment", b"{} // config"),
        ("HTML", b"<html>"),
        ("YAML", b"model_type: bert\n"),
        ("Python", b"import os\nos.system('true')\n"),
        ("single quotes", b"{'a': 1}"),
        ("a line break in a string", b'{"a": "\n"}'),
        ("2 million objects", b'{"a":[' + b'{"":0},' * 2_000_000 + b"0]}"),
    )
)

NO_FILE = tuple(
    Hostile(f"config: {name}", beside(content), words)
    for name, content, words in (
        ("17 MB", sparse(17 << 20), ("larger than 16,777,216",)),
        ("a folder", folder, ("a directory",)),
        ("a FIFO", fifo, ("a FIFO",)),
        ("a link to a device", link("/dev/zero"), ("a character device",)),
    )
)

UNREADABLE = (
    Hostile("config: a link to nothing", beside(link("no")), ("No such file",), 4),
    Hostile("config: a link to itself", beside(link("config.json")), ("symbolic links",), 4),
)

QUANTIZED = tuple(
    Hostile(f"quantised: {name}", beside(json.dumps(config)), words, command="perturb")
    for name, config, words in (
        ("GPTQ", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("GPTQ 4-bit",)),
        ("AWQ", {"quantization_config": {"quant_method": "awq"}}, ("AWQ",)),
        ("4-bit", {"quantization_config": {"load_in_4bit": True}}, ("bitsandbytes 4-bit",)),
        (
            "fp8",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 1]}},
            ("block fp8",),
        ),
        ("the text model", {"text_config": {"quantization_config": {"quant_method": "hqq"}}}, ("HQQ",)),
        ("MLX", {"quantization": {"bits": 4, "group_size": 64}}, ("MLX 4-bit",)),
        ("no method", {"quantization_config": {"x": 1}}, ("names no method",)),
        (
            "a method with an escape sequence",
            {"quantization_config": {"quant_method": "\x1b[2J\n[red]\u202e"}},
            ("\\x1b[2J\\x0a[red]\\u202e",),
        ),
        ("a method that is a list", {"quantization_config": {"quant_method": ["x"] * 5000}}, ("quantised",)),
        (
            "a method of a megabyte",
            {"quantization_config": {"quant_method": "x" * 1_000_000}},
            ("quantised",),
        ),
        (
            "bits of 4,000 digits",
            {"quantization_config": {"quant_method": "gptq", "bits": 10**4000}},
            ("GPTQ",),
        ),
        ("bits with an escape sequence", {"quantization": {"bits": "\x07", "group_size": 1}}, ("\\x07-bit",)),
    )
)

DEEP = tuple(
    Hostile(
        f"quantised: {name} 900 deep",
        beside(text % ("[" * 900 + "]" * 900)),
        ("quantised",),
        command="perturb",
    )
    for name, text in (
        ("bits", '{"quantization": {"bits": %s, "group_size": 1}}'),
        ("a method", '{"quantization_config": {"quant_method": %s}}'),
        ("an algorithm", '{"quantization_config": {"quant_algo": %s}}'),
    )
)

ODD = tuple(
    Hostile(f"config, accepted: {name}", beside(content))
    for name, content in (
        ("auto_map", '{"auto_map": {"AutoModel": "modeling.Model", "AutoConfig": "os.system"}}'),
        ("a key twice", '{"a": 1, "a": 2}'),
        ("NaN and Infinity", '{"a": NaN, "b": -Infinity, "c": 1e999}'),
        ("members of the wrong kinds", '{"model_type": [], "tie_word_embeddings": "no", "text_config": 7}'),
        (
            "more of the wrong kinds",
            '{"model_type": {"a": 1}, "quantization_config": [1], "quantization": "x"}',
        ),
        ("model_type null", '{"model_type": null, "architectures": null}'),
        ("a lone surrogate", '{"model_type": "\\ud800"}'),
        (
            "a quantisation method of a megabyte",
            '{"quantization_config": {"quant_method": "%s"}}' % ("x" * 10**6),
        ),
        ("900 deep", '{"a": ' + "[" * 900 + "]" * 900 + "}"),
    )
)

CONFIGS = TEXT + NO_FILE + UNREADABLE + QUANTIZED + DEEP + ODD
