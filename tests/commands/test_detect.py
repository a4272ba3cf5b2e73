"""detect: the noise of a seed found again, and not where it is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import STORED, Tensor, Tensors, floats, noised, save, weights
from runs import run
from typer.testing import CliRunner, Result

from noisytune_cli.cli.app import app
from noisytune_cli.commands.average import average
from noisytune_cli.commands.compare import compare
from noisytune_cli.commands.detect import Detection, SeedScore, detect
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.noise import stream
from noisytune_cli.records import NoiseSpec, Term, mixed_strength

BASE = {
    "layer.0.weight": weights("F32", 300, 200, seed=1),
    "layer.1.weight": weights("BF16", 200, 100, seed=2),
    "layer.0.bias": weights("F16", 300, seed=3, centre=1.0, width=0.1),
    "norm.weight": Tensor("F32", np.ones(64, "<f4")),
}


def noisy(tensors: Tensors = BASE, **noise: Any) -> dict[str, Tensor]:
    """The tensors with noise, by the reference; constants stay."""
    done = noised({n: t for n, t in tensors.items() if n != "norm.weight"}, NoiseSpec(**noise))
    return {
        name: Tensor(t.dtype, np.frombuffer(done[name], STORED[t.dtype]).reshape(t.values.shape))
        if name in done
        else t
        for name, t in tensors.items()
    }


def look(path: Path, *seeds: int, **options: Any) -> Detection:
    return detect(str(path), seeds=seeds, **options)


def only(found: Detection) -> SeedScore:
    (score,) = found.seeds
    return score


@pytest.fixture
def suspect(tmp_path: Path) -> Path:
    return save(tmp_path / "model.safetensors", noisy(seed=7))


def test_a_seed_is_found_and_others_are_not(suspect: Path) -> None:
    found = look(suspect, 6, 7, 8)
    assert found.found
    assert [(score.seed, score.found) for score in found.seeds] == [(6, False), (7, True), (8, False)]
    score = found.seeds[1]
    assert (score.distribution, score.renaming) == ("uniform", "")
    assert score.low < 0.15 < score.high
    assert score.z == pytest.approx(0.15 * math.sqrt(80_300 / 12), rel=0.15)
    assert (found.tensors, found.elements) == (4, 80_364)
    assert [t.name for t in score.tensors] == ["layer.0.weight", "layer.1.weight", "layer.0.bias"]
    assert found.seeds[0].tensors == ()


def test_the_numbers_are_those_of_numpy(suspect: Path) -> None:
    score = only(look(suspect, 7, distribution="uniform"))
    zs, sizes = [], []
    for name, tensor in noisy(seed=7).items():
        if name != "norm.weight":
            x = np.array(floats(tensor))
            c = stream.coefficients("uniform", 7, name, 0, x.size).astype(np.float64)
            c -= c.mean()
            zs.append(((x - x.mean()) / x.std(ddof=1) * c).sum() / math.sqrt((c * c).sum()))
            sizes.append(12 * (c * c).sum())
    assert [t.z for t in score.tensors] == pytest.approx(zs, rel=1e-5)
    w = np.sqrt(sizes)
    z = (w * zs).sum() / math.sqrt((w * w).sum())
    assert score.z == pytest.approx(z, rel=1e-5)
    lam = math.sqrt(12 / (w * w).sum()) * z / math.sqrt(1 - z * z / 80_300)
    assert score.lam == pytest.approx(lam, rel=1e-5)
    assert (score.high - score.low) / 2 == pytest.approx(1.96 * math.sqrt(12 / (w * w).sum()), rel=1e-3)
    assert score.log10_p == pytest.approx(math.log10(math.erfc(z / math.sqrt(2))), rel=1e-3)


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_lambda_is_in_its_interval_in_95_of_100(tmp_path: Path, distribution: str) -> None:
    base = {"w": weights("F32", 100, 50, seed=4), "v": weights("F32", 3000, seed=5)}
    inside = 0
    for seed in range(100):
        path = save(
            tmp_path / f"{seed}.safetensors", noisy(base, seed=seed, lam=0.4, distribution=distribution)
        )
        score = only(look(path, seed, distribution=distribution))
        inside += score.low <= 0.4 <= score.high
    assert 90 <= inside <= 99


def test_no_noise_is_no_and_z_is_standard_normal(tmp_path: Path) -> None:
    found = look(save(tmp_path / "clean.safetensors", BASE), *range(200), distribution="uniform")
    zs = np.array([score.z for score in found.seeds])
    assert not found.found
    assert abs(zs.mean()) < 0.35
    assert 0.8 < zs.std() < 1.2


def test_gaussian_and_negative_noise_are_told(tmp_path: Path) -> None:
    path = save(tmp_path / "g.safetensors", noisy(seed=2, distribution="gaussian", lam=0.2))
    score = only(look(path, 2))
    assert score.distribution == "gaussian"
    assert score.low < 0.2 < score.high
    base, minus = BASE["layer.0.weight"].values, noisy(seed=7)["layer.0.weight"].values
    flipped = Tensor("F32", (base - (minus - base)).astype("<f4"))
    score = only(look(save(tmp_path / "m.safetensors", {"layer.0.weight": flipped}), 7))
    assert score.found
    assert score.low < -0.15 < score.high


def test_the_base_makes_it_sharp(suspect: Path, tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", BASE)
    blunt, sharp = only(look(suspect, 7)), only(look(suspect, 7, base=str(base)))
    assert sharp.low < 0.15 < sharp.high
    assert sharp.z > 10 * blunt.z
    assert sharp.high - sharp.low < 0.1 * (blunt.high - blunt.low)
    assert sharp.distribution == "uniform"
    assert not look(suspect, 8, base=str(base)).found


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("bert.{}", "without bert."),
        ("base_model.model.{}", "without base_model.model."),
    ],
)
def test_a_prefix_more_is_found(tmp_path: Path, names: str, said: str) -> None:
    renamed = {names.format(name): tensor for name, tensor in noisy(seed=7).items()}
    score = only(look(save(tmp_path / "m.safetensors", renamed), 7))
    assert (score.found, score.renaming) == (True, said)


def test_a_wrapper_less_is_found(tmp_path: Path) -> None:
    wrapped = noisy({f"module.{name}": t for name, t in BASE.items() if name != "norm.weight"}, seed=7)
    bare = {name.removeprefix("module."): tensor for name, tensor in wrapped.items()}
    score = only(look(save(tmp_path / "m.safetensors", bare), 7))
    assert (score.found, score.renaming) == (True, "with module. before")


def test_a_rule_finds_any_renaming(tmp_path: Path) -> None:
    renamed = {name.replace("layer", "h"): tensor for name, tensor in noisy(seed=7).items()}
    path = save(tmp_path / "m.safetensors", renamed)
    assert not look(path, 7).found
    assert look(path, 7, maps=[("h.*", "layer.*")]).found


def test_a_manifest_has_names_seed_and_distribution(tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "model.safetensors", {f"deep.er.{n}": t for n, t in BASE.items()})
    run(source, tmp_path / "out.safetensors", NoiseSpec(seed=11, distribution="gaussian", exclude=("*bias",)))
    shorter = dict(split_tensors(tmp_path / "out.safetensors", "deep.er."))
    path = save(tmp_path / "renamed.safetensors", shorter)
    found = look(path, manifest=str(tmp_path / "out.safetensors"))
    score = only(found)
    assert (score.seed, score.distribution, score.found) == (11, "gaussian", True)
    assert [t.stream for t in score.tensors] == ["deep.er.layer.0.weight", "deep.er.layer.1.weight"]
    assert found.tests == 1
    assert found.warnings == ("names of the noise are those of the checkpoint with deep.er. before",)


def test_a_manifest_of_a_mixture_has_each_of_its_seeds(tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "model.safetensors", BASE)
    mix = (Term(21, 0.3), Term(22, 0.4, -1.0))
    run(source, tmp_path / "out.safetensors", NoiseSpec(lam=mixed_strength(mix), kept=0.5, mix=mix))
    out = str(tmp_path / "out.safetensors")
    found = look(Path(out), manifest=out, base=str(source))
    assert [(score.seed, score.found) for score in found.seeds] == [(21, True), (22, True)]
    assert found.seeds[0].z > 0 > found.seeds[1].z


def split_tensors(path: Path, prefix: str) -> list[tuple[str, Tensor]]:
    from checkpoints import split

    data = split(path.read_bytes())[1]
    return [
        (name, Tensor(t.dtype, np.frombuffer(data[prefix + name], STORED[t.dtype]).reshape(t.values.shape)))
        for name, t in BASE.items()
    ]


def test_each_seed_of_an_average_is_found(tmp_path: Path) -> None:
    base = {"w": weights("F32", 400, 200, seed=6)}
    paths = [
        str(save(tmp_path / str(seed) / "model.safetensors", noisy(base, seed=seed, lam=0.4)))
        for seed in (1, 2)
    ]
    average(paths, str(tmp_path / "mean.safetensors"))
    found = look(tmp_path / "mean.safetensors", 1, 2, 3)
    assert [score.found for score in found.seeds] == [True, True, False]
    assert found.seeds[0].low < 0.2 < found.seeds[0].high


def test_ties_have_one_stream_and_what_cannot_be_used_has_no_weight(tmp_path: Path) -> None:
    table = weights("F32", 300, 100, seed=8)
    tied = noisy({"wte.weight": table}, seed=7)["wte.weight"]
    broken = Tensor("F32", np.array([1.0, np.nan, 2.0], "<f4"))
    tensors = {
        "lm_head.weight": tied,
        "wte.weight": tied,
        "broken": broken,
        "ids": Tensor("I64", np.arange(3)),
    }
    score = only(look(save(tmp_path / "m.safetensors", tensors), 7))
    assert {t.name: t.stream for t in score.tensors} == {"wte.weight": "wte.weight"}


@pytest.mark.parametrize("known", ["names", "base", "manifest"])
def test_a_tie_counts_once(tmp_path: Path, known: str) -> None:
    """As often as it has names, z of absent seeds would have a std of 1.4, and λ's interval be too narrow."""
    torch = pytest.importorskip("torch")

    def store(name: str, seed: int) -> str:
        table, other = (
            torch.from_numpy(weights("F32", rows, 16, seed=seed + rows).values.copy()) for rows in (300, 16)
        )
        (tmp_path / name).mkdir()
        torch.save(
            {"lm_head.weight": table, "model.embed_tokens.weight": table, "model.norm.weight": other},
            tmp_path / name / "pytorch_model.bin",
        )
        return str(tmp_path / name)

    base, suspect = store("base", 1), store("suspect", 2)
    options: dict[str, Any] = {"base": base} if known == "base" else {}
    if known == "manifest":
        options["manifest"] = str(run(Path(base), tmp_path / "noisy", NoiseSpec(seed=999)).output)
    found = detect(suspect, seeds=range(300), distribution="uniform", **options)
    assert (found.tensors, found.elements) == (2, 316 * 16)
    zs = np.array([score.z for score in found.seeds])
    lams = [score.low <= 0 <= score.high for score in found.seeds]
    assert 0.85 < zs.std() < 1.15
    assert 0.92 < np.mean(lams) < 0.98
    if known == "base":
        assert compare(base, suspect, seeds=[1, 2]).seeds == look(Path(suspect), 1, 2, base=base).seeds


