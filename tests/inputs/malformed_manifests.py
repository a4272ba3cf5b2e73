"""Manifests that lie: a valid one with one field, or one stretch of text, made wrong.

`written` is the valid one: two shards, every reason for a copy, copied and left-out files; `parted` has
tensors whose matrices had a std each. `FIELDS` change the document of the first, `PARTS` that of the second,
`TEXT` the bytes, each with the words of the line that refuses it.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Tensor, numbers, save, save_sharded, weights

from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.records import NoiseSpec

TENSORS = {
    "w": weights("F32", 6, 5),
    "half": weights("BF16", 100, centre=1.0, width=0.001),
    "big": numbers("F64", *np.linspace(-1e200, 1e200, 10)),
    "constant": numbers("F32", 0.5, 0.5),
    "nan": numbers("F16", 1.0, math.nan),
    "one": numbers("F32", 2.0),
    "empty": Tensor("F32", np.empty((0, 4), "<f4")),
    "ids": Tensor("I64", np.arange(5)),
    "left": weights("F32", 4),
    "\x1b[2J{}\u202e\n𝕎": weights("F16", 9),
}

NOISE = NoiseSpec(seed=2**64 - 1, rules=(("half", 0.5),), exclude=("left",))


@functools.cache
def output() -> dict[str, bytes]:
    """The files of a small output, its manifest `noisytune.json` among them."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        names = list(TENSORS)
        halves = [{n: TENSORS[n] for n in part} for part in (names[:5], names[5:])]
        source = save_sharded(root / "in", *halves)
        (source / "sub").mkdir()
        (source / "sub" / "config.json").write_text("{}")
        (source / "optimizer.pt").write_text("left out")
        perturb(Request(str(source), NOISE), str(root / "out"))
        out = root / "out"
        return {
            path.relative_to(out).as_posix(): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }


def written() -> bytes:
    """The valid manifest."""
    return output()["noisytune.json"]


@functools.cache
def parted() -> bytes:
    """The manifest of tensors in parts: columns, rows, and one all of whose parts are copied."""
    tensors = {
        "columns": weights("F32", 4, 6),
        "rows": numbers("F16", 1, 2, 3, math.inf, 4, 4, 5),
        "still": numbers("F32", 1, 1, 2, 2),
        "whole": weights("F32", 3, 3),
    }
    splits = (("columns", "1:2,4"), ("rows", "0:3,1,2,1"), ("still", "0:/2"))
    with tempfile.TemporaryDirectory() as scratch:
        source = save(Path(scratch) / "a.safetensors", tensors)
        out = str(Path(scratch) / "b.safetensors")
        return perturb(
            Request(str(source), NoiseSpec(granularity="matrix", splits=splits)), out
        ).manifest_path.read_bytes()


def at(*path: Any, to: Any) -> Callable[[Any], None]:
    """Set the value at a path; a tensor is given by its name."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = by_name(document, key)
        document[path[-1]] = to

    return change


def without(*path: Any) -> Callable[[Any], None]:
    """Delete what is at a path."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = by_name(document, key)
        del document[path[-1]]

    return change


def by_name(value: Any, key: Any) -> Any:
    if isinstance(value, list) and isinstance(key, str):
        return next(entry for entry in value if entry["name"] == key)
    return value[key]


def swapped(key: str, i: int, j: int) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        entries = document[key]
        entries[i], entries[j] = entries[j], entries[i]

    return change


def stored_nowhere(document: Any) -> None:
    """Let the first tensor be recorded as one that got its noise in memory."""
    entry = document["tensors"][0]
    del entry["source_digest"], entry["digest"]
    entry["file"] = ""


D0 = "blake3:" + "0" * 64

