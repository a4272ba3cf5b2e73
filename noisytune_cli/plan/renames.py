"""Which tensor of one checkpoint is which of another: by name, by a prefix, or as the user says.

A wrapper puts its own name before those of a model (`module.`, `bert.`, `base_model.model.`), so names with
and without a prefix are found by themselves; any other renaming takes a rule. From headers alone.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

from noisytune_cli.errors import UsageError
from noisytune_cli.escape import escape
from noisytune_cli.records import TensorSpec

#: What frameworks put before a model's own names: torch's wrappers, and what transformers calls the body.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "transformer.")

#: The longest prefix looked at, in components: a stranger's name may have a million.
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class Renaming:
    """One way to turn names into others: `strip` is taken away from those that have it, `add` put before."""

    strip: str = ""
    add: str = ""

    def apply(self, name: str) -> str:
        """Return the new name; one that lacks what is to be stripped, or has what is to be added, stays."""
        if self.add and name.startswith(self.add):
            return name
        return self.add + name.removeprefix(self.strip)

    def __str__(self) -> str:
        """Say it, "" where nothing is renamed."""
        if self.strip:
            return f"without {escape(self.strip)}"
        return f"with {escape(self.add)} before" if self.add else ""


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of each of two checkpoints that are one parameter, as far as their names tell."""

    a: TensorSpec
    b: TensorSpec


@dataclass(frozen=True, slots=True)
class Pairing:
    """The tensors of two checkpoints in pairs, in A's order, and what A and B have alone.

    `renaming` is what was found to make names of B out of those of A.
    """

    pairs: tuple[Pair, ...]
    only_a: tuple[TensorSpec, ...]
    only_b: tuple[TensorSpec, ...]
    renaming: Renaming = Renaming()


class Rules:
    """The user's rules PATTERN=NAME: each `*` of PATTERN is any text, and stands for the `*` of NAME."""

    def __init__(self, rules: Sequence[tuple[str, str]]) -> None:
        """Take (PATTERN, NAME); UsageError where NAME has not the stars of PATTERN."""
        self._rules = []
        for pattern, name in rules:
            if pattern.count("*") != name.count("*"):
                raise UsageError(
                    f"--map={shlex.quote(f'{pattern}={name}')}",
                    why=f"PATTERN has {pattern.count('*')} * and NAME has {name.count('*')}",
                    next_step="Write as many * on both sides, such as --map='bert.*=*'",
                )
            self._rules.append((_compile(pattern), name.split("*"), pattern))

    def apply(self, names: Iterable[str]) -> dict[str, str]:
        """Return new names by old one, of those that a rule fits: the last that does.

        UsageError for a rule that fits none, and for two names that become one.
        """
        found: dict[str, str] = {}
        for pattern, pieces, text in self._rules:
            fitting = {name: fit.groups() for name in names if (fit := pattern.fullmatch(name))}
            if not fitting:
                raise UsageError(
                    f"--map: pattern matches nothing: {text}",
                    why="no tensor has such a name",
                    next_step="List the names with: noisytune inspect SOURCE --headers-only",
                )
            for name, captured in fitting.items():
                filled = zip(pieces, (*captured, ""), strict=True)
                found[name] = "".join(piece + text for piece, text in filled)
        for (first, to), (second, also) in pairwise(sorted(found.items(), key=itemgetter(1))):
            if to == also:
                raise UsageError(
                    f"--map: two tensors become {escape(to)}",
                    why=f"they are {escape(first)} and {escape(second)}",
                    next_step="Write rules that keep names apart",
                )
        return found


def pair_up(a: Sequence[TensorSpec], b: Sequence[TensorSpec], rules: Rules | None = None) -> Pairing:
    """Pair the tensors of two checkpoints: as `rules` say, else by name, else by the prefix that fits most.

    A prefix counts where the shapes agree too.
    """
    mapped = rules.apply([tensor.name for tensor in a]) if rules else {}
    by_name = {tensor.name: tensor for tensor in b}
    chosen = {}
    for tensor in a:
        wanted = mapped.get(tensor.name, tensor.name)
        if wanted in by_name:
            chosen[tensor.name] = by_name[wanted]
    taken = {tensor.name for tensor in chosen.values()}
    left_a = [tensor for tensor in a if tensor.name not in chosen and tensor.name not in mapped]
    left_b = {tensor.name: tensor for tensor in b if tensor.name not in taken}
    renaming = _find_prefix(left_a, left_b)
    if renaming != Renaming():
        for tensor in left_a:
            other = left_b.get(renaming.apply(tensor.name))
            if other is not None and other.shape == tensor.shape:
                chosen[tensor.name] = other
                del left_b[other.name]
    return Pairing(
        tuple(Pair(tensor, chosen[tensor.name]) for tensor in a if tensor.name in chosen),
        tuple(tensor for tensor in a if tensor.name not in chosen),
        tuple(left_b.values()),
        renaming,
    )


def likely_renamings(names: Sequence[str], model_type: str | None = None) -> list[Renaming]:
    """Return what names may have been before: without a prefix that most have, or with a wrapper's."""
    counts = Counter(prefix for name in names for prefix in _prefixes(name))
    most = [prefix for prefix, count in counts.items() if 2 * count >= len(names)]
    wrappers = (*_WRAPPERS, f"{model_type}.") if model_type else _WRAPPERS
    return [
        *(Renaming(strip=prefix) for prefix in sorted(most, key=len)),
        *(Renaming(add=wrapper) for wrapper in dict.fromkeys(wrappers)),
    ]


def _find_prefix(a: Sequence[TensorSpec], b: Mapping[str, TensorSpec]) -> Renaming:
    """Return the renaming of A's names by one prefix that makes most names of B."""
    votes: Counter[Renaming] = Counter()
    endings: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for tensor in b.values():
        for prefix in _prefixes(tensor.name):
            endings.setdefault(tensor.name.removeprefix(prefix), []).append((prefix, tensor.shape))
    for tensor in a:
        for prefix in _prefixes(tensor.name):
            other = b.get(tensor.name.removeprefix(prefix))
            if other is not None and other.shape == tensor.shape:
                votes[Renaming(strip=prefix)] += 1
        for prefix, shape in endings.get(tensor.name, ()):
            if shape == tensor.shape:
                votes[Renaming(add=prefix)] += 1
    return votes.most_common(1)[0][0] if votes else Renaming()


def _prefixes(name: str) -> Iterator[str]:
    """Yield what stands before a rest of the name, dot included, the shortest first."""
    at = -1
    for _ in range(_DEEPEST):
        at = name.find(".", at + 1)
        if at < 0 or at + 1 == len(name):
            return
        yield name[: at + 1]


def _compile(pattern: str) -> re.Pattern[str]:
    """Compile a pattern; each `*` but the last takes the shortest text, so that no name takes long."""
    first, *others = (re.escape(piece) for piece in pattern.split("*"))
    if others:
        *between, last = others
        first += "".join(f"(?>(.*?){piece})" for piece in between) + f"(.*){last}"
    return re.compile(first, re.DOTALL)
