"""The noises of a mixture as a file of JSON lines names them, which a manifest then holds as `noise.mix`."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from typing import Any

from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.reading import parse_json, read_small
from noisytune_cli.records import MAX_SEED, MAX_TERMS, Term

#: The most of a mixture's file that is read: 20,000 lines take 2 MB.
_MAX_MIX_BYTES = 8 << 20


def read_mix(path: str) -> tuple[tuple[Term, ...], bool]:
    """Return the noises that a file of JSON lines names, and whether their strengths are σ.

    Raises InputInvalid, which names the line, for what is none.
    """
    if not path:
        raise UsageError(
            "no mixture is named", why="its name is empty", next_step="Give a file of JSON lines"
        )
    terms: list[Term] = []
    kinds: set[str] = set()
    content = read_small(Path(os.path.expanduser(path)), _MAX_MIX_BYTES)
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            if not isinstance(entry, dict) or not entry.keys() <= {"seed", "sigma", "lambda", "coefficient"}:
                raise ValueError('it is no object of "seed", "sigma" or "lambda", and "coefficient"')
            kinds |= {kind := "sigma" if "sigma" in entry else "lambda"}
            seed: Any = entry.get("seed")
            if isinstance(seed, str) and re.fullmatch("[0-9]{1,20}", seed, re.ASCII):
                seed = int(seed)
            if type(seed) is not int or not 0 <= seed <= MAX_SEED:
                raise ValueError('"seed" is not a whole number from 0 to 2^64-1')
            values: list[Any] = [entry.get(kind), entry.get("coefficient", 1.0)]
            for key, value in zip((kind, "coefficient"), values, strict=True):
                if type(value) not in (int, float) or not abs(value) < 1e300:
                    raise ValueError(f'"{key}" is not a finite number')
            if len(kinds) > 1 or len(entry.keys() & {"sigma", "lambda"}) > 1:
                raise ValueError('it has "sigma" and "lambda": all noises of a mixture have the same')
        except ValueError as error:
            raise _not_a_mix(path, f"line {number}: {error}") from error
        terms.append(Term(seed, *(float(value) + 0.0 for value in values)))
        if len(terms) > MAX_TERMS:
            raise _not_a_mix(path, f"it has more than {MAX_TERMS:,} lines")
    if not terms:
        raise _not_a_mix(path, "it has no line")
    return tuple(terms), kinds == {"sigma"}


def _not_a_mix(path: str, why: str) -> InputInvalid:
    return InputInvalid(
        "cannot read the mixture",
        path=path,
        why=why,
        next_step='Write a line for each noise, such as {"seed": 17, "sigma": 0.001, "coefficient": 0.02}',
    )