#: (what is wrong, words of the error line)
FIELDS: list[tuple[Callable[[Any], Any], str]] = [
    (at("schema", to=2), "newer noisytune. Upgrade noisytune"),
    (at("schema", to=0), "schema is not a version"),
    (at("schema", to=True), "schema is not a version"),
    (at("schema", to="1"), "schema is not a version"),
    (at("tool", to=[]), "tool is not an object"),
    (at("tool", "name", to="other"), "tool.name"),
    (at("tool", "version", to=1), "tool.version is not a string"),
    (at("tool", "host", to="h"), 'unknown key "host"'),
    (at("source", "id", to=None), "source.id is not a string"),
    (at("source", "id", to="\ud800"), "source.id has half a surrogate"),
    (at("source", "revision", to="main"), "source.revision is not a commit"),
    (at("source", "revision", to="../../x"), "source.revision is not a commit"),
    (without("source", "revision"), "source.revision is missing"),
    (at("source", "files", to=[]), "source.files is empty"),
    (stored_nowhere, "some of its tensors are in no file"),
    (at("source", "files", to={}), "source.files is not a list"),
    (at("source", "files", 0, to="x"), "source.files[0] is not an object"),
    (at("source", "files", 0, "name", to="../model.safetensors"), "no plain name"),
    (at("source", "files", 0, "name", to="/etc/passwd"), "no plain name"),
    (at("source", "files", 0, "name", to="a/./b"), "no plain name"),
    (at("source", "files", 0, "name", to="a//b"), "no plain name"),
    (at("source", "files", 0, "name", to="a/"), "no plain name"),
    (at("source", "files", 0, "name", to=""), "no plain name"),
    (at("source", "files", 0, "name", to="a\0b"), "no plain name"),
    (at("source", "files", 0, "name", to="x" * 5000), "longer than any"),
    (at("source", "files", 0, "name", to="other.safetensors"), "tensors[0].file is not one of"),
    (at("source", "files", 0, "size", to=9), "less than any weight"),
    (at("source", "files", 0, "size", to=200), "less than its tensors need"),
    (at("source", "files", 0, "size", to=-1), "size is not an integer"),
    (at("source", "files", 0, "size", to=1e3), "size is not an integer"),
    (at("source", "files", 0, "size", to=True), "size is not an integer"),
    (at("source", "files", 0, "size", to=2**64 - 1), "size is more than"),
    (at("source", "files", 0, "header_digest", to=D0.upper()), "header_digest is not"),
    (at("source", "files", 0, "header_digest", to=D0 + "0"), "header_digest is not"),
    (at("noise", "stream", to="philox4x32-10/v2"), "newer"),
    (at("noise", "distribution", to="cauchy"), "newer"),
    (at("noise", "distribution", to="../uniform"), "newer"),
    (at("noise", "distribution", to="gaussian"), "noise_std is missing"),
    (at("noise", "scope", to="world"), "noise.scope is"),
    (at("noise", "scope", to="global"), "is one-element"),
    (at("noise", "granularity", to="row"), "newer"),
    (at("noise", "seed", to=0), "noise.seed is not a string"),
    (at("noise", "seed", to="18446744073709551616"), "noise.seed is not"),
    (at("noise", "seed", to="-1"), "noise.seed is not"),
    (at("noise", "seed", to="01"), "noise.seed is not"),
    (at("noise", "seed", to="１"), "noise.seed is not"),
    (at("noise", "lambda", to=-0.1), "lambda is none of those"),
    (at("noise", "lambda", to=-0.0), "noise.lambda is a zero with a sign"),
    (at("noise", "scope", to="absolute"), "noise.lambda is given in scope absolute"),
    (at("noise", "sigma", to=0.1), "noise.sigma is given in scope matrix"),
    (at("noise", "shrink", to=1.0), "noise.shrink is not a number from 0"),
    (at("noise", "shrink", to=-0.5), "noise.shrink is not a number from 0"),
    (at("noise", "shrink", to=0.5), "action is copy, which is not what noise.shrink makes"),
    (at("noise", "mix", to=[]), "noise.mix is not a list of 1 to 20,000"),
    (at("noise", "mix", to=[{"seed": "1", "sigma": 0.1, "coefficient": 1.0}]), "noise.mix[0]"),
    (at("noise", "mix", to=[{"seed": 1, "lambda": 0.1, "coefficient": 1.0}]), "noise.mix[0].seed"),
    (at("noise", "mix", to=[{"seed": "1", "lambda": 0.15, "coefficient": 1.0}]), "a seed beside it"),
    (at("noise", "lambda", to=None), "noise.lambda is not"),
    (at("noise", "lambda", to="0.15"), "noise.lambda is not"),
    (at("noise", "lambda", to=0.2), "lambda is none of those"),
    (at("noise", "rules", to=[["*"]]), "noise.rules[0] is no pair"),
    (at("noise", "rules", to=[[1, 0.5]]), "noise.rules[0].pattern"),
    (at("noise", "rules", to=[["half", None]]), "noise.rules[0].lambda"),
    (at("noise", "include", to=[1]), "noise.include is not a string"),
    (at("noise", "exclude", to="left"), "noise.exclude is not a list"),
    (at("tensors", to={}), '"[" is due'),
    (at("tensors", 0, to=1), "tensors[0] is not an object"),
    (at("tensors", 1, "name", to="w"), "two tensors of one name"),
    (at("tensors", "w", "name", to=1), "tensors[0].name is not a string"),
    (at("tensors", "w", "file", to="model.safetensors"), "tensors[0].file is not one of"),
    (at("tensors", "w", "dtype", to="F128"), "tensors[0].dtype is no dtype"),
    (at("tensors", "w", "dtype", to="I32"), "tensors[0].action is perturb for a dtype"),
    (at("tensors", "w", "shape", to=[6, -5]), "tensors[0].shape is not"),
    (at("tensors", "w", "shape", to=[6.0, 5]), "tensors[0].shape is not"),
    (at("tensors", "w", "shape", to=[True, 5]), "tensors[0].shape is not"),
    (at("tensors", "w", "shape", to=[2**62, 2**62]), "tensors[0]: "),
    (at("tensors", "w", "shape", to=[6000, 5]), "less than its tensors need"),
    (at("tensors", "w", "shape", to=[6, 4]), "totals.parameters"),
    (at("tensors", "w", "shape", to=[1, 1]), "tensors[0].action is perturb for a tensor that has no std"),
    (at("tensors", "w", "action", to="skip"), "tensors[0].action is"),
    (at("tensors", "w", "action", to="copy"), "tensors[0].reason is missing"),
    (at("tensors", "w", "reason", to="excluded"), "tensors[0].reason is given"),
    (at("tensors", "w", "lambda", to=0), "tensors[0].lambda is none of those"),
    (at("tensors", "w", "lambda", to=0.5), "tensors[0].amplitude is not that"),
    (at("tensors", "w", "std", to=None), "tensors[0].std is not a number > 0"),
    (at("tensors", "w", "std", to=0.1), "tensors[0].std is not a float32"),
    (at("tensors", "w", "std", to=0.5), "tensors[0].amplitude is not that"),
    (at("tensors", "w", "std", to=-0.5), "tensors[0].std is negative"),
    (at("tensors", "w", "std", to=1e300), "tensors[0].std is not a float32"),
    (at("tensors", "w", "amplitude", to=0.5), "tensors[0].amplitude is not that"),
    (at("tensors", "w", "amplitude", to=0.1), "tensors[0].amplitude is not a float32"),
    (at("tensors", "w", "amplitude", to=None), "tensors[0].amplitude is not that"),
    (at("tensors", "w", "low", to=0), "tensors[0].low is not that"),
    (at("tensors", "w", "high", to=None), "tensors[0].high is not that"),
    (at("tensors", "w", "noise_std", to=None), 'unknown key "noise_std"'),
    (at("tensors", "w", "unchanged", to=31), "tensors[0].unchanged is more than 30"),
    (at("tensors", "w", "clamped", to=-1), "tensors[0].clamped is not"),
    (at("tensors", "w", "digest", to="sha256:" + "0" * 64), "tensors[0].digest is not"),
    (without("tensors", "w", "source_digest"), "tensors[0].source_digest is missing"),
    (at("tensors", "ids", "reason", to="because"), ".reason is"),
    (at("tensors", "ids", "reason", to="empty"), "is empty, which its dtype and shape are not"),
    (at("tensors", "left", "reason", to="not-float"), "is not-float, which"),
    (at("tensors", "left", "reason", to="constant"), "std does not fit"),
    (at("tensors", "left", "std", to=0.5), "std does not fit"),
    (at("tensors", "constant", "std", to=None), "std does not fit"),
    (at("tensors", "left", "lambda", to=0.15), "is a copy, but"),
    (at("tensors", "left", "unchanged", to=1), "is a copy, but"),
    (at("tensors", "left", "digest", to=D0), "is a copy, but"),
    (swapped("tensors", 4, 5), "not in the order of source.files"),
    (at("copied", 0, "name", to="../x"), "no plain name"),
    (at("copied", 0, "name", to="~/../x"), "no plain name"),
    (at("copied", 0, "name", to="noisytune.json"), "two files of the name"),
    (at("copied", 0, "name", to="sub"), "a folder of that name"),
    (at("copied", 0, "name", to="noisytune.json/x"), "a folder of that name"),
    (at("copied", 0, "name", to="model-00001-of-00002.safetensors"), "two files of the name"),
    (at("copied", 1, "name", to="model.safetensors.index.json"), "two files of the name"),
    (at("copied", 0, "digest", to=None), "copied[0].digest is not a string"),
    (at("copied", 0, "mode", to=7), 'copied[0] has an unknown key "mode"'),
    (at("left_out", 0, "why", to=None), "left_out[0].why is not a string"),
    (at("totals", "tensors", to=11), "totals.tensors"),
    (at("totals", "perturbed", to=0), "totals.perturbed"),
    (at("totals", "bytes", to=1.5), "totals.bytes is not an integer"),
    (without("totals", "bytes"), "totals.bytes is missing"),
    (without("totals"), '"totals"'),
    (without("noise"), 'stands where "noise" is due'),
    (at("extra", to=1), "more members"),
]


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode("utf-8", "surrogatepass"), 1)

    return change


