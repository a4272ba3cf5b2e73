"""Lists of λ and seeds: the combinations that they stand for, and what the output of each is called.

A name holds placeholders, `{lambda}` (or `{noise-std}`) and `{seed}`, which are replaced by each value as the
user wrote it. Names that would not tell two outputs apart are refused before anything is opened.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from noisytune_cli.cli.parse import MOST, numbers, read_seeds
from noisytune_cli.errors import UsageError
from noisytune_cli.records import Combination


@dataclass(frozen=True, slots=True)
class _Strength:
    """A λ, and what stands for each placeholder that it fills."""

    lam: float
    names: Mapping[str, str]


def combine(
    out: str | None, *, lam: str | None, noise_std: str | None, seed: str, default: float
) -> tuple[Combination, ...]:
    """Return every combination of the lists, λ by λ and within it seed by seed, with its output's name.

    `lam` and `noise_std`, of which one is None, are the options as written; without both λ is `default`.
    Raises UsageError for a list that makes no sense, and for an `out` that names two outputs alike.
    """
    strengths = _read_strengths(lam, noise_std, default)
    seeds = read_seeds(seed)
    _refuse_twice("--seed", seed, seeds)
    if len(strengths) * len(seeds) > MOST:
        raise UsageError(
            f"{len(strengths) * len(seeds):,} outputs",
            why=f"one run makes {MOST:,} at most",
            next_step="Give shorter lists, and run again for the rest",
        )
    pairs = list(product(strengths, seeds))
    if out is None:
        return tuple(Combination(strength.lam, number, None) for strength, number in pairs)
    outs = [_fill(out, {**strength.names, "seed": str(number)}) for strength, number in pairs]
    if len(set(outs)) < len(outs):
        raise _alike(out, strengths, seeds)
    return tuple(
        Combination(strength.lam, number, name) for (strength, number), name in zip(pairs, outs, strict=True)
    )


def _fill(out: str, names: Mapping[str, str]) -> str:
    """Replace the placeholders that are known; other braces stay as they are."""
    return re.sub(r"\{([a-z-]+)\}", lambda found: names.get(found[1], found[0]), out)


def _read_strengths(lam: str | None, noise_std: str | None, default: float) -> list[_Strength]:
    if noise_std is not None:
        values = numbers("--noise-std", noise_std)
        _refuse_twice("--noise-std", noise_std, values)
        # The uniform distribution of width λ has std λ/√12, and Gaussian noise is scaled to match it.
        lams = [math.sqrt(12) * value for value in values]
        written = [text.strip() for text in noise_std.split(",")]
        return [
            _Strength(value, {"lambda": repr(value), "noise-std": text})
            for value, text in zip(lams, written, strict=True)
        ]
    if lam is None:
        return [_Strength(default, {"lambda": repr(default)})]
    values = numbers("--lambda", lam)
    _refuse_twice("--lambda", lam, values)
    return [
        _Strength(value, {"lambda": text.strip()}) for value, text in zip(values, lam.split(","), strict=True)
    ]


def _refuse_twice(option: str, text: str, values: Sequence[Hashable]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UsageError(
                f"{option} {text}",
                why=f"{value} is in it twice",
                next_step="Name each value once: the second output would be the first again",
            )
        seen.add(value)


def _alike(out: str, strengths: Sequence[_Strength], seeds: Sequence[int]) -> UsageError:
    """Return the error for outputs that would bear one name: most often a placeholder is missing."""
    missing = []
    if len(strengths) > 1 and not any(f"{{{name}}}" in out for name in strengths[0].names):
        missing.append("{noise-std}" if "noise-std" in strengths[0].names else "{lambda}")
    if len(seeds) > 1 and "{seed}" not in out:
        missing.append("{seed}")
    count = len(strengths) * len(seeds)
    if not missing:
        return UsageError(
            f"--out {out}",
            why=f"two of the {count:,} outputs would bear one name",
            next_step="Put something between the placeholders, such as l{lambda}-s{seed}",
        )
    return UsageError(
        f"--out {out}",
        why=f"it names all of {count:,} outputs alike: {' and '.join(missing)} is missing",
        next_step="Write for example -o 'out-l{lambda}-s{seed}'",
    )
