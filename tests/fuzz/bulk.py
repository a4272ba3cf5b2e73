"""Fuzzing by number: bytes of a target's corpus changed at random, as fast as its property can be asked.

It knows nothing of structure and looks at no coverage: the corpus has both, from the mutations of
`mutations.py` and from what `guided.py` found.
"""

from __future__ import annotations

import random
import time
import traceback
from pathlib import Path

from fuzz import guided
from fuzz.properties import holds
from fuzz.targets import TARGETS

#: What is put among other bytes.
_TOKENS = (
    *(bytes([one]) for one in b'"{}[],:\n*?@()Rbt.-0'),
    *(
        b"\\u0000",
        b"null",
        b"1e999",
        b"9" * 20,
        b"\0",
        b"\xff" * 4,
        b"\xff" * 8,
        b"\xed\xa0\x80",
        b"../",
        b"F32",
    ),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"q\0", b"h\0", b"\x80\x02"),
)

#: How many inputs between two looks at the clock, and how many that break a property are kept.
_BATCH, _MOST_KEPT = 500, 5


def fuzz(target: str, seconds: float, seed: int, corpus: Path) -> tuple[int, list[str]]:
    """Try inputs for so long; return how many, and what was said of those that broke the property."""
    check, _, bounds = TARGETS[target]
    corpus.mkdir(parents=True, exist_ok=True)
    guided.sow(target, corpus)
    seeds = [path.read_bytes() for path in sorted(corpus.iterdir())]
    choose, broken, count = random.Random(seed), [], 0
    until = time.monotonic() + seconds
    with guided.scratch() as place:
        while time.monotonic() < until and len(broken) < _MOST_KEPT:
            for _ in range(_BATCH):
                content = changed(choose, seeds)
                count += 1
                try:
                    holds(check, content, place, bounds)
                except Exception:
                    if len(broken) == _MOST_KEPT:
                        continue
                    kept = guided.failures() / f"{target}-bulk-{seed}-{count}"
                    kept.write_bytes(content)
                    broken.append(f"{kept}: {traceback.format_exc(limit=-3)}")
    return count, broken


def changed(choose: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with a few bytes changed, cut out, given twice, put in, or taken from another."""
    content = bytearray(choose.choice(seeds))
    for _ in range(choose.choice((1, 1, 2, 3, 6))):
        at, kind = choose.randrange(len(content) + 1), choose.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << choose.randrange(8)
        elif kind == 1 and at < len(content):
            content[at] = choose.randrange(256)
        elif kind == 2:
            del content[at : at + choose.choice((1, 2, 8, 64))]
        elif kind == 3:
            content[at:at] = choose.choice(_TOKENS)
        elif kind == 4:
            content[at:at] = content[at : at + choose.choice((1, 4, 32))]
        else:
            other = choose.choice(seeds)
            start = choose.randrange(len(other) + 1)
            content[at : at + 16] = other[start : start + 16]
    return bytes(content)
