"""What the command line's options mean: lists, numbers and seeds by one grammar, the noise that they ask for.

Names that would not tell two outputs of a list apart are refused before anything is opened.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from decimal import Decimal
from itertools import product
from typing import NamedTuple, TypeVar

from noisytune_cli.errors import UsageError
from noisytune_cli.records import MAX_SEED, Combination, Granularity, NoiseSpec, Scope, Term

_T = TypeVar("_T")

#: The most outputs of one run, and seeds of a list: what a run remembers of them grows with their number.
MOST = 1000

_NUMBER = r"([-+]?[0-9]{1,30}(?:\.[0-9]{0,30})?|[-+]?\.[0-9]{1,30})"
_RANGE = f"{_NUMBER}:{_NUMBER}:{_NUMBER}"

#: λ of the paper on GLUE.
DEFAULT_LAMBDA = 0.15


class Preset(NamedTuple):
    """Settings with a name; explicit options beat them."""

    lam: float
    exclude: tuple[str, ...]


PRESETS: Mapping[str, Preset] = {
    # The paper's setting for multilingual models: no noise on token embeddings (nor on a head tied to them).
    "xtreme": Preset(lam=0.1, exclude=("@embeddings",)),
}


def check_out(out: str) -> None:
    """Raise UsageError for an `--out` that names nothing, or standard output."""
    from noisytune_cli.output.destination import check_name

    check_name(out)
    if out == "-":
        raise UsageError(
            "--out -",
            why="standard output cannot hold what is written, which is more than one file",
            next_step="Give the name of a file or folder (./- is one)",
        )


def refuse_given(options: Mapping[str, object], beside: str | None, why: str, next_step: str) -> None:
    """Raise UsageError for the first of options, by name, that is given, where it means nothing.

    That may be `beside` something else that is given. None, False and an empty list are no option given.
    """
    for option, value in options.items():
        if not (value is None or value is False or value == []):
            what = option if beside is None else f"{option} and {beside}"
            raise UsageError(what, why=why, next_step=next_step)


def check_reads_values(headers_only: bool, of_values: Mapping[str, object]) -> None:
    """Raise UsageError for `--headers-only` with one of the options, by name, that show values of weights."""
    if headers_only:
        why = "it shows values of weights, and none are read"
        refuse_given(of_values, "--headers-only", why, "Leave one of them out")


def check_report(out: str) -> None:
    """Raise UsageError for an `--out` of a report that names no file, or standard output."""
    if out == "-" or out.endswith("/") or not out:
        raise UsageError(
            f"--out {out}" if out else "--out is empty",
            why="a report goes to standard output without it" if out == "-" else "it names no file",
            next_step="Leave it out, or give the name of a file (./- is one)",
        )


def format_of(wanted: str | None, out: str | None, *, as_json: bool = False) -> str:
    """Return the format of a report: the one that is asked for, else by the file's ending, else a table.

    `as_json` is --json, which is --format json.
    """
    if as_json and wanted not in (None, "json"):
        raise UsageError(
            f"--json and --format {wanted}", why="--json is --format json", next_step="Give one of them"
        )
    if as_json or wanted is not None:
        return wanted or "json"
    ending = "" if out is None else out.rpartition(".")[2].lower()
    return {"json": "json", "jsonl": "jsonl", "csv": "csv", "html": "html", "htm": "html"}.get(
        ending, "table"
    )


def read_preset(name: str | None) -> Preset:
    """Return the settings that have a name, the paper's without one."""
    if name is not None and name not in PRESETS:
        raise UsageError(
            f"--preset {name}", why="there is no such preset", next_step=f"Use one of: {', '.join(PRESETS)}"
        )
    return Preset(DEFAULT_LAMBDA, ()) if name is None else PRESETS[name]


#: The options that say how strong the noise is, of which a run takes one.
_STRENGTHS = ("--lambda", "--noise-std", "--sigma", "--mix")


