"""What a name alone says is a doubt: noise with a warning, unless --strict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import Tensor, save
from judged import (
    BY_STRUCTURE,
    BY_VALUES,
    FREQUENCIES,
    NOISE,
    drawn,
    noised,
    noisytune,
    told,
)

import noisytune_cli
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.errors import InputInvalid
from noisytune_cli.records import NoiseSpec

DOUBTS = ["bank.memory_bank", "head.class_weights", "loss_fn.weight", "normalizer.mean", "layers.3.ema"]
DOUBTS += ["normalizer.scale", "gaussian.inv_covariance", "energy_shifter.self_energies"]


def test_names_alone_are_perturbed_and_warned_of_once(tmp_path: Path) -> None:
    found = {name: drawn(3, seed=i) for i, name in enumerate(DOUBTS)} | {"a.weight": drawn(4, 4, seed=8)}
    done = noised(tmp_path, found)
    assert told(done) == dict.fromkeys(DOUBTS, (None, "names")) | {"a.weight": NOISE}
    (warning,) = done.warnings
    assert all(name in warning for name in DOUBTS)
    line = warning[warning.index("--exclude") :]
    assert line.count("--exclude") == len(DOUBTS)
    kept = [option.removeprefix("--exclude=").strip("'") for option in line.split()]
    noise = NoiseSpec(exclude=tuple(kept))
    again = perturb(Request(str(tmp_path / "m.safetensors"), noise), str(tmp_path / "kept.safetensors"))
    assert again.warnings == ()
    assert told(again) == dict.fromkeys(DOUBTS, ("excluded", None)) | {"a.weight": NOISE}
    report = inspect(str(tmp_path / "m.safetensors"))
    assert list(report.warnings) == [warning]
    state = {name: pytest.importorskip("torch").from_numpy(values) for name, values in found.items()}
    with pytest.warns(UserWarning, match="memory_bank"):
        noisytune_cli.perturb_(state)


#: What changes a tensor of one element, too.
CHANGING = [NoiseSpec(scope="absolute", lam=0.1), NoiseSpec(scope="global"), NoiseSpec(kept=0.5)]


@pytest.mark.parametrize("noise", CHANGING, ids=str)
def test_a_value_that_is_no_parameter_by_what_is_beside_it_stays(noise: NoiseSpec, tmp_path: Path) -> None:
    names = ["te_fc1.alpha", "unet.q.alpha", "model_ema.decay", "scale_factor"]
    others = ["logit_scale", "gate.alpha", "b.decay", "net.scale_factor"]
    factors = ["te_fc1.lora_down.weight", "te_fc1.lora_up.weight", "unet.q.hada_w1_a"]
    found = {name: Tensor("F32", drawn(1)[0]) for name in [*names, *others]}
    found |= {name: Tensor("F32", drawn(4, 4, seed=i)) for i, name in enumerate(factors)}
    found["model_ema.num_updates"] = Tensor("I32", np.array(3, np.int32))
    source = save(tmp_path / "m.safetensors", found)
    done = perturb(Request(str(source), noise, strict=True), str(tmp_path / "o.safetensors"))
    assert {name for name, what in told(done).items() if what == BY_STRUCTURE} == set(names)
    changed = {r.step.tensor.name for r in done.manifest.receipts if r.action != "copy"}
    assert changed == {*others, *factors}


@pytest.mark.parametrize("noise", CHANGING, ids=str)
def test_one_value_with_a_buffers_name_is_a_doubt_where_it_would_change(
    noise: NoiseSpec, tmp_path: Path
) -> None:
    found = {"reward_norm.mean": drawn(1)[0], "ema": drawn(1), "a.weight": drawn(4, 4)}
    found |= {"num_updates": drawn(1)[0], "observer.eps": drawn(1), "a.steps": drawn(3), "a.gate": drawn(1)}
    (warning,) = noised(tmp_path, found, noise=noise).warnings
    assert "reward_norm.mean, ema, num_updates, observer.eps: perturbed, though" in warning
    with pytest.raises(InputInvalid, match=r"--exclude=reward_norm\.mean"):
        noised(tmp_path, found, noise=noise, strict=True)
    assert noised(tmp_path, found, strict=True).warnings == ()


@pytest.mark.parametrize(
    "name",
    ["mean.weight", "queue.weight", "center.bias", "block.scale", "pi.log_std", "emb.position_embedding"],
)
def test_an_unlucky_name_gets_its_noise_without_a_word(name: str, tmp_path: Path) -> None:
    done = noised(tmp_path, {name: drawn(9), "a.weight": drawn(4, 4, seed=1)})
    assert told(done)[name] == NOISE
    assert done.warnings == ()


def test_many_doubts_are_one_line(tmp_path: Path) -> None:
    found = {f"layers.{i}.usage_count": drawn(9, seed=i) for i in range(40)} | {"a.weight": drawn(4, 4)}
    (warning,) = noised(tmp_path, found).warnings
    assert warning.endswith("--exclude='layers.*.usage_count'")
    assert "34 more" in warning


def test_strict_refuses_a_doubt(tmp_path: Path) -> None:
    found = {"normalizer.mean": drawn(9), "a.weight": drawn(4, 4, seed=1)}
    with pytest.raises(InputInvalid, match=r"--exclude=normalizer\.mean"):
        noised(tmp_path, found, strict=True)
    assert not (tmp_path / "o.safetensors").exists()
    source, out = tmp_path / "m.safetensors", tmp_path / "cli.safetensors"
    assert noisytune("perturb", source, "--strict", "-o", out).exit_code == 3
    assert noisytune("perturb", source, "--strict", "--dry-run").exit_code == 3
    done = noisytune("perturb", source, "--strict", "--exclude", "normalizer.mean", "-o", out)
    assert (done.exit_code, out.exists()) == (0, True)


def test_what_the_user_includes_is_a_parameter(tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", {"rope.freqs": Tensor("F32", FREQUENCIES.astype(np.float32))})
    noise = NoiseSpec(include=("rope.*",))
    done = perturb(Request(str(tmp_path / "m.safetensors"), noise), str(tmp_path / "o.safetensors"))
    assert told(done) == {"rope.freqs": NOISE}


@pytest.mark.parametrize("name", ["frozen_codebook", "rand_projs", "k_cache", "code_weights"])
def test_names_of_what_is_drawn_once_are_doubts(name: str, tmp_path: Path) -> None:
    (warning,) = noised(tmp_path, {f"head.{name}": drawn(9), "head.randomness": drawn(9, seed=1)}).warnings
    assert warning.startswith(f"head.{name}: perturbed, though")


@pytest.mark.parametrize("name", ["_ema_w", "_count", "class_freq", "label_priors", "cls_frequencies"])
def test_names_of_what_is_counted_are_doubts(name: str, tmp_path: Path) -> None:
    done = noised(
        tmp_path, {f"head.{name}": drawn(9), "head.weight": drawn(3, 9), "class_embed": drawn(3, 9)}
    )
    assert f"head.{name}: perturbed, though" in done.warnings[0]
    assert len(done.warnings) == 1


def test_vectors_called_mu_and_sigma_are_doubts_but_not_a_layers(tmp_path: Path) -> None:
    doubts = {"inputs_mu": drawn(1, 9), "inputs_sigma": drawn(1, 9, seed=1)}
    learned = {"conv.mu": drawn(3, 4), "conv.sigma": drawn(3, 4, seed=1), "fc.mu": drawn(9)}
    learned |= {"noisy.bias_mu": drawn(9), "noisy.bias_sigma": drawn(9, seed=1)}
    done = noised(tmp_path, doubts | learned)
    assert told(done) == dict.fromkeys(doubts, (None, "names")) | dict.fromkeys(learned, NOISE)


def test_a_kind_leaves_a_doubt(tmp_path: Path) -> None:
    found = {"norm.mean": drawn(9), "norm.weight": drawn(9, seed=1)}
    done = noised(tmp_path, found, noise=NoiseSpec(include=("@norm",)))
    assert "norm.mean: perturbed, though" in done.warnings[0]
    assert noised(tmp_path, found, noise=NoiseSpec(include=("@norm", "norm.mean"))).warnings == ()


def test_words_may_be_joined_by_hyphens(tmp_path: Path) -> None:
    statistics = "vae.per_channel_statistics."
    found = {
        f"{statistics}mean-of-means": drawn(16),
        f"{statistics}std-of-means": abs(drawn(16, seed=1)),
        f"{statistics}mean-of-stds": abs(drawn(16, seed=2)),
        "a.weight": drawn(4, 4),
    }
    done = noised(tmp_path, found)
    assert list(told(done).values()) == [BY_VALUES, BY_VALUES, (None, "names"), NOISE]
    assert f"{statistics}mean-of-stds: perturbed, though" in done.warnings[0]


@pytest.mark.parametrize("name", ["model.24.anchors", "model.105.anchor_grid", "generator.cell_anchors.0"])
def test_anchors_are_doubts(name: str, tmp_path: Path) -> None:
    done = noised(tmp_path, {name: drawn(3, 3, 2), "head.weight": drawn(3, 9), "blocks.0": drawn(3, 3)})
    assert f"{name}: perturbed, though" in done.warnings[0]
    assert "blocks" not in done.warnings[0]
