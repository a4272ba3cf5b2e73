"""What the options mean: which beats which, and which contradict each other."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, weights
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.cli.parse import make_noise, numbers, read_seeds
from noisytune_cli.errors import UsageError
from noisytune_cli.records import NoiseSpec

NOTHING: dict[str, Any] = {
    "lam": None,
    "noise_std": None,
    "seed": 0,
    "distribution": "uniform",
    "scope": "matrix",
    "include": (),
    "exclude": (),
    "rules": (),
    "preset": None,
}


def made(**options: Any) -> NoiseSpec:
    return make_noise(**NOTHING | options)


def test_the_default_is_the_papers() -> None:
    assert made() == NoiseSpec(lam=0.15, seed=0, distribution="uniform", scope="matrix")


def test_everything_is_passed_on() -> None:
    spec = made(lam=0.3, seed=7, distribution="gaussian", scope="global", include=["a"], exclude=["b"])
    assert spec == NoiseSpec(
        lam=0.3, seed=7, distribution="gaussian", scope="global", include=("a",), exclude=("b",)
    )


def test_noise_std_is_the_std_of_the_uniform_noise() -> None:
    assert made(noise_std=0.05).lam == math.sqrt(12) * 0.05
    assert made(noise_std=0.0).lam == 0.0
    with pytest.raises(UsageError, match="--noise-std"):
        made(lam=0.1, noise_std=0.1)


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
    assert made(preset="xtreme", lam=0.2).lam == 0.2
    assert made(preset="xtreme", noise_std=0.1).lam == math.sqrt(12) * 0.1
    assert made(preset="xtreme", include=["@embeddings"]).exclude == ()


@pytest.mark.parametrize(("out", "words"), [("", "--out is empty"), ("-", "standard output cannot hold")])
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


@pytest.mark.parametrize("text", ["1e-400", "-0.0001e-9999", "1" + "e-330"])
def test_a_number_that_float64_would_make_zero_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no number"):
        numbers("--lambda", text)


def test_zero_has_no_sign() -> None:
    assert repr(numbers("--lambda", "-0,-0e7,0.0")) == "(0.0, 0.0, 0.0)"


def test_seeds_mean_the_same_everywhere() -> None:
    assert read_seeds("0-4, 7") == [0, 1, 2, 3, 4, 7]
    assert read_seeds(str(2**64 - 1)) == [2**64 - 1]
    with pytest.raises(UsageError, match=r"larger than 2\^63-1"):
        read_seeds(str(2**63), 2**63 - 1)
