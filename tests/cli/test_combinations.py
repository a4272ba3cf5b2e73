"""Lists of λ and seeds: what they stand for, what the outputs are called, and which make no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest

from noisytune_cli.cli.combinations import combine
from noisytune_cli.cli.parse import MOST
from noisytune_cli.errors import UsageError
from noisytune_cli.records import Combination


def combined(out: str | None = "o-l{lambda}-s{seed}", **options: Any) -> tuple[Combination, ...]:
    given: dict[str, Any] = {"lam": None, "noise_std": None, "seed": "0", "default": 0.15}
    return combine(out, **given | options)


def outs(*arguments: Any, **options: Any) -> list[str | None]:
    return [one.out for one in combined(*arguments, **options)]


def test_every_combination_in_order() -> None:
    assert combined(lam="0.05,0.1", seed="0-2,7") == tuple(
        Combination(lam, seed, f"o-l{lam}-s{seed}") for lam in (0.05, 0.1) for seed in (0, 1, 2, 7)
    )


def test_values_are_called_what_the_user_wrote() -> None:
    assert outs(lam="0.10, 1e-3,.5") == ["o-l0.10-s0", "o-l1e-3-s0", "o-l.5-s0"]
    assert outs("{lambda}/{seed}/{seed}", seed="007") == ["0.15/7/7"]
    assert outs(default=0.1) == ["o-l0.1-s0"]


def test_noise_std_has_a_placeholder_of_its_own() -> None:
    one, two = combined("{noise-std}", noise_std="0.05,0.10")
    assert (one.lam, two.lam) == (math.sqrt(12) * 0.05, math.sqrt(12) * 0.1)
    assert (one.out, two.out) == ("0.05", "0.10")
    assert outs("{lambda}", noise_std="0.05,0.1") == [repr(one.lam), repr(two.lam)]
    assert outs("{noise-std}", lam="0.1") == ["{noise-std}"]  # not given, so not known


def test_other_braces_stay() -> None:
    assert outs("{x}{lambda}{Seed}{}{{seed}}", lam="0.1") == ["{x}0.1{Seed}{}{0}"]


def test_without_a_place_there_is_no_name() -> None:
    assert combined(None, seed="0-1") == (Combination(0.15, 0, None), Combination(0.15, 1, None))


def test_the_largest_seed_and_the_longest_list() -> None:
    top = 2**64 - 1
    assert [one.seed for one in combined(seed=f"{top - 1}-{top}")] == [top - 1, top]
    assert len(combined(seed=f"1-{MOST}")) == MOST


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": "-1"}, "neither a seed"),
        ({"seed": ""}, "neither a seed"),
        ({"seed": "1,,2"}, "neither a seed"),
        ({"seed": "1.5"}, "neither a seed"),
        ({"seed": "1-2-3"}, "neither a seed"),
        ({"seed": "٣"}, "neither a seed"),
        ({"seed": "9" * 5000}, "5007 characters"),
        ({"seed": str(2**64)}, "larger than"),
        ({"seed": f"0-{2**64}"}, "larger than"),
        ({"seed": f"0-{2**64 - 1}"}, "is the most"),
        ({"seed": "4-0"}, "ends before"),
        ({"seed": "0-4,3"}, "3 is in it twice"),
        ({"lam": "0.1,0.10"}, "0.1 is in it twice"),
        ({"lam": "0.1,"}, "is no number"),
        ({"lam": "0.1;0.2"}, "is no number"),
        ({"lam": "1_0"}, "is no number"),
        ({"lam": "０.１"}, "is no number"),
        ({"noise_std": "1,1e0"}, "twice"),
        ({"noise_std": "a"}, "is no number"),
        ({"lam": "1,2", "seed": f"1-{MOST // 2 + 1}"}, "at most"),
    ],
)
def test_a_list_that_makes_no_sense(options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        combined(**options)


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("o", {"seed": "0-1"}, r"\{seed\} is missing"),
        ("o{lambda}", {"seed": "0-1"}, r": \{seed\} is missing"),
        ("o{seed}", {"lam": "1,2", "seed": "0-1"}, r": \{lambda\} is missing"),
        ("o", {"lam": "1,2", "seed": "0-1"}, r"\{lambda\} and \{seed\} is missing"),
        ("o{seed}", {"noise_std": "1,2"}, r"\{noise-std\} is missing"),
        ("o{lambda}{seed}", {"lam": "1,11", "seed": "1,11"}, "would bear one name"),
    ],
)
def test_names_that_tell_no_outputs_apart(out: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        combined(out, **options)