def choose_strength(given: Mapping[str, object]) -> str | None:
    """Return which option gives the strength, None for none; `given` are the values of all, by their names.

    UsageError where it does not go with another option that is given.
    """
    chosen = [option for option in _STRENGTHS if given.get(option) is not None]
    if len(chosen) > 1:
        advice = "Give one of them"
        if chosen == ["--lambda", "--noise-std"]:
            advice += ": --noise-std S is --lambda √12 · S"
        raise UsageError(
            " and ".join(chosen),
            why=f"{'both' if len(chosen) == 2 else 'all'} set the strength of the noise",
            next_step=advice,
        )
    option = chosen[0] if chosen else None
    unfit = {
        "--sigma": ("--scope", "--lambda-for"),
        "--mix": ("--seed", "--lambda-for", "--sigma-for"),
    }.get(option or "", ("--sigma-for",))
    for other in unfit:
        if given.get(other) is not None:
            raise UsageError(
                f"{other} and {option or '--lambda'}",
                why=_UNFIT[other],
                next_step=f"Leave {other} out",
            )
    return option


_UNFIT = {
    "--scope": "noise whose std is given is scaled with none",
    "--lambda-for": "λ and σ are different strengths, and a mixture has its own",
    "--sigma-for": "it gives another σ, and there is none without --sigma",
    "--seed": "each noise of a mixture has its own seed",
}


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def read_bytes(option: str, text: str | None, default: int) -> int:
    """Return a number of bytes, such as 512M or 4G; K, M, G and T are powers of 1,024."""
    if text is None:
        return default
    found = re.fullmatch(r"([0-9]{1,15})([kmgt]?)(?:i?b)?", text.lower())
    if found is None or int(found[1]) == 0:
        raise UsageError(f"{option} {text}", why="it is no number of bytes", next_step="Write for example 4G")
    return int(found[1]) * _UNITS[found[2]]


def read_shrink(text: str | None) -> float:
    """Return the share of the weights that is kept, all of them without one."""
    return 1.0 if text is None else _one("--shrink", numbers("--shrink", text, 0.0, 1.0), text)


def _one(option: str, found: Sequence[_T], text: str) -> _T:
    if len(found) != 1:
        raise UsageError(f"{option} {text}", why="it takes one value", next_step="Run once for each")
    return found[0]


def make_noise(
    *,
    lam: float,
    distribution: str,
    scope: Scope,
    kept: float = 1.0,
    mix: tuple[Term, ...] = (),
    include: Sequence[str],
    exclude: Sequence[str],
    rules: Sequence[str],
    preset: Preset,
    granularity: Granularity = "tensor",
    splits: Sequence[str] = (),
) -> NoiseSpec:
    """Return the noise that the options ask for; of lists it has the first λ, and no seed yet."""
    return NoiseSpec(
        lam=lam,
        distribution=distribution,
        scope=scope,
        granularity=granularity,
        rules=tuple(_rule(text, "--sigma-for" if scope == "absolute" else "--lambda-for") for text in rules),
        kept=kept,
        mix=mix,
        include=tuple(include),
        # Exclude beats include, so a preset's exclusions would beat an explicit --include: they give way.
        exclude=tuple(exclude) if include else (*preset.exclude, *exclude),
        splits=tuple(parse_split(text) for text in splits),
    )


def parse_split(text: str) -> tuple[str, str]:
    """Split PATTERN=DIVISION at its last `=`; `split.check_splits` reads the division."""
    pattern, equals, division = text.rpartition("=")
    if not (equals and pattern):
        raise UsageError(
            f"--split {text}",
            why="it is not PATTERN=DIM:SIZES",
            next_step="Write for example --split '*.qkv_proj.weight=0:4096,1024,1024'",
        )
    return pattern, division


