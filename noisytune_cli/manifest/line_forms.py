"""The form in which noisytune writes an entry of a manifest: one line, as a regular expression.

A line that matches is valid JSON in ASCII, has every key once and no number that JSON's reader would refuse.
The quantifiers are possessive, so that a line is looked at once, whatever is in it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from typing import get_args

from noisytune_cli.dtypes import ALL_DTYPES, stored_bytes
from noisytune_cli.manifest.fields import SURROGATE
from noisytune_cli.records import ToldBy

#: The longest line that is read by its form, its parts not counted.
LONGEST_LINE = 1 << 15

#: A dtype, a shape, its elements and its bytes.
Measured = tuple[str, tuple[int, ...], int, int]

_KEPT_SHAPES = 1 << 12

_STRING = r'"([ !#-\[\]-~]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[ !#-\[\]-~]*+)*+)"'
_INTEGER = r"(?:0|[1-9][0-9]{0,18}+)"
# The usual spelling first, then all others of JSON's.
_FLOAT = (
    r"(?:[0-9]\.[0-9]{1,24}+(?:e-[0-9]{1,3}+)?+"
    r"|(?:0|[1-9][0-9]{0,19}+)(?:\.[0-9]{1,24}+)?+(?:e[+-]?[0-9]{1,3}+)?+)"
)
_SHAPE = rf"\[((?:{_INTEGER}(?:, {_INTEGER}){{0,63}}+)?+)\]"
_DIGEST = r"blake3:[0-9a-f]{64}"
_TOLD_BY = "|".join(get_args(ToldBy))
_DTYPE = r'"([A-Z0-9_]{1,20}+)"'


def _done(range_keys: tuple[str, ...]) -> str:
    """Return the pattern of what was done: 5 groups, one for each of the keys of the range, and 2."""
    return (
        r', "action": "(perturb|copy)"(?:, "reason": "([a-z-]{1,20}+)")?+'
        rf', "lambda": ({_FLOAT}), "std": (?:null|({_FLOAT})), "amplitude": (?:null|({_FLOAT}))'
        + "".join(rf', "{key}": (?:null|(-?{_FLOAT}))' for key in range_keys)
        + rf', "unchanged": ({_INTEGER}), "clamped": ({_INTEGER})'
    )


@functools.cache
def tensor_pattern(range_keys: tuple[str, ...]) -> re.Pattern[str]:
    """Return the pattern of a tensor up to its end, or up to the first of its parts.

    Groups: name, stream, file, dtype, output dtype, shape; what was done; what told it is a buffer; source
    digest, digest, parts.
    """
    return re.compile(
        rf'\{{"name": {_STRING}, "stream": {_STRING}, "file": {_STRING}, "dtype": {_DTYPE}'
        rf'(?:, "out_dtype": {_DTYPE})?+, "shape": {_SHAPE}{_done(range_keys)}'
        rf'(?:, "told_by": "({_TOLD_BY})")?+, "source_digest": "({_DIGEST})", "digest": "({_DIGEST})"'
        r'(?:\}|(, "parts": \[))'
    )


@functools.cache
def part_pattern(range_keys: tuple[str, ...]) -> re.Pattern[str]:
    """Return the pattern of a part, with what follows it: another part, or the end of its tensor.

    Groups: name, shape, first, length, stride, repeat; what was done; what follows.
    """
    runs = "".join(f', "{key}": ({_INTEGER})' for key in ("first", "length", "stride", "repeat"))
    name = r'"([a-z0-9_]++(?:\.[a-z0-9_]++)*+)"'
    return re.compile(rf'\{{"name": {name}, "shape": {_SHAPE}{runs}{_done(range_keys)}\}}(, |\]\}})')


@functools.cache
def average_pattern(members: int) -> re.Pattern[str]:
    """Return the pattern of an averaged tensor: name, file, dtype, shape, action, digests, digest."""
    digests = rf'"{_DIGEST}"(?:, "{_DIGEST}"){{{members - 1}}}+'
    return re.compile(
        rf'\{{"name": {_STRING}, "file": {_STRING}, "dtype": {_DTYPE}, "shape": {_SHAPE}'
        rf', "action": "(average|copy)", "source_digests": \[({digests})\], "digest": "({_DIGEST})"\}}'
    )


def text_of(raw: str) -> str | None:
    """Return the string that stands between quotes; None where UTF-8 cannot spell it."""
    if "\\" not in raw:
        return raw
    text = str(json.loads(f'"{raw}"'))
    return None if SURROGATE.search(text) else text


class Shapes:
    """Shapes as lines spell them, each taken apart once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Measured | None] = {}

    def find(self, dtype: str, text: str) -> Measured | None:
        """Return what a dtype and a shape come to; None where there can be no such tensor."""
        key = dtype, text
        if (measured := self._known.get(key)) is None:
            if len(self._known) >= _KEPT_SHAPES:
                self._known.clear()
            measured = self._known[key] = _measure(dtype, text)
        return measured


def _measure(dtype: str, text: str) -> Measured | None:
    shape = [int(n) for n in text.split(", ")] if text else []
    if dtype not in ALL_DTYPES or max(shape, default=0) >= 2**63:
        return None
    try:
        return ALL_DTYPES[dtype], tuple(shape), math.prod(shape), stored_bytes(dtype, shape)
    except ValueError:
        return None
