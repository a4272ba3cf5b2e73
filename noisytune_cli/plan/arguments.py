"""What a Python function was asked for: its arguments checked, and the noise that they ask for.

Python lets anything through, and from a training script a wrong type comes late and far from its cause. So
each argument is looked at before anything else is, and refused under its own name. What is found wrong later
is told in the words of the command line, which are put into Python's as they reach the caller. A message has
an option and its value as --option=VALUE, so that no word after an option is taken for one.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, ParamSpec, TypeVar

from noisytune_cli.errors import NoisytuneError, UsageError
from noisytune_cli.manifest.mixture import read_mix
from noisytune_cli.noise import distributions, subnormals
from noisytune_cli.records import MAX_TERMS, Granularity, NoiseSpec, Scope, Term, mixed_strength

_Value = TypeVar("_Value")
_Asked = ParamSpec("_Asked")

#: One pattern, or several; and values by pattern.
Patterns = str | Iterable[str]
Pairs = Mapping[str, _Value] | Iterable[tuple[str, _Value]]

#: Noises to be added up: the lines of the command line's file, as dictionaries, records, or its path.
Mix = Iterable[Mapping[str, Any] | Term] | str | os.PathLike[str]

#: What Python calls an option that has another name there than dashes account for.
_RENAMED = {
    "lambda": "lam",
    "lambda-for": "rules",
    "sigma-for": "rules",
    "split": "splits",
    "component": "components",
    "map": "maps",
}

#: A command line to the end of its sentence, or an option, with its value if `=` and one follow.
_OPTION = re.compile(
    r"noisytune [a-z].*"
    r"|(?<!inspect )(?<![\w-])(?:--(?P<option>[a-z]+(?:-[a-z]+)*)|-o\b)"
    r"(?:=(?P<value>'[^']*'|[^\s()]*[^\s(),;:.]))?"
)

#: Several patterns: an option for each, which is one argument with a list.
_REPEAT = ("repeat --include or --exclude", "give a list as include= or exclude=")
_REPEATED = re.compile(r"\b(\w+)=('[^']*')((?: \1='[^']*')+)")


def of_python(function: Callable[_Asked, _Value]) -> Callable[_Asked, _Value]:
    """Have a function keep subnormal numbers, and name its arguments where errors would name options."""

    @functools.wraps(function)
    def called(*arguments: _Asked.args, **keywords: _Asked.kwargs) -> _Value:
        try:
            with subnormals.kept():
                return function(*arguments, **keywords)
        except NoisytuneError as error:
            error.reword(functools.partial(in_python, function))
            raise

    return called


def in_python(function: Callable[..., object], text: str) -> str:
    """Return a text with each option as the argument that it is of a function; others stay as they are."""
    known = inspect.signature(function).parameters

    def argument(found: re.Match[str]) -> str:
        option, value = found["option"] or "out", (found["value"] or "").strip("'")
        name = _RENAMED.get(option, option.replace("-", "_"))
        if found[0].startswith("noisytune") or name not in known:
            return found[0]
        if isinstance(known[name].default, bool):
            return f"{name}=True"
        if name in ("maps", "splits") and "=" in value:
            pattern, _, meant = value.rpartition("=")
            return f"{name}={{{pattern!r}: {meant!r}}}"
        return f"{name}={value!r}" if value else f"{name}="

    def several(found: re.Match[str]) -> str:
        others = found[3].replace(f" {found[1]}=", ", ")
        return f"{found[1]}=[{found[2]}{others}]"

    return _REPEATED.sub(several, _OPTION.sub(argument, text.replace(*_REPEAT)))


def make_spec(
    *,
    lam: float | None = None,
    seed: int | None = None,
    sigma: float | None = None,
    mix: Mix | None = None,
    shrink: float | None = None,
    noise: str | None = None,
    scope: Scope | None = None,
    granularity: Granularity = "tensor",
    splits: Pairs[str] = (),
    include: Patterns = (),
    exclude: Patterns = (),
    rules: Pairs[float] = (),
) -> NoiseSpec:
    """Return the noise that the arguments ask for; UsageError where one of them makes no sense."""
    if noise is not None:
        check_choice("noise", noise, distributions.names())
    check_choice("granularity", granularity, ("tensor", "matrix"))
    given = {"lam": lam, "sigma": sigma, "mix": mix, "seed": seed, "rules": rules or None}
    _refuse_both(given, ("lam", "sigma"), ("lam", "mix"), ("sigma", "mix"), ("seed", "mix"), ("rules", "mix"))
    terms: tuple[Term, ...] = ()
    strength = NoiseSpec().lam
    if mix is not None:
        terms, chosen = _terms(mix, scope)
        strength = mixed_strength(terms)
    elif sigma is not None:
        chosen, strength = _scope(scope, absolute=True), _strength("sigma", sigma)
    else:
        chosen = _scope(scope, absolute=False)
        strength = strength if lam is None else _strength("lam", lam)
    return NoiseSpec(
        lam=strength,
        seed=0 if seed is None else _seed("seed", seed),
        distribution=noise or ("gaussian" if chosen == "absolute" else "uniform"),
        scope=chosen,
        rules=tuple((p, _strength(f"rules[{p!r}]", value)) for p, value in _pairs("rules", rules)),
        include=patterns("include", include),
        exclude=patterns("exclude", exclude),
        granularity=granularity,
        splits=tuple(texts("splits", splits)),
        kept=_share(shrink),
        mix=terms,
    )


def _refuse_both(given: Mapping[str, object], *pairs: tuple[str, str]) -> None:
    for one, other in pairs:
        if given[one] is not None and given[other] is not None:
            raise UsageError(
                f"{one}= and {other}=",
                why="each noise of a mixture has its own seed and strength, for all parameters"
                if other == "mix"
                else "both set the strength of the noise",
                next_step="Give one of them",
            )


def _scope(given: Scope | None, *, absolute: bool) -> Scope:
    """Return the scope of strengths that are σ (`absolute`) or λ."""
    if given is not None:
        check_choice("scope", given, ("matrix", "global", "absolute"))
        if (given == "absolute") != absolute:
            raise UsageError(
                f"scope={given!r}",
                why="noise whose std is given is scaled with none"
                if absolute
                else "it is that of strengths that are σ, and there are none",
                next_step="Leave scope= out" if absolute else "Give sigma=",
            )
    return "absolute" if absolute else given or "matrix"


def _terms(mix: Any, scope: Scope | None) -> tuple[tuple[Term, ...], Scope]:
    """Return the noises of a mixture and the scope of their strengths."""
    if isinstance(mix, str | os.PathLike):
        terms, absolute = read_mix(os.fspath(mix))
        return terms, _scope(scope, absolute=absolute)
    entries = [] if isinstance(mix, Mapping) or not isinstance(mix, Iterable) else list(mix)
    if not 1 <= len(entries) <= MAX_TERMS:
        raise _wrong("mix", mix, f"a list of 1 to {MAX_TERMS:,} noises, or the path of a file of them")
    kinds: set[str | None] = set()
    found = []
    for i, entry in enumerate(entries):
        kind: str | None = None
        if isinstance(entry, Mapping):
            kind = "sigma" if "sigma" in entry else "lambda"
            if not {"seed", kind} <= entry.keys() <= {"seed", kind, "coefficient"}:
                raise _wrong(f"mix[{i}]", entry, "{'seed': …, 'sigma': … or 'lambda': …, 'coefficient': …}")
            entry = Term(entry["seed"], entry[kind], entry.get("coefficient", 1.0))
        elif not isinstance(entry, Term):
            raise _wrong(f"mix[{i}]", entry, "a dictionary such as {'seed': 17, 'sigma': 0.001}")
        kinds.add(kind)
        place = f"mix[{i}]"
        found.append(
            Term(
                _seed(f"{place}: seed", entry.seed),
                _strength(f"{place}: {kind or 'strength'}", entry.strength),
                _strength(f"{place}: coefficient", entry.coefficient),
            )
        )
    if len(kinds) > 1 or (kinds == {None} and scope is None):
        raise UsageError(
            "mix= has strengths of several kinds" if len(kinds) > 1 else "mix= of records without scope=",
            why="all are λ, or all are σ" if len(kinds) > 1 else "a strength alone may be λ or σ",
            next_step="Name them all 'sigma', or all 'lambda'"
            if len(kinds) > 1
            else "Give scope='absolute' where they are σ, 'matrix' or 'global' where they are λ",
        )
    absolute = kinds == {"sigma"} or (kinds == {None} and scope == "absolute")
    return tuple(found), _scope(scope, absolute=absolute)


def reusable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that can be read many times: what an iterator gives once, as a list."""
    return {name: list(given) if isinstance(given, Iterator) else given for name, given in options.items()}


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


