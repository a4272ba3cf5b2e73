"""What the command line's options mean, as a NoiseSpec: rules of precedence in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from noisytune_cli.dtypes import BY_TORCH_NAME
from noisytune_cli.errors import UsageError
from noisytune_cli.records import Conversion, Granularity, NoiseSpec, Scope

#: The most outputs of one run, and seeds of a list: what a run remembers of them grows with their number.
MOST = 1000

_SEED_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?", re.ASCII)
_LARGEST_SEED = 2**64 - 1

#: λ of the paper on GLUE.
DEFAULT_LAMBDA = 0.15


@dataclass(frozen=True)
class Preset:
    """Settings with a name; explicit options beat them."""

    lam: float
    exclude: tuple[str, ...]


PRESETS: Mapping[str, Preset] = {
    # The paper's setting for multilingual models: no noise on token embeddings (nor on a head tied to them).
    "xtreme": Preset(lam=0.1, exclude=("@embeddings",)),
}


def check_out(out: str) -> None:
    """Raise UsageError for an `--out` that names nothing, or standard output."""
    if out == "":
        raise UsageError("--out is empty", why="it names no file or folder", next_step="Give -o OUT, or -o .")
    if out == "-":
        raise UsageError(
            "--out -",
            why="standard output cannot hold what is written, which is more than one file",
            next_step="Give the name of a file or folder (./- is one)",
        )


def make_conversion(dtype: str | None, to: str | None, dequantize: str | None) -> Conversion | None:
    """Return in what the output's weights are to differ from the source's, None where in nothing."""
    conversion = Conversion(
        dtype=None if dtype is None else BY_TORCH_NAME[dtype],
        format="safetensors" if to == "safetensors" else None,
        dequantized="BF16" if dequantize == "bf16" else None,
    )
    return None if conversion == Conversion() else conversion


def make_noise(
    *,
    lam: float | None,
    noise_std: float | None,
    seed: int,
    distribution: str,
    scope: Scope,
    include: Sequence[str],
    exclude: Sequence[str],
    rules: Sequence[str],
    preset: str | None,
    granularity: Granularity = "tensor",
    splits: Sequence[str] = (),
) -> NoiseSpec:
    """Return the noise that the options ask for; UsageError where they contradict each other."""
    if lam is not None and noise_std is not None:
        raise UsageError(
            "--lambda and --noise-std",
            why="both set the strength of the noise",
            next_step="Give one of them: --noise-std S is --lambda √12 · S",
        )
    if preset is not None and preset not in PRESETS:
        raise UsageError(
            f"--preset {preset}", why="there is no such preset", next_step=f"Use one of: {', '.join(PRESETS)}"
        )
    chosen = PRESETS[preset] if preset is not None else Preset(DEFAULT_LAMBDA, ())
    if noise_std is not None:
        # The uniform distribution of width λ has std λ/√12, and Gaussian noise is scaled to match it.
        lam = math.sqrt(12) * noise_std
    # Exclude beats include, so a preset's exclusions would beat an explicit --include: they give way to it.
    filters = tuple(exclude) if include else (*chosen.exclude, *exclude)
    return NoiseSpec(
        lam=chosen.lam if lam is None else lam,
        seed=seed,
        distribution=distribution,
        scope=scope,
        granularity=granularity,
        rules=tuple(_rule(text) for text in rules),
        include=tuple(include),
        exclude=filters,
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


def _rule(text: str) -> tuple[str, float]:
    """Split PATTERN=VALUE at its last `=`."""
    pattern, equals, value = text.rpartition("=")
    try:
        if not (equals and pattern):
            raise ValueError
        return pattern, decimal(value)
    except ValueError:
        raise UsageError(
            f"--lambda-for {text}",
            why="it is not PATTERN=VALUE with a number as the value",
            next_step="Write for example --lambda-for '@attention=0.1'",
        ) from None


def decimal(text: str) -> float:
    """Return the number that is written, 0 without a sign.

    ValueError for what only Python takes for one (`1_0`, `０.１`), and for what float64 would make 0.
    """
    if "_" in text or not text.isascii():
        raise ValueError
    value = float(text)
    if value == 0.0 and re.search("[1-9]", text.lower().partition("e")[0]):
        raise ValueError  # it is not 0, and float64 has no number so near to it
    return value + 0.0  # which takes the sign from a zero


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers of a comma list; UsageError that names the one that is none."""
    found = []
    for part in text.split(","):
        try:
            found.append(decimal(part))
        except ValueError:
            raise UsageError(
                f"{option} {text}",
                why=f'"{part}" is no number',
                next_step="Write numbers with commas between them, such as 0.1,0.2",
            ) from None
    return tuple(found)


def read_seeds(text: str, largest: int = _LARGEST_SEED) -> list[int]:
    """Return the seeds of a comma list of numbers and ranges such as `0-4`, both ends included."""
    bound = f"2^{largest.bit_length()}-1"
    seeds: list[int] = []
    for part in text.split(","):
        found = _SEED_RANGE.fullmatch(part.strip())
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
