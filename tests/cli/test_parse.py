"""What the options mean: which beats which, which contradict each other, and what lists stand for."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, weights
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.cli.parse import (
    MOST,
    choose_strength,
    combine,
    make_noise,
    numbers,
    read_preset,
    read_seeds,
)
from noisytune_cli.errors import UsageError
from noisytune_cli.records import Combination, NoiseSpec

NOTHING: dict[str, Any] = {
    "distribution": "uniform",
    "scope": "matrix",
    "include": (),
    "exclude": (),
    "rules": (),
}


def made(
    lam: str | None = None, noise_std: str | None = None, preset: str | None = None, **options: Any
) -> NoiseSpec:
    chosen = read_preset(preset)
    (one,) = combine(None, lam=lam, noise_std=noise_std, seed="0", default=chosen.lam)
    return make_noise(lam=one.lam, preset=chosen, **NOTHING | options)


def test_the_default_is_the_papers() -> None:
    assert made() == NoiseSpec(lam=0.15, seed=0, distribution="uniform", scope="matrix")


def test_everything_is_passed_on() -> None:
    spec = made(lam="0.3", distribution="gaussian", scope="global", include=["a"], exclude=["b"])
    assert spec == NoiseSpec(lam=0.3, distribution="gaussian", scope="global", include=("a",), exclude=("b",))


def test_noise_std_is_the_std_of_the_uniform_noise() -> None:
    assert made(noise_std="0.05").lam == math.sqrt(12) * 0.05
    assert made(noise_std="0.0").lam == 0.0
    with pytest.raises(UsageError, match="--noise-std S is --lambda"):
        choose_strength({"--lambda": "0.1", "--noise-std": "0.1"})


def test_rules_split_at_the_last_equals_sign() -> None:
    assert made(rules=["a*=0.5", "b=c=1e-3", "@norm=0"]).rules == (
        ("a*", 0.5),
        ("b=c", 0.001),
        ("@norm", 0.0),
    )


@pytest.mark.parametrize("text", ["a", "a=", "=0.1", "a=x", ""])
def test_a_rule_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="PATTERN=VALUE"):
        made(rules=[text])


def test_the_preset_of_multilingual_models() -> None:
    assert made(preset="xtreme") == NoiseSpec(lam=0.1, exclude=("@embeddings",))
    assert made(preset="xtreme", lam="0.2").lam == 0.2
    assert made(preset="xtreme", noise_std="0.1").lam == math.sqrt(12) * 0.1
    assert made(preset="xtreme", include=["@embeddings"]).exclude == ()


@pytest.mark.parametrize(("out", "words"), [("", "name is empty"), ("-", "standard output cannot hold")])
def test_an_output_without_a_name(
    out: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(save(tmp_path / "in/model.safetensors", {"w": weights("F32", 30)}).parent)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (
        ("perturb", source),
        ("perturb", source, "--dry-run"),
        ("perturb", source, "--recipe-only"),
        ("average", source, source),
        ("replay", "noisytune.json", "--base", source),
        ("study", source),
    ):
        result = CliRunner().invoke(app, [*command, "-o", out])
        assert result.exit_code == 2, result.output
        assert words in " ".join(result.stderr.split())
        assert os.listdir() == []


def test_an_unknown_preset() -> None:
    with pytest.raises(UsageError, match="xtreme"):
        made(preset="glue")


def test_an_exclusion_adds_to_the_presets() -> None:
    assert made(preset="xtreme", exclude=["*.bias"]).exclude == ("@embeddings", "*.bias")


@pytest.mark.parametrize("text", ["1e-400", "-0.0001e-9999", "1" + "e-330", "1e400", "-9e999"])
def test_a_number_that_float64_would_make_zero_or_infinite_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is beyond what float64 holds"):
        numbers("--lambda", text)


def test_zero_has_no_sign() -> None:
    assert repr(numbers("--lambda", "-0,-0e7,0.0")) == "(0.0, 0.0, 0.0)"


def test_seeds_mean_the_same_everywhere() -> None:
    assert read_seeds("0-4, 7") == [0, 1, 2, 3, 4, 7]
    assert read_seeds(str(2**64 - 1)) == [2**64 - 1]
    with pytest.raises(UsageError, match=r"larger than 2\^63-1"):
        read_seeds(str(2**63), 2**63 - 1)


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
    with pytest.raises(UsageError, match=r"\{noise-std\} stands for nothing in this run"):
        outs("{noise-std}", lam="0.1")


def test_other_braces_stay() -> None:
    assert outs("{1}{lambda}{}{{seed}}{a.b}", lam="0.1") == ["{1}0.1{}{0}{a.b}"]


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("lamda", "Write {lambda}"),
        ("Seed", "Write {seed}"),
        ("noise_std", "Write {noise-std}"),
        ("x", "or {seed}"),
    ],
)
def test_a_word_in_braces_that_stands_for_nothing_is_refused(word: str, advice: str) -> None:
    with pytest.raises(UsageError, match=re.escape(advice)):
        outs(f"o-{{{word}}}-{{seed}}", noise_std="0.1")


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
        ({"lam": "0.1,"}, "is not a number"),
        ({"lam": "0.1;0.2"}, "is not a number"),
        ({"lam": "1_0"}, "is not a number"),
        ({"lam": "０.１"}, "is not a number"),
        ({"noise_std": "1,1e0"}, "twice"),
        ({"noise_std": "a"}, "is not a number"),
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


@pytest.mark.parametrize(
    ("out", "words"), [("", "--out is empty"), ("-", "goes to standard output without it")]
)
def test_a_report_without_a_name(
    out: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(save(tmp_path / "model.safetensors", {"w": weights("F32", 30)}))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (
        ("inspect", source),
        ("inspect", source, "--histogram", "w"),
        ("compare", source, source),
    ):
        result = CliRunner().invoke(app, [*command, "-o", out])
        assert result.exit_code == 2, command
        assert words in result.stderr
        refused = CliRunner().invoke(app, [*command, "-o", "missing/report.csv"])
        assert refused.exit_code == 5, command
        assert "missing/report.csv: the folder it is to lie in is not there" in refused.stderr
    assert list((tmp_path / "here").iterdir()) == []