def _pairs(option: str, given: Pairs[Any]) -> list[tuple[str, Any]]:
    pairs: Any = given.items() if isinstance(given, Mapping) else given
    try:
        listed = [(pattern, value) for pattern, value in pairs]
    except (TypeError, ValueError):
        listed = [("", None)]
    if isinstance(given, str) or not all(isinstance(pattern, str) and pattern for pattern, _ in listed):
        raise _wrong(option, given, "a dict from patterns to values, or a list of such pairs")
    return listed


def texts(option: str, given: Pairs[str]) -> list[tuple[str, str]]:
    """Return pairs of a pattern and a text as a list."""
    pairs = _pairs(option, given)
    if not all(isinstance(value, str) for _, value in pairs):
        raise _wrong(option, given, "a dict from patterns to texts such as '0:/3', or a list of such pairs")
    return pairs


def percents(option: str, given: object) -> tuple[float, ...]:
    """Return numbers from 0 to 100 as a tuple."""
    listed = tuple(map(_number, given)) if isinstance(given, Iterable) else (math.nan,)
    if not all(0.0 <= value <= 100.0 for value in listed):
        raise _wrong(option, given, "a list of numbers from 0 to 100")
    return listed


def count(option: str, given: object) -> int | None:
    """Return how many there may be, None where no limit is given."""
    if given is None:
        return None
    if (number := _whole(option, given)) < 1:
        raise _wrong(option, given, "a whole number from 1 on")
    return number


