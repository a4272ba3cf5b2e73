"""Mutations that know what they mutate: JSON documents by member, pickles by opcode, any bytes by stretch.

Random bytes are refused at the first check; what finds faults is a valid document with a few things wrong. A
JSON object is held as a list of pairs, so that a key can be given twice, and numbers as they are spelt, so
that `-0` and `1e999` survive.
"""

from __future__ import annotations

import json
import pickletools
from typing import Any

from hypothesis import strategies as st


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object, its keys in order and perhaps given twice."""


#: Values to put where another was.
VALUES = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, 1, 2, 4, 8, 16, -1, 255, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1),
            *(2**63, 2**64 - 1, 2**64, 1.5, 1e308, Raw("-0"), Raw("1e999"), Raw("NaN"), Raw("04")),
            *("", "a", "b", "F32", "I8", "F128", "U8", "0", "\ud800", "\0", "\x1b[2J", "../x", "/etc/x"),
            *("__metadata__", "model-00001-of-00002.safetensors", "x.safetensors", "\u202e", "[red]"),
            *("x" * 300, "é\U0001f600", Raw("9" * 5000), Raw("[" * 60 + "]" * 60)),
            *(Raw("[" * 5000 + "]" * 5000), Raw("nul"), Raw("/**/1"), Raw("")),
        ]
    ),
    st.builds(list),
    st.builds(Pairs),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(0, 20), max_size=4),
)

#: How many mutations: few enough that some documents stay valid. As everywhere here, what hypothesis tries
#: first comes first: the document as it is.
_FEW = st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4])

_SPACES = st.sampled_from(["", "", "", " ", "\n", "\t\r\n  "])


def held(value: Any) -> Any:
    """A JSON value with its objects as pairs, for mutation."""
    if isinstance(value, dict):
        return Pairs((key, held(item)) for key, item in value.items())
    return [held(item) for item in value] if isinstance(value, list) else value


def spelt(value: Any, space: str = "") -> str:
    """The JSON text of a held value, with white space between tokens."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        members = (f"{json.dumps(key)}{space}:{space}{spelt(item, space)}" for key, item in value)
        return "{" + f",{space}".join(members) + "}"
    if isinstance(value, list):
        return "[" + f"{space},".join(spelt(item, space) for item in value) + "]"
    return json.dumps(value)


def _containers(value: Any) -> list[Any]:
    found = [value] if isinstance(value, list) else []
    for item in value if isinstance(value, list) else ():
        found += _containers(item[1] if isinstance(value, Pairs) else item)
    return found


@st.composite
def json_texts(draw: st.DrawFn, document: Any) -> bytes:
    """The text of `document` with a few members changed, taken out, given twice, renamed or moved."""
    root = held(document)
    for _ in range(draw(_FEW)):
        _mutate(draw, root)
    text = spelt(root, draw(_SPACES)).encode("utf-8", "surrogatepass")
    return draw(stretched(text)) if draw(st.integers(0, 3)) == 3 else text


def _mutate(draw: st.DrawFn, root: Any) -> None:
    place = draw(st.sampled_from(_containers(root)))
    if not place:
        place.append(("a", draw(VALUES)) if isinstance(place, Pairs) else draw(VALUES))
        return
    at = draw(st.integers(0, len(place) - 1))
    kind = draw(st.sampled_from(["change", "change", "remove", "repeat", "rename", "move", "wrap"]))
    if kind == "remove":
        del place[at]
    elif kind == "repeat":
        place.insert(draw(st.integers(0, len(place))), place[at])
    elif kind == "move":
        place.append(place.pop(at))
    elif isinstance(place, Pairs):
        key, value = place[at]
        if kind == "rename":
            key = draw(st.one_of(st.sampled_from([other for other, _ in place]), st.text(max_size=6)))
        else:
            value = draw(VALUES) if kind == "change" else [value]
        place[at] = key, value
    else:
        place[at] = draw(VALUES) if kind == "change" else [place[at]]


@st.composite
def stretched(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a few stretches of bytes flipped, cut out, given twice, put in or cut off."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(out)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 40]))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "repeat", "put", "end"]))
        if kind == "flip" and at < len(out):
            out[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del out[at : at + length]
        elif kind == "repeat":
            out[at:at] = out[at : at + length]
        elif kind == "put":
            out[at:at] = draw(
                st.one_of(st.binary(max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b'{"', b"\\"]))
            )
        elif kind == "end":
            del out[at:]
    return bytes(out)


#: Opcodes to put among others: calls, globals, memos that are not there, lengths without the bytes.
HOSTILE_OPCODES = (
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ccollections\nOrderedDict\n", b"cbuiltins\nbytearray\n", b"ctorch\nSize\n"),
    *(b"ctorch\nFloatStorage\n", b"Pid\n", b"ios\nsystem\n", b"V\\ud800\n"),
    *(bytes([opcode]) for opcode in b"RbQ(t012aesudlo.)]}N\x81\x85\x86\x87\x8f\x90\x91\x92\x93\x94"),
    *(b"h\x00", b"h\xff", b"j\xff\xff\xff\xff", b"q\x00", b"r\xff\xff\xff\x7f", b"K\x00", b"M\xff\xff"),
    *(b"J\xff\xff\xff\xff", b"X\x01\x00\x00\x00w", b"X\xff\xff\xff\xff", b"U\x02os", b"\x8a\xff"),
    *(b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"G\x7f\xf8" + bytes(6), b"\x80\x05", b"\x95" + bytes(8)),
)


@st.composite
def pickles(draw: st.DrawFn, content: bytes) -> bytes:
    """A pickle with a few opcodes taken out, given twice, moved, or put in between."""
    places = [position for _, _, position in pickletools.genops(content)]
    ends = [*places[1:], len(content)]
    opcodes = [content[start:end] for start, end in zip(places, ends, strict=True)]
    for _ in range(draw(_FEW)):
        at = draw(st.integers(0, len(opcodes) - 1))
        kind = draw(st.sampled_from(["put", "put", "replace", "remove", "repeat", "move", "argument"]))
        if kind == "put":
            opcodes.insert(at, draw(st.sampled_from(HOSTILE_OPCODES)))
        elif kind == "replace":
            opcodes[at] = draw(st.sampled_from(HOSTILE_OPCODES))
        elif kind == "remove" and len(opcodes) > 1:
            del opcodes[at]
        elif kind == "repeat":
            opcodes[at] *= draw(st.integers(2, 5))
        elif kind == "move":
            opcodes.append(opcodes.pop(at))
        elif kind == "argument":
            opcodes[at] = opcodes[at][:1] + draw(stretched(opcodes[at][1:]))
    return b"".join(opcodes)