def parts(name: str, change: Callable[[list[Any]], object]) -> Callable[[Any], None]:
    """Change a tensor's list of parts."""
    return lambda document: change(by_name(document["tensors"], name)["parts"])  # type: ignore[func-returns-value]


def runs(name: str, index: int, **fields: int) -> Callable[[Any], None]:
    """Lay a part out in another way, with a shape that fits."""

    def change(document: Any) -> None:
        part = by_name(document["tensors"], name)["parts"][index]
        part.update(fields)
        part["shape"] = [part["length"] * part["repeat"]]

    return change


C, R = ("tensors", "columns", "parts"), ("tensors", "rows", "parts")

PARTS: list[tuple[Callable[[Any], None], str]] = [
    (at("noise", "granularity", to="tensor"), "tensors[0].parts is given for a tensor that has one std"),
    (at("tensors", "columns", "dtype", to="I32"), "tensors[0].parts is given for a tensor that has one std"),
    (at(*C, to={}), "tensors[0].parts is not a list"),
    (at(*C, to=[]), "tensors[0].parts is not a list of 2 to 4,096 parts"),
    (parts("columns", lambda found: found.pop()), "is not a list of 2 to 4,096 parts"),
    (parts("columns", lambda found: found.extend(found * 2500)), "is not a list of 2 to 4,096 parts"),
    (parts("rows", lambda found: found.pop()), "are not all of the tensor"),
    (parts("rows", lambda found: found.reverse()), "do not lie one after the other"),
    (parts("columns", lambda found: found.append(found[1] | {"name": "2"})), "are not all of the tensor"),
    (at(*C, 0, to=1), "tensors[0].parts[0] is not an object"),
    (at(*C, 0, "more", to=1), 'tensors[0].parts[0] has an unknown key "more"'),
    (without(*C, 0, "stride"), "tensors[0].parts[0].stride is missing"),
    (without(*C, 0, "low"), "tensors[0].parts[0].low is missing"),
    (at(*C, 0, "name", to="1"), "has two parts of one name"),
    (at(*C, 0, "name", to=""), "tensors[0].parts[0].name is not made of"),
    (at(*C, 0, "name", to="a..b"), "name is not made of"),
    (at(*C, 0, "name", to="\x1b[2J"), "name is not made of"),
    (at(*C, 0, "name", to="a\n"), "name is not made of"),
    (at(*C, 0, "name", to="a" * 65), "name is not made of"),
    (at(*C, 0, "name", to=0), "name is not a string"),
    (at(*C, 0, "shape", to=[4, 3]), "tensors[0].parts[0].shape is not that of its elements"),
    (at(*C, 0, "shape", to=[4, 2, 1]), "shape is not that of its elements"),
    (at(*C, 0, "shape", to=[-4, -2]), "shape is not a list of integers"),
    (at(*C, 0, "shape", to=[]), "shape is not that of its elements"),
    (at(*C, 0, "first", to=-1), "first is not an integer"),
    (at(*C, 0, "first", to=1), "are not all of the tensor"),
    (at(*C, 0, "first", to=0.0), "first is not an integer"),
    (at(*C, 0, "first", to=2**63), "first is more than 24"),
    (runs("columns", 0, length=0), "has no runs that lie apart"),
    (runs("columns", 0, repeat=0), "has no runs that lie apart"),
    (runs("columns", 0, stride=0), "has no runs that lie apart"),
    (runs("columns", 0, stride=2), "has no runs that lie apart"),
    (runs("columns", 0, stride=7), "are not all of the tensor"),
    (runs("columns", 0, stride=5), "are not all of the tensor"),
    (runs("columns", 0, repeat=3), "are not all of the tensor"),
    (runs("columns", 1, length=3), "are not all of the tensor"),
    (runs("columns", 1, first=1, length=5), "are not all of the tensor"),
    (runs("rows", 0, length=4, stride=4), "are not all of the tensor"),
    (runs("rows", 0, stride=4), "has no runs that lie apart"),
    (runs("rows", 0, length=2**62, stride=2**62), "length is more than 7"),
    (at(*C, 0, "action", to="copy"), "tensors[0].parts[0].reason is missing"),
    (at(*C, 0, "reason", to="constant"), "tensors[0].parts[0].reason is given"),
    (at(*C, 0, "lambda", to=0.2), "tensors[0].parts[0].lambda is none of those"),
    (at(*C, 0, "std", to=0.5), "tensors[0].parts[0].amplitude is not that of lambda and std"),
    (at(*C, 0, "high", to=1.0), "tensors[0].parts[0].high is not that of the amplitude"),
    (at(*C, 0, "unchanged", to=9), "tensors[0].parts[0].unchanged is more than 8"),
    (at(*C, 0, "unchanged", to=3), "tensors[0].unchanged is not what its parts make it"),
    (at(*C, 0, "clamped", to=1), "tensors[0].clamped is not what its parts make it"),
    (at(*R, 1, "reason", to="excluded"), "tensors[1].parts[1].reason is"),
    (at(*R, 1, "reason", to="constant"), "tensors[1].parts[1].std does not fit"),
    (at(*R, 0, "reason", to="one-element"), "tensors[1].parts[0].reason is given"),
    (at(*R, 2, "std", to=1.0), "tensors[1].parts[2].std does not fit"),
    (at("tensors", "columns", "std", to=0.5), "tensors[0].std is not what its parts make it"),
    (at("tensors", "columns", "amplitude", to=0.5), "tensors[0].amplitude is not what its parts make it"),
    (at("tensors", "columns", "low", to=0.5), "tensors[0].low is not what its parts make it"),
    (at("tensors", "columns", "lambda", to=0.3), "tensors[0].lambda is not what its parts make it"),
    (at("tensors", "columns", "unchanged", to=1), "tensors[0].unchanged is not what its parts make it"),
    (at("tensors", "columns", "unchanged", to=False), "tensors[0].unchanged is not what its parts make it"),
    (at("tensors", "columns", "action", to="copy"), "tensors[0].action is not what its parts make it"),
    (at("tensors", "columns", "reason", to="constant"), "tensors[0].reason is not that of its parts"),
    (at("tensors", "still", "reason", to="non-finite"), "tensors[2].reason is not what its parts make it"),
    (at("tensors", "still", "action", to="perturb"), "tensors[2].action is not what its parts make it"),
    (at("tensors", "still", "digest", to=D0), "tensors[2] is a copy"),
    (without("tensors", "still", "reason"), "tensors[2].reason is not that of its parts"),
    (without("tensors", "columns", "parts"), "tensors[0].std is not a number > 0"),
    (at("tensors", "whole", "parts", to=[]), "tensors[3].parts is not a list of 2"),
]

