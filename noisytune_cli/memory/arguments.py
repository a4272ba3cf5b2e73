"""What `perturb_` was asked for: its arguments checked, and the noise that they ask for.

Python lets anything through, and from a training script a wrong type comes late and far from its cause. So
each argument is looked at before anything else is, and refused under its own name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar

from noisytune_cli.engine.threads import default_threads
from noisytune_cli.errors import UsageError
from noisytune_cli.noise import distributions
from noisytune_cli.records import Granularity, NoiseSpec, Scope

_Value = TypeVar("_Value")

#: One pattern, or several; and values by pattern.
Patterns = str | Iterable[str]
Pairs = Mapping[str, _Value] | Iterable[tuple[str, _Value]]

_MOST_THREADS = 256


def make_spec(
    *,
    lam: float,
    seed: int,
    noise: str,
    scope: Scope,
    granularity: Granularity,
    splits: Pairs[str],
    include: Patterns,
    exclude: Patterns,
    rules: Pairs[float],
) -> NoiseSpec:
    """Return the noise that the arguments ask for; UsageError where one of them makes no sense."""
    check_choice("noise", noise, distributions.names())
    check_choice("scope", scope, ("matrix", "global"))
    check_choice("granularity", granularity, ("tensor", "matrix"))
    return NoiseSpec(
        lam=_strength("lam", lam),
        seed=_seed(seed),
        distribution=noise,
        scope=scope,
        rules=tuple((p, _strength(f"rules[{p!r}]", value)) for p, value in _pairs("rules", rules)),
        include=patterns("include", include),
        exclude=patterns("exclude", exclude),
        granularity=granularity,
        splits=tuple(_texts("splits", splits)),
    )


def check_choice(option: str, value: object, choices: Collection[str]) -> None:
    """Raise UsageError unless a value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UsageError(
            f"{option}={value!r}",
            why="there is no such choice",
            next_step=f"Use one of: {', '.join(choices)}",
        )


def patterns(option: str, given: Patterns) -> tuple[str, ...]:
    """Return patterns as a tuple; a string is one of them, not a run of letters."""
    listed = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else None
    if listed is None or not all(isinstance(pattern, str) for pattern in listed):
        raise _wrong(option, given, "a pattern, or a list of patterns")
    return listed


def thread_count(given: int | None) -> int:
    """Return how many threads to use."""
    if given is None:
        return default_threads()
    count = _whole("threads", given)
    if not 1 <= count <= _MOST_THREADS:
        raise _wrong("threads", given, f"a whole number from 1 to {_MOST_THREADS}")
    return count


def _pairs(option: str, given: Pairs[Any]) -> list[tuple[str, Any]]:
    pairs: Any = given.items() if isinstance(given, Mapping) else given
    try:
        listed = [(pattern, value) for pattern, value in pairs]
    except (TypeError, ValueError):
        listed = [("", None)]
    if isinstance(given, str) or not all(isinstance(pattern, str) and pattern for pattern, _ in listed):
        raise _wrong(option, given, "a dict from patterns to values, or a list of such pairs")
    return listed


def _texts(option: str, given: Pairs[str]) -> list[tuple[str, str]]:
    pairs = _pairs(option, given)
    if not all(isinstance(value, str) for _, value in pairs):
        raise _wrong(option, given, "a dict from patterns to texts such as '0:/3', or a list of such pairs")
    return pairs


def _strength(option: str, given: object) -> float:
    """Return a λ."""
    try:
        value = float(given) if isinstance(given, Real) else math.nan
    except OverflowError:
        value = math.inf
    if not 0 <= value < math.inf:
        raise _wrong(option, given, "a finite number, 0 or more, such as 0.15")
    return value


def _seed(given: object) -> int:
    seed = _whole("seed", given)
    if not 0 <= seed < 2**64:
        raise _wrong("seed", given, "a whole number from 0 to 2^64-1")
    return seed


def _whole(option: str, given: Any) -> int:
    try:
        return operator.index(given)
    except TypeError as error:
        raise _wrong(option, given, "a whole number") from error


def _wrong(option: str, given: object, wanted: str) -> UsageError:
    return UsageError(f"{option}={given!r}", why=f"it is not {wanted}", next_step=f"Give {wanted}")
