"""How the matrices of a stored tensor lie in it: as runs of elements at equal distances.

One level of runs (`Part`: first, length, stride, repeat) is enough for every layout that models use. A block
of rows is one run, a block of columns a run in each row, rows taken by head a run for each head, and every
second column runs of one element. What is stacked lies one after the other, so a part of a stacked matrix is
a part of the whole that begins later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from noisytune_cli.records import Part


def cut(
    shape: Sequence[int], axis: int, pieces: Iterable[tuple[str, int]], times: int = 1
) -> tuple[Part, ...]:
    """Cut a tensor along an axis into named pieces of these sizes, which follow each other `times` times.

    So [h · 3 · d, n] cut along axis 0 into q, k, v of size d, h times, is attention stored by head. The sizes
    add up: `times` · their sum is the size of the axis.
    """
    pieces = list(pieces)
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    period = sum(size for _, size in pieces)
    parts, start = [], 0
    for name, size in pieces:
        own = (*shape[:axis], size * times, *shape[axis + 1 :])
        parts.append(_run(name, own, start * inner, size * inner, period * inner, outer * times))
        start += size
    return tuple(parts)


def stack(shape: Sequence[int], inside: Sequence[Part]) -> tuple[Part, ...]:
    """Divide a stack [n, …] of experts into its n matrices, and each into the parts `inside` it, if any."""
    own = tuple(shape[1:])
    size = math.prod(own)
    parts = []
    for i in range(shape[0]):
        if inside:
            parts += [replace(p, name=f"expert.{i}.{p.name}", first=p.first + i * size) for p in inside]
        else:
            parts.append(Part(f"expert.{i}", own, i * size, size, size, 1))
    return tuple(parts)


def within(outer: Part, inside: Iterable[Part]) -> tuple[Part, ...]:
    """Return the parts `inside` a part that is one run, as parts of the tensor."""
    return tuple(replace(p, name=f"{outer.name}.{p.name}", first=outer.first + p.first) for p in inside)


def _run(name: str, shape: tuple[int, ...], first: int, length: int, stride: int, repeat: int) -> Part:
    """Return a part spelt in the one way: runs that touch are one run, whose stride is its length."""
    if length == stride:
        length, repeat = length * repeat, 1
    return Part(name, shape, first, length, length if repeat == 1 else stride, repeat)
