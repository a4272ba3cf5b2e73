"""Fuzzing by number: bytes of a target's corpus changed at random, as fast as its property can be asked.

It knows nothing of structure and looks at no coverage: the corpus has both, from the mutations of
`mutations.py` and from what `guided.py` found.
"""

from __future__ import annotations

import random
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType

from fuzz import guided
from fuzz.properties import CPU_SECONDS, GROWTH_BYTES, Property, bounded, holds, peak
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

#: How many inputs are measured together, and how many that break a property are kept.
_BATCH, _MOST_KEPT = 500, 5

#: Seconds of CPU time between two looks at which input is being tried.
_TICK = 0.25


class TooSlow(Exception):
    """An input seems to take longer than it may."""


def fuzz(target: str, seconds: float, seed: int, corpus: Path) -> tuple[int, list[str]]:
    """Try inputs for so long; return how many, and what was said of those that broke the property."""
    check = TARGETS[target].check
    corpus.mkdir(parents=True, exist_ok=True)
    guided.sow(target, corpus)
    seeds = [path.read_bytes() for path in sorted(corpus.iterdir())]
    choose, broken, count = random.Random(seed), [], 0
    until = time.monotonic() + seconds
    with guided.scratch() as place:
        # One change to what is accepted comes further than one to what is refused already.
        accepted = [content for content in seeds if _is_accepted(check, content, place)] or seeds
        while time.monotonic() < until and len(broken) < _MOST_KEPT:
            batch = [changed(choose, choose.choice((seeds, accepted)), seeds) for _ in range(_BATCH)]
            for number, content, why in _of_batch(check, batch, place):
                if len(broken) < _MOST_KEPT:
                    kept = guided.failures() / f"{target}-bulk-{seed}-{count + number}"
                    kept.write_bytes(content)
                    broken.append(f"{kept}: {why}")
            count += len(batch)
    return count, broken


def _is_accepted(check: Property, content: bytes, place: Path) -> bool:
    with suppress(Exception):  # what breaks the property breaks it again when it is tried
        return holds(check, content, place)
    return False


def _of_batch(check: Property, batch: list[bytes], place: Path) -> Iterator[tuple[int, bytes, str]]:
    """Yield the inputs of a batch that break the property: their numbers, they, and why.

    Time and memory are measured for all together, which costs less than any input; where together they take
    more than one may, each is tried again and measured alone.
    """
    before = peak(reset=True)
    failed: dict[int, str] = {}
    with _Watch() as watch:
        for number, content in enumerate(batch):
            watch.number = number
            try:
                holds(check, content, place, nullcontext)
            except TooSlow:
                failed[number] = ""
            except Exception:
                failed[number] = traceback.format_exc(limit=-3)
    grown = peak() - before >= GROWTH_BYTES
    for number, content in enumerate(batch):
        if not grown and number not in failed:
            continue
        why = failed.get(number, "")
        try:
            holds(check, content, place, bounded)
        except Exception:
            why = traceback.format_exc(limit=-3)
        if why:
            yield number, content, why


class _Watch:
    """Ends an input that takes its CPU time, at a cost to none: a timer looks which one is being tried."""

    def __init__(self) -> None:
        self.number = self._seen = -1
        self._since = 0.0

    def __enter__(self) -> _Watch:
        self._previous = signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, _TICK, _TICK)
        return self

    def __exit__(self, *raised: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._previous)

    def _look(self, signum: int, frame: FrameType | None) -> None:
        now = time.process_time()
        if self.number != self._seen:
            self._seen, self._since = self.number, now
        elif now - self._since > CPU_SECONDS - 2 * _TICK:
            self._since = now
            raise TooSlow


def changed(choose: random.Random, begin: list[bytes], seeds: list[bytes]) -> bytes:
    """Return one of `begin` with a few bytes changed, cut out, given twice, put in, or taken from a seed."""
    content = bytearray(choose.choice(begin))
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
