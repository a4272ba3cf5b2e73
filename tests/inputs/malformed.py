"""Weight files that are wrong, odd, or only look wrong, each with the verdict it must get.

One table, one row a file: what it is called, how its bytes are made, whether it is refused, and what the
error line says. Rows hold builders, not bytes, so that the table costs nothing to import. `lax` marks what
the safetensors package takes although noisytune refuses it; the tests hold both verdicts against the
package itself (None: not asked, it takes too long). A format adds its rows in a tuple of its own and joins
`CASES`.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

DATA = bytes(16)
ENTRY = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
HEADER = '{"a":' + ENTRY + "}"


@dataclass(frozen=True)
class Case:
    """A file to refuse, with words of its error line; or, without words, one to accept."""

    name: str
    build: Callable[[], bytes]
    words: tuple[str, ...] = ()
    tensor: str | None = None
    lax: bool | None = False
    suffix: str = ".safetensors"

    @property
    def refused(self) -> bool:
        return bool(self.words)


def frame(header: str | bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file with this header and data; `length` is what N says where that is not the truth."""
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(
    shape: str = "[4]", offsets: str = "[0,16]", dtype: str = '"F32"', data: bytes = DATA, extra: str = ""
) -> Callable[[], bytes]:
    """Build a file with one tensor `a`, its fields as written."""
    return lambda: frame(f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{extra}}}}}', data)


def two(first: str, second: str, shape: str = "[8]") -> Callable[[], bytes]:
    """Build a file with U8 tensors `a` and `b` of this shape at these offsets."""
    entry = '{"dtype":"U8","shape":' + shape + ',"data_offsets":'
    return headed('{"a":' + entry + first + '},"b":' + entry + second + "}}")


def headed(header: str | bytes, data: bytes = DATA) -> Callable[[], bytes]:
    """Build a file with this header."""
    return lambda: frame(header, data)


def named(name: str) -> Callable[[], bytes]:
    """Build a file whose one tensor has this name, spelt as JSON."""
    return headed('{"' + name + '":' + ENTRY + "}")


