"""Text from a file, made safe to print.

Tensor names, file names and parser messages come from checkpoints, which anyone can write. Before they
reach a terminal or a log every control character, line break, bidirectional override and lone surrogate
is spelt as an escape, and the text is cut to a length that fits an error line.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

#: The handler, for `errors=`, of what an encoding lacks: our own symbols are spelt, the rest is escaped.
SPELLED = "noisytune.spelled"
_SPELT = {
    "λ": "lambda",
    "σ": "sigma",
    "κ": "kappa",
    "√": "sqrt ",
    "…": "...",
    "·": "*",
    "×": "x",
    "±": "+-",
    "−": "-",
    "→": "->",
    "█": "#",
    "▏": "|",
}


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and error.object[error.start] in _SPELT:
        return _SPELT[error.object[error.start]], error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error(SPELLED, _spell)


def escape(text: str, limit: int | None = 200) -> str:
    """Return `text` with unprintable characters escaped, cut after `limit` characters (None: not cut)."""
    cut = limit is not None and len(text) > limit
    shown = text[:limit] if cut else text
    # Most text is as it is shown, which costs a hundredth to see.
    plain = shown.isprintable() and "\\" not in shown
    out = shown if plain else "".join(map(_escape_character, shown))
    return f"{out}… ({len(text)} characters)" if cut else out


def _escape_character(c: str) -> str:
    if c == "\\":
        return "\\\\"
    # Not printable are controls, formats (bidi overrides among them), surrogates, private use, what is
    # unassigned, and all separators but the space.
    if c.isprintable():
        return c
    code = ord(c)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def is_text(name: str) -> bool:
    """Tell whether UTF-8 can spell a name: one of a file may hold half a surrogate pair for a byte."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def enumerate_some(names: Sequence[str], limit: int = 6) -> str:
    """Return the first names, escaped, and how many there are more."""
    return list_some([escape(name) for name in names[:limit]], limit, len(names))


def list_some(names: Sequence[str], limit: int = 6, count: int | None = None) -> str:
    """Return the first names as they are, which suits errors, and how many more of `count` there are."""
    more = (len(names) if count is None else count) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")