TEXT: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda content: b"", "no JSON object"),
    (lambda content: b"null", "no JSON object"),
    (lambda content: b"[]", "no JSON object"),
    (lambda content: b"{}", 'has no "schema"'),
    (lambda content: content[:-3], "not valid JSON"),
    (lambda content: content[: len(content) // 2], "not valid JSON"),
    (lambda content: content + content, "something follows"),
    (lambda content: content.decode().encode("utf-16"), "not ASCII"),
    (lambda content: b"\xef\xbb\xbf" + content, "not ASCII"),
    (lambda content: b'{"schema": ' + b"[" * 100_000, "nested too deep"),
    (lambda content: b'{"schema": ' + b"9" * 5000 + b"}", "digits, more than 20"),
    (lambda content: b'{"schema": 1' + b" " * 9000 + b'"tool"', '"," is due'),
    (lambda content: b'{"schema" 1}', "no colon"),
    (lambda content: b'{"schema": 1, "tool": [' + b"[]," * 5_000_000 + b"[]]}", "not valid JSON"),
    (replaced('"schema": 1,', '"schema": 1, "schema": 1,'), 'stands where "tool" is due'),
    (replaced('"revision": null', '"revision": null, "revision": null'), 'key "revision" twice'),
    (replaced('"revision": null', '"revision": null, "\\u0072evision": null'), 'key "revision" twice'),
    (replaced('"lambda": 0.15', '"lambda": NaN'), "NaN, which is no number"),
    (replaced('"lambda": 0.15', '"lambda": Infinity'), "Infinity, which is no number"),
    (replaced('"lambda": 0.15', '"lambda": 1e999'), "too large"),
    (replaced('"clamped": 0', '"clamped": -0'), "-0 for an integer"),
    (replaced('"id": "in"', '"id": "i\nn"'), "not valid JSON"),
    (replaced('"id": "in"', '"id": "é"'), "not ASCII"),
    (replaced('"tensors": [', '"tensors": [,'), "not valid JSON"),
    (replaced('"why": "optimizer and trainer state"}', '"why": ""} {}'), "no comma"),
]