def archive() -> bytes:
    """A small ZIP, as torch.save writes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps({}))
    return out.getvalue()


def crowd(count: int) -> bytes:
    """A file of `count` empty tensors."""
    entries = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return frame("{" + entries + "}", b"")


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4400000000\n"

FRAMING = (
    Case("empty file", lambda: b"", ("it is empty",)),
    Case("seven bytes", lambda: bytes(7), ("only 7 bytes",)),
    Case("N is 0", lambda: frame("", DATA), ("header has 0 bytes",)),
    Case("N is 2^63", lambda: frame(HEADER, length=2**63), ("9,223,372,036,854,775,808", "limit")),
    Case("N over the limit", lambda: frame(HEADER, length=100_000_001), ("100,000,001", "limit")),
    Case("N beyond the file", lambda: frame(HEADER, length=1000), ("1,000 bytes", "whole file has")),
    Case("N big-endian", lambda: struct.pack(">Q", len(HEADER)) + HEADER.encode() + DATA, ("limit",)),
    Case("N one short", lambda: frame(HEADER, length=len(HEADER) - 1), ("not valid JSON",)),
    Case("N one long", lambda: frame(HEADER, length=len(HEADER) + 1), ("follows the closing brace",)),
    Case("data one byte short", headed(HEADER, DATA[1:]), ("truncated: 1 bytes",)),
    Case("data one byte long", headed(HEADER, DATA + b"\0"), ("1 bytes after its last tensor",)),
    Case("header alone", headed(HEADER, b""), ("truncated: 16 bytes",)),
    Case("a ZIP appended", lambda: frame(HEADER, DATA + archive()), ("after its last tensor",)),
    Case("HTML page", lambda: b"<!DOCTYPE html><html><body>Sign in</body></html>", ("HTML page", "Download")),
    Case("HTML page indented", lambda: b"\n\n  <HTML lang=en>" + bytes(99), ("HTML page",)),
    Case("XML error", lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ("XML",)),
    Case("JSON error", lambda: b'{"error":"Repository not found"}', ("JSON document",)),
    Case("git-LFS pointer", lambda: _POINTER, ("git-LFS pointer", "git lfs pull")),
    Case("pickle", lambda: pickle.dumps({"a": [0.0] * 99}, protocol=2), ("Python pickle",)),
    Case("ZIP", archive, ("ZIP archive", "torch.save")),
    Case("GGUF", lambda: b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(99), ("GGUF",)),
    Case("gzip", lambda: gzip.compress(frame(HEADER), mtime=0), ("gzip", "gunzip")),
    Case("HDF5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), ("HDF5",)),
    Case("NumPy array", lambda: b"\x93NUMPY\x01\x00" + bytes(99), ("NumPy",)),
    Case("Zstandard", lambda: b"\x28\xb5\x2f\xfd" + bytes(99), ("Zstandard",)),
)

JSON = (
    Case("byte FF in a name", headed(HEADER.encode().replace(b'"a"', b'"\xff"')), ("not UTF-8",)),
    Case("overlong UTF-8", headed(HEADER.encode().replace(b'"a"', b'"\xc0\x80"')), ("not UTF-8",)),
    Case("UTF-16 with a mark", headed(HEADER.encode("utf-16")), ("brace",)),
    Case("UTF-16", headed(HEADER.encode("utf-16-le")), ("not valid JSON",)),
    Case("UTF-8 with a mark", headed("\ufeff" + HEADER), ("brace",)),
    Case(
        "saved with empty metadata by safetensors 0.8",
        headed('{},"__metadata__":{}}'),
        ("follows the closing",),
    ),
    Case("two documents", headed(HEADER + HEADER), ("follows the closing brace",)),
    Case("null", headed("null"), ("brace",)),
    Case("a list", headed("[]"), ("brace",)),
    Case("a string", headed('"a"'), ("brace",)),
    Case("a comment", headed(HEADER[:-1] + "/* F32 */}"), ("not valid JSON",)),
    Case("a trailing comma", headed(HEADER[:-1] + ",}"), ("not a string",)),
    Case("single quotes", headed(HEADER.replace('"', "'")), ("not a string",)),
    Case("no colon", headed('{"a" ' + ENTRY + "}"), ("no colon",)),
    Case("an open brace", headed("{"), ("not valid JSON",)),
    Case("an open string", headed('{"a'), ("not valid JSON", "Unterminated")),
    Case("an open entry", headed('{"a":{"dtype":"F32"'), ("ends within its entry",), "a"),
    Case("a bad escape", named("\\x41"), ("not valid JSON",)),
    Case("a raw line break in a name", named("a\nb"), ("not valid JSON",)),
    Case("NUL as padding", headed(HEADER + "\0"), ("follows the closing brace",)),
    Case("100,000 brackets", headed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), ("not an object",), "a"),
    Case("60,000 brackets in a shape", one("[" * 30_000 + "]" * 30_000), ("nested too deep",), "a"),
    Case("100,000 braces", headed('{"a":' * 100_000 + "}" * 100_000), ("longer than",), "a"),
    Case("a lone surrogate", named("\\ud800"), ("surrogate",)),
    Case("surrogates the wrong way round", named("\\ude00\\ud83d"), ("surrogate",)),
    Case("an encoded surrogate", headed('{"\ud800":' + ENTRY + "}"), ("not UTF-8",)),
    Case(
        "a lone surrogate in metadata",
        headed('{"__metadata__":{"k":"\\udfff"},' + HEADER[1:]),
        ("surrogate",),
    ),
)

SCHEMA = (
    Case("shape twice", one(extra=',"shape":[4]'), ('"shape" twice',), "a"),
    Case("shape twice, differently spelt", one(extra=',"sh\\u0061pe":[4]'), ('"shape" twice',), "a"),
    Case(
        "a number in metadata", headed('{"__metadata__":{"step":7},' + HEADER[1:]), ('"step"', "not a string")
    ),
    Case("an object in metadata", headed('{"__metadata__":{"k":{}},' + HEADER[1:]), ('"k"', "not a string")),
    Case("null in metadata", headed('{"__metadata__":{"k":null},' + HEADER[1:]), ('"k"', "not a string")),
    Case("metadata as a list", headed('{"__metadata__":[],' + HEADER[1:]), ("__metadata__", "brace")),
    Case(
        "metadata twice",
        headed('{"__metadata__":{},"__metadata__":{},' + HEADER[1:]),
        ("__metadata__", "twice"),
    ),
    Case(
        "metadata key twice",
        headed('{"__metadata__":{"k":"","k":""},' + HEADER[1:]),
        ('"k" twice',),
        lax=True,
    ),
    Case("no dtype", headed('{"a":{"shape":[4],"data_offsets":[0,16]}}'), ("no dtype",), "a"),
    Case("no shape", headed('{"a":{"dtype":"F32","data_offsets":[0,16]}}'), ("no shape",), "a"),
    Case("no offsets", headed('{"a":{"dtype":"F32","shape":[4]}}'), ("no data_offsets",), "a"),
    Case("empty entry", headed('{"a":{}}'), ("no dtype",), "a"),
    Case("entry is null", headed('{"a":null}'), ("not an object",), "a"),
    Case("entry is a string", headed('{"a":"F32"}'), ("not an object",), "a"),
    Case("dtype F128", one(dtype='"F128"'), ('"F128"', "does not have"), "a"),
    Case("dtype in lower case", one(dtype='"f32"'), ('"f32"',), "a"),
    Case("dtype is a number", one(dtype="32"), ("not a string",), "a"),
    Case("dtype is null", one(dtype="null"), ("not a string",), "a"),
    Case("shape -4", one("[-4]"), ("its shape",), "a"),
    Case("shape is text", one('["4"]'), ("its shape",), "a"),
    Case("shape is a number", one("4"), ("its shape",), "a"),
    Case("shape is null", one("null"), ("its shape",), "a"),
    Case("shape is nested", one("[[4]]"), ("its shape",), "a"),
    Case("shape true", one("[true,4]"), ("its shape",), "a"),
    Case("shape 4.0", one("[4.0]"), ("4.0", "not an integer"), "a"),
    Case("shape 4e0", one("[4e0]"), ("4e0", "not an integer"), "a"),
    Case("shape 04", one("[04]"), ("not valid JSON",), "a"),
    Case("shape +4", one("[+4]"), ("not valid JSON",), "a"),
    Case("shape 0x4", one("[0x4]"), ("not valid JSON",), "a"),
    Case("shape 2^64", one("[18446744073709551616]"), ("its shape",), "a"),
    Case("shape -0", one("[-0]", "[0,0]", data=b""), ("-0",), "a"),
    Case("shape NaN", one("[NaN]"), ("NaN",), "a"),
    Case("shape -Infinity", one("[-Infinity]"), ("-Infinity",), "a"),
    Case("shape of 5,000 digits", one("[" + "9" * 5000 + "]"), ("5,000 digits",), "a"),
    Case("one offset", one(offsets="[0]"), ("two integers",), "a"),
    Case("three offsets", one(offsets="[0,16,16]"), ("two integers",), "a"),
    Case("offsets as an object", one(offsets='{"begin":0,"end":16}'), ("an object in it",), "a"),
    Case("offsets are floats", one(offsets="[0.0,16.0]"), ("not an integer",), "a"),
    Case("offset false", one(offsets="[false,16]"), ("two integers",), "a"),
)

ARITHMETIC = (
    Case("shape [2^32, 2^32]", one("[4294967296,4294967296]"), ("more than 2^63",), "a"),
    Case("shape [2^63, 4, 0]", one("[9223372036854775808,4,0]", "[0,0]", data=b""), ("its shape",), "a"),
    Case("shape [2^62, 4, 0]", one("[4611686018427387904,4,0]", "[0,0]", data=b""), ("2^63",), "a"),
    Case("shape [0, 2^62, 4]", one("[0,4611686018427387904,4]", "[0,0]", data=b""), ("2^63",), "a", lax=True),
    Case("shape [5]", one("[5]"), ("hold 16 bytes", "shape 20"), "a"),
    Case("shape [3]", one("[3]"), ("hold 16 bytes", "shape 12"), "a"),
    Case("shape [5], offsets too", one("[5]", "[0,20]"), ("truncated: 4 bytes",)),
    Case("shape [3], offsets too", one("[3]", "[0,12]"), ("4 bytes after its last tensor",)),
    Case("offsets negative", one(offsets="[-16,0]"), ("two integers",), "a"),
    Case("offsets past the end", one(offsets="[16,32]"), ("16 bytes before its data",), "a"),
    Case("offsets in reverse", one(offsets="[16,0]"), ("backwards",), "a"),
    Case("offsets near 2^64", one(offsets=f"[{2**64 - 16},{2**64 - 1}]"), ("two integers",), "a"),
    Case("a hole between", two("[0,8]", "[12,16]"), ("hold 4 bytes",), "b"),
    Case("a hole between, sizes right", two("[0,6]", "[10,16]", "[6]"), ("4 bytes before its data",), "b"),
    Case("a hole before", one("[2]", "[8,16]"), ("8 bytes before its data",), "a"),
    Case("overlap", two("[0,8]", "[4,12]"), ("overlap",), "b"),
    Case("the same bytes twice", two("[0,8]", "[0,8]"), ("overlap",), "b"),
    Case("an empty tensor inside another", one(extra='},"b":{"dtype":"U8","shape":[0],"data_offsets":[8,8]'),
         ("overlap",), "b"),
    Case("an empty tensor past the end", one(extra='},"b":{"dtype":"U8","shape":[0],"data_offsets":[20,20]'),
         ("4 bytes before its data",), "b"),
    Case("half a byte", one("[31]", dtype='"F4"'), ("124 bits",), "a"),
)  # fmt: skip

STRICTER = (
    Case("a name twice", headed('{"a":' + ENTRY + "," + HEADER[1:]), ('"a" twice',), lax=True),
    Case(
        "a name twice, spelt apart",
        headed('{"\\u0061":' + ENTRY + "," + HEADER[1:]),
        ('"a" twice',),
        lax=True,
    ),
    Case("a leading space", headed(" " + HEADER), ("brace",), lax=True),
    Case("a leading line break", headed("\n" + HEADER), ("brace",), lax=True),
    Case("a positional entry", headed('{"a":["F32",[4],[0,16]]}'), ("not an object",), "a", lax=True),
    Case("an object in an entry", one(extra=',"note":{"bits":4}'), ("an object in it",), "a", lax=True),
    Case("a fraction in an entry", one(extra=',"note":4.5'), ("4.5", "not an integer"), "a", lax=True),
    Case("-0 in an entry", one(extra=',"note":-0'), ("-0",), "a", lax=True),
    Case("1.5 million empty tensors", lambda: crowd(1_500_000), ("header has", "limit"), lax=None),
)

ODD = (
    Case("plain", headed(HEADER)),
    Case("trailing spaces", headed(HEADER + "     ")),
    Case("spaces between", headed('{ "a" :\r\n\t' + ENTRY.replace(",", " , ") + " }")),
    Case("a scalar", one("[]", "[0,4]", data=bytes(4))),
    Case("shape [0]", one("[0]", "[0,0]", data=b"")),
    Case("an empty tensor at each end", headed(
        '{"z":{"dtype":"F32","shape":[0],"data_offsets":[16,16]},'
        '"b":{"dtype":"F32","shape":[3,0],"data_offsets":[0,0]},' + HEADER[1:])),
    Case("keys out of order", headed('{"a":{"data_offsets":[0,16],"shape":[4],"dtype":"F32"}}')),
    Case("tensors out of order", two("[8,16]", "[0,8]")),
    Case("an unaligned F64", headed(
        '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
        '"b":{"dtype":"F64","shape":[1],"data_offsets":[8,16]}}   ')),
    Case("NaN and Inf", headed(HEADER, struct.pack("<4f", float("nan"), float("inf"), float("-inf"), 0))),
    Case("BOOL byte 2", one("[16]", dtype='"BOOL"', data=bytes([2]) * 16)),
    Case("F4", one("[32]", dtype='"F4"')),
    Case("F6", one("[4]", "[0,3]", '"F6_E2M3"', bytes(3))),
    Case("a field the format does not have", one(extra=',"note":[1,"x",null]')),
    Case("braces in fields the format does not have", one(extra=',"{":"}","}{":["\\\\","\\"}"]')),
    Case("no tensors", headed("{}", b"")),
    Case("metadata alone", headed('{"__metadata__":{"format":"pt"}}', b"")),
    Case("metadata null, as MLX writes", headed('{"__metadata__":null,' + HEADER[1:])),
    Case("metadata last", headed(HEADER[:-1] + ',"__metadata__":{"k":"{,[:\\"}"}}')),
    Case("a name that is empty", named("")),
    Case("a name with NUL", named("a\\u0000b")),
    Case("a name that clears the screen", named("\\u001b[2J")),
    Case("a name with a false OK", named("a\\nOK: perturbed")),
    Case("a name that turns the line", named("\u202eabc")),
    Case("a name that is a path", named("../../etc/passwd")),
    Case("a name of braces and quotes", named('}{\\"},{\\\\')),
    Case("a name of a surrogate pair", named("\\ud83d\\ude00")),
    Case("a name of 100,000 letters", named("a" * 100_000)),
    Case("N = 640, as a pickle begins", lambda: frame(HEADER.ljust(640), DATA)),
)  # fmt: skip

CASES = FRAMING + JSON + SCHEMA + ARITHMETIC + STRICTER + ODD
