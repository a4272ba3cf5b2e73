"""More safetensors files that are wrong: what malformed.py has not, found by asking what a reader assumes.

Other files under the suffix, lengths at the edges of u64, JSON that some parsers forgive, dtypes and shapes a
character off, arithmetic that wraps in 32 or 64 bits, and headers that are valid but cost too much to read.
"""

from __future__ import annotations

import bz2
import io
import json
import lzma
import sqlite3
import struct
import tarfile
import zlib

from malformed import DATA, ENTRY, HEADER, Case, crowd, frame, headed, named, one, two


def tar() -> bytes:
    """A tar archive that holds a valid safetensors file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        content = frame(HEADER)
        info = tarfile.TarInfo("model.safetensors")
        info.size = len(content)
        packed.addfile(info, io.BytesIO(content))
    return out.getvalue()


def database() -> bytes:
    """An SQLite database."""
    connection = sqlite3.connect(":memory:")
    connection.execute("create table weights (name text)")
    content = connection.serialize()
    connection.close()
    return content


def many_dimensions() -> bytes:
    """A header of 250 tensors with 30,000 dimensions each: little text, millions of numbers."""
    shape = ",".join(["1"] * 30_000)
    entries = ",".join(
        f'"t{i}":{{"dtype":"U8","shape":[{shape}],"data_offsets":[{i},{i + 1}]}}' for i in range(250)
    )
    return frame("{" + entries + "}", bytes(250))


def many_keys() -> bytes:
    """A header whose metadata have more keys than a file has tensors."""
    return frame('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(130_000)) + "}}", b"")


OTHER_FILES = (
    Case("bzip2", lambda: bz2.compress(frame(HEADER)), ("limit",)),
    Case("xz", lambda: lzma.compress(frame(HEADER)), ("limit",)),
    Case("zlib", lambda: zlib.compress(frame(HEADER)), ("limit",)),
    Case("tar", tar, ("it is a tar archive",)),
    Case("SQLite", database, ("limit",)),
    Case("ELF", lambda: b"\x7fELF\x02\x01\x01" + bytes(57), ("limit",)),
    Case("PNG", lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), ("limit",)),
    Case("PDF", lambda: b"%PDF-1.7\n" + bytes(99), ("limit",)),
    Case("Python source", lambda: b"import os\nos.system('true')\n" * 9, ("it is text",)),
    Case("ONNX", lambda: b"\x08\x07\x12\x07pytorch\x1a\x05" + bytes(99), ("limit",)),
    Case("MessagePack", lambda: b"\x81\xa6params\x81\xa1w\xc7" + bytes(99), ("limit",)),
    Case("header without its length", lambda: HEADER.encode() + DATA, ("JSON document",)),
    Case("zeros", lambda: bytes(4096), ("it is zeros",)),
    Case("ones", lambda: b"\xff" * 4096, ("limit",)),
    Case(
        "line ends turned to CRLF",
        lambda: frame(HEADER, b"\r\n" * 8)[:8] + b"\r\n" + HEADER.encode() + DATA,
        ("brace",),
    ),
)

LENGTHS = (
    Case("N is 2^64 - 1", lambda: frame(HEADER, length=2**64 - 1), ("18,446,744,073,709,551,615", "limit")),
    Case("N wraps around to the header", lambda: frame(HEADER, length=2**64 - 8), ("limit",)),
    Case("N is 1", lambda: frame(HEADER, length=1), ("not valid JSON",)),
    Case(
        "N of 32 bits, data after it",
        lambda: struct.pack("<I", len(HEADER)) + HEADER.encode() + DATA,
        ("limit",),
    ),
    Case(
        "N up to the last byte",
        lambda: frame(HEADER, length=len(HEADER) + len(DATA)),
        ("follows the closing",),
    ),
    Case(
        "N one beyond the file",
        lambda: frame(HEADER, length=len(HEADER) + len(DATA) + 1),
        ("whole file has",),
    ),
    Case("N counts itself", lambda: frame(HEADER, length=len(HEADER) + 8), ("follows the closing brace",)),
    Case("eight bytes", lambda: struct.pack("<Q", 2), ("whole file has 8",)),
    Case("a brace alone, said to be two", lambda: struct.pack("<Q", 2) + b"{", ("whole file has 9",)),
    Case(
        "a header over the limit",
        lambda: frame(HEADER.ljust((16 << 20) + 1)),
        ("16,777,217", "limit"),
        lax=True,
    ),
)

TEXT = (
    Case("UTF-32", headed(HEADER.encode("utf-32-le")), ("not valid JSON",)),
    Case("a leading tab", headed("\t" + HEADER), ("brace",), lax=True),
    Case("a leading NUL", headed("\0" + HEADER), ("brace",)),
    Case("a trailing line break and more", headed(HEADER + "\n[]"), ("follows the closing brace",)),
    Case("a byte-order mark after the brace", headed("{\ufeff" + HEADER[1:]), ("not a string",)),
    Case("a no-break space", headed("{\u00a0" + HEADER[1:]), ("not a string",)),
    Case("a vertical tab", headed("{\v" + HEADER[1:]), ("not a string",)),
    Case("a number for a key", headed("{1:" + ENTRY + "}"), ("not a string",)),
    Case("null for a key", headed("{null:" + ENTRY + "}"), ("not a string",)),
    Case("no key", headed("{" + ENTRY + "}"), ("not a string",)),
    Case("a key without a value", headed('{"a":}'), ("not an object",), "a"),
    Case("two colons", headed('{"a"::' + ENTRY + "}"), ("not an object",), "a"),
    Case("two commas", headed(HEADER[:-1] + ',,"b":1}'), ("not a string",)),
    Case("a semicolon", headed(HEADER[:-1] + ';"b":1}'), ("neither a comma",)),
    Case("a bracket for the closing brace", headed(HEADER[:-1] + "]"), ("neither a comma",)),
    Case("a short escape", named("\\u12"), ("not valid JSON",)),
    Case("a NUL in a name", named("a\0b"), ("not valid JSON",)),
    Case("an ESC in a name", named("\x1b[2J"), ("not valid JSON",)),
    Case(
        "UTF-8 beyond Unicode", headed(HEADER.encode().replace(b'"a"', b'"\xf4\x90\x80\x80"')), ("not UTF-8",)
    ),
    Case("UTF-8 cut off", headed(HEADER.encode().replace(b'"a"', b'"\xe2\x82"')), ("not UTF-8",)),
    Case("a high surrogate before a letter", named("\\ud83dx"), ("surrogate",)),
    Case("JSON lines", headed(HEADER + "\n" + HEADER), ("follows the closing brace",)),
    Case("an entry in an entry", headed('{"a":{"b":' + ENTRY + "}}"), ("an object in it",), "a"),
    Case("an entry as a JSON string", headed('{"a":' + json.dumps(ENTRY) + "}"), ("not an object",), "a"),
)

FIELDS = (
    Case("an empty dtype", one(dtype='""'), ("does not have",), "a"),
    Case("dtype with a space", one(dtype='"F32 "'), ("does not have",), "a"),
    Case("dtype with a NUL", one(dtype='"F32\\u0000"'), ("does not have",), "a"),
    Case("dtype as NumPy spells it", one(dtype='"<f4"'), ("does not have",), "a"),
    Case("dtype as torch spells it", one(dtype='"torch.float32"'), ("does not have",), "a"),
    Case("dtype of a fullwidth F", one(dtype='"Ｆ32"'), ("does not have",), "a"),
    Case("dtype as a list", one(dtype='["F32"]'), ("not a string",), "a"),
    Case("dtype of a million letters", one(dtype='"' + "F" * 1_000_000 + '"'), ("longer than",), "a"),
    Case("dtype with an escape sequence", one(dtype='"\\u001b]0;owned\\u0007"'), ("does not have",), "a"),
    Case(
        "key in capitals",
        headed('{"a":{"DTYPE":"F32","shape":[4],"data_offsets":[0,16]}}'),
        ("no dtype",),
        "a",
    ),
    Case("shape with null", one("[4,null]"), ("its shape",), "a"),
    Case("shape with a list at its end", one("[4,[]]"), ("its shape",), "a"),
    Case("shape 2^63", one("[9223372036854775808]"), ("its shape",), "a"),
    Case("shape 1e400", one("[1e400]"), ("not an integer",), "a"),
    Case("shape Infinity", one("[Infinity]"), ("Infinity",), "a"),
    Case("shape of 21 digits", one("[" + "1" * 21 + "]"), ("21 digits",), "a"),
    Case("shape with a minus alone", one("[-]"), ("not valid JSON",), "a"),
    Case("shape with Arabic digits", one("[\u0664]"), ("not valid JSON",), "a"),
    Case("shape with an underscore", one("[1_0]"), ("not valid JSON",), "a"),
    Case("offsets as text", one(offsets='["0","16"]'), ("two integers",), "a"),
    Case("offsets null", one(offsets="null"), ("two integers",), "a"),
    Case("offsets empty", one(offsets="[]"), ("two integers",), "a"),
    Case("offsets nested", one(offsets="[[0,16]]"), ("two integers",), "a"),
    Case("offsets -0", one(offsets="[-0,16]"), ("-0",), "a"),
    Case("offsets 2^64", one(offsets="[0,18446744073709551616]"), ("two integers",), "a"),
    Case("metadata as a string", headed('{"__metadata__":"pt",' + HEADER[1:]), ("brace",)),
    Case("metadata as a number", headed('{"__metadata__":1,' + HEADER[1:]), ("brace",)),
    Case("metadata that are a tensor", headed('{"__metadata__":' + ENTRY + "}"), ("not a string",)),
    Case("metadata with a list", headed('{"__metadata__":{"k":["v"]},' + HEADER[1:]), ("not a string",)),
    Case(
        "metadata twice, spelt apart",
        headed('{"__metadata__":{},"\\u005f_metadata__":{},' + HEADER[1:]),
        ("__metadata__", "twice"),
    ),
    Case("metadata of nulls", headed('{"__metadata__":nullnull,' + HEADER[1:]), ("neither a comma",)),
)

SUMS = (
    Case("bytes that wrap at 2^64", one("[4611686018427387905,4]"), ("more than 2^63",), "a"),
    Case("elements that wrap at 2^32", one("[65536,65537]", "[0,262144]"), ("hold 262,144 bytes",), "a"),
    Case("a scalar with four bytes more", one("[]", "[0,8]", data=bytes(8)), ("hold 8 bytes",), "a"),
    Case("an empty tensor with bytes", one("[0]"), ("hold 16 bytes",), "a"),
    Case("no tensor, but data", headed("{}"), ("16 bytes after its last tensor",)),
    Case("a hole after the first byte", two("[0,1]", "[2,3]", "[1]"), ("1 bytes before its data",), "b"),
    Case("one byte shared", two("[0,8]", "[7,15]"), ("overlap",), "b"),
    Case(
        "one inside the other",
        headed(
            '{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},'
            '"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'
        ),
        ("overlap",),
        "b",
    ),
    Case("the second where the first should be", two("[8,16]", "[16,24]"), ("8 bytes before its data",), "a"),
    Case("a terabyte that is not there", one("[1099511627776]", "[0,4398046511104]"), ("truncated",)),
    Case("three quarters of a byte", one("[1]", "[0,1]", '"F6_E2M3"', bytes(1)), ("6 bits",), "a"),
)

COSTLY = (
    Case("130,000 empty tensors", lambda: crowd(130_000), ("more than 120,000 entries",), lax=True),
    Case("130,000 keys of metadata", many_keys, ("more than 120,000 entries",), lax=True),
    Case("millions of dimensions", many_dimensions, ("more than 1,000,000 numbers",), "t33", lax=True),
    Case("a name of 8 million quotes", named('\\"' * 8_000_000 + "\\"), ("not valid JSON",)),
    Case("8 million braces in a name that does not end", headed('{"' + "{" * 8_000_000), ("not valid JSON",)),
    Case(
        "a wide name of 16 MB",
        headed('{"\U0001f600' + "a" * 16_700_000 + '":1}'),
        ("not an object",),
        "\U0001f600" + "a" * 16_700_000,
    ),
)

MORE = OTHER_FILES + LENGTHS + TEXT + FIELDS + SUMS + COSTLY
