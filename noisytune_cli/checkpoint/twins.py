"""Which other weights beside those chosen hold the same model: told by their tensors, from headers alone.

A copy of the weights in an output would be one without noise, and one that a loader may take. So what has the
chosen weights' tensors is a twin, whatever it is called; a voice, a classifier or an adapter is none, and a
loader misses it. Tensors are the same where name and shape are; where another program saved them, under a
prefix or with its own names, the prefix and the number of all values tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from noisytune_cli.checkpoint.formats import begins_weights, open_source
from noisytune_cli.checkpoint.index import read_index
from noisytune_cli.checkpoint.layout import index_suffix
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import InputInvalid, InputUnreadable
from noisytune_cli.escape import escape
from noisytune_cli.reading import Reach
from noisytune_cli.records import TensorSpec

#: So many values two different models have in common with no chance to speak of.
_TELLING = 10_000


class Sorted(NamedTuple):
    """Other weights: those that hold the same, those that do not, and what to warn of."""

    twins: frozenset[str]
    others: tuple[str, ...]
    warnings: tuple[str, ...]


def sort_weights(
    root: Path,
    names: Iterable[str],
    named_twins: Collection[str],
    tensors: Sequence[TensorSpec],
    reach: Reach | None,
) -> Sorted:
    """Sort the weight files (and indexes) `names` under `root` by whether they hold `tensors` too.

    A file that cannot be read goes by its name (`named_twins`), and so does one that was not fetched.
    """
    ours = {tensor.name: tensor.shape for tensor in tensors}
    count = _values(tensors)
    twins: set[str] = set()
    others: list[str] = []
    warnings: list[str] = []
    for name in names:
        path = root / name
        if not path.is_file():
            twins.add(name)
            continue
        same = name in named_twins
        try:
            if index_suffix(name) is not None:
                same = _overlap(dict.fromkeys(read_index(root, name, reach).shard_of), ours)
            else:
                with_tensors = open_source(path, name, False, reach)
                with_tensors.close()
                # Where the name says so too, names are enough.
                found = {tensor.name: None if same else tensor.shape for tensor in with_tensors.tensors}
                same = _overlap(found, ours) or _TELLING < count == _values(with_tensors.tensors)
        except (InputInvalid, InputUnreadable) as error:
            from noisytune_cli.checkpoint.formats.torch.values import NoStateDict  # not for safetensors

            if not same and not isinstance(error.__cause__, NoStateDict) and begins_weights(path, reach):
                warnings.append(
                    f"{escape(name)} is copied as it is; whether it holds the same weights is unknown: "
                    + escape(error.why, 500)
                )
        if same:
            twins.add(name)
        else:
            others.append(name)
    return Sorted(frozenset(twins), tuple(others), tuple(warnings))


def _values(tensors: Sequence[TensorSpec]) -> int:
    """Return how many floating-point values tensors hold."""
    return sum(tensor.elements for tensor in tensors if tensor.dtype in FLOAT_DTYPES)


def _overlap(theirs: Mapping[str, tuple[int, ...] | None], ours: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether at least half of the tensors of one are among the other's.

    Shapes that do not count, as of an index, are None.
    """
    fewer = min(len(theirs), len(ours))
    if not fewer:
        return False
    if 2 * _common(theirs, ours, "", "") >= fewer:
        return True
    # Under a prefix that all have: that of the first tensor whose name ends as one of ours, or the reverse.
    return fewer > 1 and any(
        2 * _common(theirs, ours, *prefixes) >= fewer for prefixes in _prefixes(theirs, ours)
    )


def _common(
    theirs: Mapping[str, tuple[int, ...] | None], ours: Mapping[str, tuple[int, ...]], strip: str, add: str
) -> int:
    """Count the tensors of `theirs` that ours have in the same shape, one prefix taken away, another put."""
    found = 0
    for name, shape in theirs.items():
        if name.startswith(strip):
            own = ours.get(add + name[len(strip) :])
            found += own is not None and shape in (None, own)
    return found


def _prefixes(theirs: Collection[str], ours: Collection[str]) -> Iterable[tuple[str, str]]:
    """Return (what to take from their names, what to put before) that would make some of them ours."""
    found: dict[tuple[str, str], None] = {}
    for longer, shorter, flip in ((theirs, ours, False), (ours, theirs, True)):
        known = set(shorter)
        for name in list(longer)[:: max(1, len(longer) // 8)]:
            at = name.find(".")
            while at >= 0:
                if name[at + 1 :] in known:
                    prefix = name[: at + 1]
                    found[("", prefix) if flip else (prefix, "")] = None
                at = name.find(".", at + 1)
    return found