def parse_map(text: str) -> tuple[str, str]:
    """Split PATTERN=NAME at its last `=`; `renames.Rules` reads the two."""
    pattern, equals, name = text.rpartition("=")
    if not (equals and pattern and name):
        raise UsageError(
            f"--map {text}", why="it is not PATTERN=NAME", next_step="Write for example --map 'bert.*=*'"
        )
    return pattern, name


class _Strength(NamedTuple):
    """A λ, and what stands for each placeholder that it fills."""

    lam: float
    names: Mapping[str, str]


def combine(
    out: str | None,
    *,
    lam: str | None = None,
    noise_std: str | None = None,
    sigma: str | None = None,
    seed: str,
    default: float,
) -> tuple[Combination, ...]:
    """Return every combination of the lists, λ by λ and within it seed by seed, with its output's name.

    `lam`, `noise_std` and `sigma`, of which one is given at most, are the options as written; without them λ
    is `default`. A name holds placeholders, `{lambda}` (or `{noise-std}`, `{sigma}`) and `{seed}`, for each
    value as the user wrote it. Raises UsageError for a list that makes no sense, and for an `out` that names
    two outputs alike.
    """
    strengths = _read_strengths(lam, noise_std, sigma, default)
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


def _read_strengths(
    lam: str | None, noise_std: str | None, sigma: str | None, default: float
) -> list[_Strength]:
    option = "--sigma" if sigma is not None else "--lambda" if noise_std is None else "--noise-std"
    text = next((given for given in (sigma, noise_std, lam) if given is not None), None)
    if text is None:
        return [_Strength(default, {"lambda": repr(default)})]
    values = numbers(option, text)
    _refuse_twice(option, text, values)
    written = zip(values, spelled(option, text), strict=True)
    if noise_std is None:
        name = option.removeprefix("--")
        return [_Strength(value, {name: as_given}) for value, as_given in written]
    # The uniform distribution of width λ has std λ/√12, and Gaussian noise is scaled to match it.
    lams = ((math.sqrt(12) * value, as_given) for value, as_given in written)
    return [_Strength(value, {"lambda": repr(value), "noise-std": as_given}) for value, as_given in lams]


def _fill(out: str, names: Mapping[str, str]) -> str:
    """Replace the placeholders; UsageError for a word in braces that is none. Other braces stay."""
    if "{" not in out:
        return out
    for word in re.findall(r"\{([A-Za-z_-]+)\}", out):
        if word not in names:
            known = [f"{{{name}}}" for name in names]
            near = difflib.get_close_matches(word.lower(), names, n=1)
            raise UsageError(
                f"--out {out}",
                why=f"{{{word}}} stands for nothing in this run",
                next_step=f"Write {{{near[0]}}}" if near else f"Write {' or '.join(known)}, or another name",
            )
    return re.sub(r"\{([a-z-]+)\}", lambda found: names[found[1]], out)


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
        missing.append(f"{{{list(strengths[0].names)[-1]}}}")
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
        why=f"several of the {count:,} outputs would bear one name: {' and '.join(missing)} is missing",
        next_step=f"Write for example -o 'out-{''.join(missing)}'",
    )


def _rule(text: str, option: str) -> tuple[str, float]:
    """Split PATTERN=VALUE at its last `=`."""
    pattern, equals, value = text.rpartition("=")
    try:
        if not (equals and pattern):
            raise ValueError
        return pattern, decimal(value)
    except ValueError:
        raise UsageError(
            f"{option} {text}",
            why="it is not PATTERN=VALUE with a number as the value",
            next_step=f"Write for example {option} '@attention=0.1'",
        ) from None


class _BeyondFloat(ValueError):
    """A number that float64 would make 0 or infinite."""


def decimal(text: str) -> float:
    """Return the number that is written, 0 without a sign.

    ValueError for what only Python takes for one (`1_0`, `０.１`), and for what float64 makes 0 or infinite.
    """
    if "_" in text or not text.isascii():
        raise ValueError
    value = float(text)
    digits = text.lower().partition("e")[0]
    if (value == 0.0 or math.isinf(value)) and re.search("[1-9]", digits):
        raise _BeyondFloat
    return value + 0.0  # which takes the sign from a zero