def _strength(option: str, given: object) -> float:
    """Return a λ or a σ, a zero without a sign; below 0 it is the negative noise."""
    value = _number(given)
    if not math.isfinite(value):
        raise _wrong(option, given, "a finite number, such as 0.15")
    return value + 0.0


def _share(given: object) -> float:
    """Return the share of the weights that is kept, all of them without one."""
    value = 1.0 if given is None else _number(given)
    if not 0.0 <= value <= 1.0:
        raise _wrong("shrink", given, "a number from 0 to 1, the share of the weights that is kept")
    return value + 0.0


def _number(given: object) -> float:
    """Return a real number of any kind as a float, a NaN for what is none."""
    try:
        return float(given) if isinstance(given, Real) else math.nan
    except OverflowError:
        return math.inf


def _seed(option: str, given: object) -> int:
    seed = _whole(option, given)
    if not 0 <= seed < 2**64:
        raise _wrong(option, given, "a whole number from 0 to 2^64-1")
    return seed


def _whole(option: str, given: Any) -> int:
    try:
        return operator.index(given)
    except TypeError as error:
        raise _wrong(option, given, "a whole number") from error


def _wrong(option: str, given: object, wanted: str) -> UsageError:
    return UsageError(f"{option}={given!r}", why=f"it is not {wanted}", next_step=f"Give {wanted}")