def test_threads_change_nothing(tmp_path: Path) -> None:
    tensors = {"w": weights("F32", 700, 500, seed=9), "v": weights("F64", 200_000, seed=10)}
    path = save(tmp_path / "m.safetensors", noisy(tensors, seed=7))
    assert look(path, 7, 8, threads=1) == look(path, 7, 8, threads=3)


def test_what_makes_no_sense_is_refused(suspect: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seed is missing"):
        look(suspect)
    with pytest.raises(UsageError, match="no such distribution"):
        look(suspect, 1, distribution="cauchy")
    other = save(tmp_path / "other.safetensors", {"w": weights("F32", 4)})
    with pytest.raises(InputInvalid, match="nothing to look at"):
        look(suspect, 1, base=str(other))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_says_it_in_a_line_a_seed(suspect: Path) -> None:
    result = invoke("detect", suspect, "--seed", "6-7")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith("seed 6  no ")
    assert second.startswith("seed 7  yes  λ 0.1")
    assert second.endswith("uniform")
    assert result.stderr == ""


def test_what_is_given_is_not_advised(suspect: Path) -> None:
    said = CliRunner().invoke(app, ["detect", str(suspect), "--seed", "99"]).stderr
    assert "Try other seeds, or give --manifest or --base" in said
    said = CliRunner().invoke(app, ["detect", str(suspect), "--seed", "99", "--base", str(suspect)]).stderr
    assert "--manifest" not in said


def test_no_is_exit_code_8_after_the_answer(suspect: Path) -> None:
    result = invoke("detect", suspect, "--seed", "8", "--json")
    assert result.exit_code == 8
    document = json.loads(result.stdout)
    assert (document["found"], document["base"], document["seeds"][0]["seed"]) == (False, None, "8")
    assert result.stderr.startswith(
        "noisytune: error: no such noise was found: model.safetensors: the largest z"
    )


def test_too_few_values_are_told_and_the_base_advised(tmp_path: Path) -> None:
    source = save(tmp_path / "model.safetensors", {"layer.0.weight": weights("F32", 50, 50)})
    noisy = tmp_path / "noisy.safetensors"
    assert invoke("perturb", source, "--seed", "3", "-o", noisy).exit_code == 0
    result = invoke("detect", noisy, "--manifest", noisy)
    assert result.exit_code == 8
    # Of 2,500 values λ has an error of √12 / 50 = 0.069; some five of them are needed.
    assert "here it would be found from a λ of some 0.3" in result.stderr
    assert "or give --base, by which weaker noise is found" in result.stderr
    assert invoke("detect", noisy, "--manifest", noisy, "--base", source).exit_code == 0


def test_the_document_has_each_tensor_of_a_seed_that_was_found(suspect: Path) -> None:
    document = json.loads(invoke("detect", suspect, "--seed", "7", "--json").stdout)
    (entry,) = document["seeds"]
    assert entry["tensors"][0]["stream"] == "layer.0.weight"
    assert (entry["distribution"], entry["renamed"]) == ("uniform", None)
    assert entry["p"] == pytest.approx(10 ** entry["log10_p"])
    assert document["tests"] == 2