def items(option: str, text: str, convert: Callable[[str], _T], kind: str) -> tuple[_T, ...]:
    """Return the items of a comma list; UsageError that names the one that is not of its `kind`."""
    found = []
    for part in spelled(option, text):
        try:
            found.append(convert(part))
        except ValueError as error:
            why = "beyond what float64 holds" if isinstance(error, _BeyondFloat) else f"not {kind}"
            raise UsageError(
                f"{option} {text}",
                why=f'"{part}" is {why}',
                next_step=f"Write {kind}, or several with commas between them",
            ) from None
    return tuple(found)


def spelled(option: str, text: str) -> list[str]:
    """Return the items of a comma list as text, with ranges of numbers (FIRST:LAST:STEP) written out.

    A range is worked out in decimal, so that 0:0.3:0.1 is 0, 0.1, 0.2 and 0.3.
    """
    parts: list[str] = []
    for part in map(str.strip, text.split(",")):
        if not (found := re.fullmatch(_RANGE, part, re.ASCII)):
            parts.append(part)
            continue
        first, last, step = map(Decimal, found.groups())
        steps = (last - first) / step if step else Decimal(-1)
        if not 0 <= steps < MOST:
            raise UsageError(
                f"{option} {text}",
                why=f'the range "{part}" has no end'
                if steps < 0
                else f'the range "{part}" has more than {MOST:,} numbers',
                next_step="Write FIRST:LAST:STEP with a step that leads from the first to the last",
            )
        parts += [f"{(first + i * step).normalize():f}" for i in range(int(steps) + 1)]
    return parts


def numbers(option: str, text: str, low: float | None = None, high: float | None = None) -> tuple[float, ...]:
    """Return the numbers of a comma list; from `low` they are to be finite, and up to `high`."""
    kind = "a number"
    if low is not None:
        kind += f" of at least {low:g}" if high is None else f" from {low:g} to {high:g}"

    def number(part: str) -> float:
        value = decimal(part)
        if low is not None and not low <= value <= (sys.float_info.max if high is None else high):
            raise ValueError
        return value

    return items(option, text, number, kind)


def words(option: str, text: str, choices: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the words of a comma list, each one of `choices` where these are given."""

    def word(part: str) -> str:
        if not part or (choices and part not in choices):
            raise ValueError
        return part

    return items(option, text, word, " or ".join(choices) or "a name")


def read_components(text: str | None) -> tuple[str, ...]:
    """Return the components that `--component` names, none where it is not given."""
    return () if text is None else words("--component", text)


def read_seeds(text: str, largest: int = MAX_SEED) -> list[int]:
    """Return the seeds of a comma list of numbers and ranges such as `0-4`, both ends included."""
    bound = f"2^{largest.bit_length()}-1"
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip(), re.ASCII)
        # 20 digits hold every seed; Python refuses to read thousands of them.
        if found is None or max(map(len, filter(None, found.groups()))) > 20:
            raise _bad_seed(text, f'"{part}" is neither a seed (0 to {bound}) nor a range of seeds')
        first = int(found[1])
        last = first if found[2] is None else int(found[2])
        if max(first, last) > largest:
            raise _bad_seed(text, f'in "{part}" a seed is larger than {bound}')
        if last < first:
            raise _bad_seed(text, f'the range "{part}" ends before it begins')
        if last - first >= MOST:
            raise _bad_seed(text, f'the range "{part}" has {last - first + 1:,} seeds; {MOST:,} is the most')
        seeds += range(first, last + 1)
    return seeds


def _bad_seed(text: str, why: str) -> UsageError:
    return UsageError(f"--seed {text}", why=why, next_step="Write for example --seed 7, or --seed 0-4,9")
