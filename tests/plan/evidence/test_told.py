"""What tells a buffer from a parameter beside its values: the checkpoint, a model, siblings."""

from __future__ import annotations

import collections
import importlib.util
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, save
from judged import (
    BY_CHECKPOINT,
    BY_STRUCTURE,
    BY_VALUES,
    FREQUENCIES,
    NOISE,
    drawn,
    noised,
    noisytune,
    pickled,
    tensors,
    told,
)

import noisytune_cli
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid
from noisytune_cli.records import NoiseSpec


def test_deepspeed_lists_buffers_parameters_and_ties(tmp_path: Path) -> None:
    module = tensors(**{"gate.usage": (9,), "pool.mean": (9,), "a.kernel": (9, 4), "b.weight": (3, 4)})
    module["z.kernel"] = module["a.kernel"].clone()
    done = pickled(
        tmp_path,
        {
            "module": module,
            "buffer_names": ["gate.usage"],
            "param_shapes": [collections.OrderedDict({"pool.mean": (9,), "a.kernel": (9, 4)})],
            "shared_params": {"z.kernel": "a.kernel"},
            "ds_version": "0.16",
        },
    )
    assert told(done) == {
        "gate.usage": BY_CHECKPOINT,
        "pool.mean": NOISE,
        "a.kernel": NOISE,
        "b.weight": NOISE,
        "z.kernel": NOISE,
    }
    digest = {receipt.step.tensor.name: receipt.digest for receipt in done.manifest.receipts}
    assert digest["z.kernel"] == digest["a.kernel"]
    assert done.warnings == ()


def frozen(**fragments: Any) -> dict[str, Any]:
    """What DeepSpeed saves of a model in which lin is frozen."""
    return {
        "module": tensors(**{"lin.weight": (4, 4), "top.weight": (4, 4), "my_table": (4, 9)}),
        "buffer_names": ["my_table"],
        "param_shapes": [collections.OrderedDict({"top.weight": (4, 4)})],
        "frozen_param_shapes": {"lin.weight": (4, 4)},
        "frozen_param_fragments": {"lin.weight": tensors(x=(4, 4))["x"], **fragments},
    }


@pytest.mark.parametrize("beside", [{}, {"other_model": {"top.weight": (3, 3)}}])
def test_deepspeeds_copy_of_a_frozen_weight_gets_its_noise(beside: dict[str, Any], tmp_path: Path) -> None:
    content = frozen() | {name: tensors(**shapes) for name, shapes in beside.items()}
    done = pickled(tmp_path, content)
    at = "module." if beside else ""
    expected = {f"{at}lin.weight": NOISE, f"{at}top.weight": NOISE, f"{at}my_table": BY_CHECKPOINT}
    expected |= {"frozen_param_fragments.lin.weight": NOISE}
    assert {name: what for name, what in told(done).items() if "other" not in name} == expected
    torch = pytest.importorskip("torch")
    noisy = torch.load(tmp_path / "o.pt", weights_only=True)
    copy = noisy["frozen_param_fragments"]["lin.weight"]
    assert torch.equal(copy, noisy["module"]["lin.weight"])
    assert not torch.equal(copy, content["module"]["lin.weight"])
    # The names, and with them the noise, are those of the same weights alone.
    if not beside:
        (tmp_path / "alone").mkdir()
        pickled(tmp_path / "alone", content["module"])
        alone = torch.load(tmp_path / "alone/o.pt", weights_only=True)
        assert torch.equal(alone["lin.weight"], copy)


def test_deepspeeds_shards_of_frozen_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputInvalid, match=r"a shard of DeepSpeed's ZeRO-3.*zero_to_fp32\.py"):
        pickled(tmp_path, frozen(**tensors(**{"lin.weight": (8,)})))


def test_weights_that_deepspeed_keeps_elsewhere_are_refused(tmp_path: Path) -> None:
    shapes = [collections.OrderedDict({"a.weight": (4, 4)})]
    module = tensors(**{"a.weight": (0,), "a.empty": (0, 4), "table": (4, 4)})
    with pytest.raises(InputInvalid, match=r"module\.a\.weight is empty: .*ZeRO-3.*zero_to_fp32\.py"):
        pickled(tmp_path, {"module": module, "param_shapes": shapes})


@pytest.mark.parametrize("wrong", ["gate.level", 7, None, [["gate.level"], 3, {}], {"x": 1}])
def test_lists_of_another_kind_say_nothing(wrong: Any, tmp_path: Path) -> None:
    content = {"module": tensors(**{"gate.level": (9,)}), "param_shapes": wrong, "shared_params": wrong}
    assert told(pickled(tmp_path, content | {"buffer_names": wrong})) == {"gate.level": NOISE}


@pytest.mark.parametrize("joint", [".", "/"])
def test_only_the_collection_of_parameters_is_learned(joint: str, tmp_path: Path) -> None:
    names = {
        "params norm mean": NOISE,
        "params dense kernel": NOISE,
        "spectral_stats dense u": BY_CHECKPOINT,
        "state norm hidden": BY_CHECKPOINT,
    }
    expected = {name.replace(" ", joint): what for name, what in names.items()}
    found = {name: drawn(9, seed=i) for i, name in enumerate(expected)}
    assert told(noised(tmp_path, found)) == expected


def test_a_module_called_params_is_no_collection(tmp_path: Path) -> None:
    found = {"params.0.weight": drawn(9), "encoder.norm.weight": drawn(9, seed=1)}
    assert set(told(noised(tmp_path, found)).values()) == {NOISE}


def test_lightning_has_losses_and_metrics_in_the_model(tmp_path: Path) -> None:
    state = tensors(
        **{
            "net.0.weight": (4, 4),
            "ce_loss.inner.weight": (5,),
            "criterion.center": (1, 9),
            "val_f1.confmat": (4, 4),
            "train_metrics.accuracy.total": (3,),
            "loss.discriminator.0.weight": (4, 4),
            "loss.discriminator.norm.weight": (4,),
            "loss.discriminator.norm.bias": (4,),
            "loss.log_vars": (3,),
            "metric_head.linear.weight": (4, 4),
            "glossary.weight": (4,),
            "first_stage.loss.perceptual_loss.net.slice1.0.weight": (4, 4, 3, 3),
            "lpips.net.lin0.model.1.weight": (1, 4, 1, 1),
        }
    )
    done = pickled(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.5", "epoch": 3})
    buffers = {"ce_loss.inner.weight", "criterion.center", "val_f1.confmat", "train_metrics.accuracy.total"}
    buffers |= {name for name in state if "perceptual" in name or "lpips" in name}
    assert told(done) == {name: BY_CHECKPOINT if name in buffers else NOISE for name in state}
    assert done.warnings == ()


def test_a_block_that_is_called_like_a_metric_is_a_block(tmp_path: Path) -> None:
    layers = {
        "net.f1.weight": (8, 4),
        "net.f1.bias": (8,),
        "net.r2.conv.weight": (4, 4, 3, 3),
        "net.r2.norm.weight": (4,),
        "mae.encoder.0.weight": (4, 4),
        "mae.mask_token_scale": (4,),
        "iou.weight": (4,),
        "iou.bias": (4,),
    }
    states = {
        "dice.confmat": (4, 4),
        "auroc.thresholds": (9,),
        "fid.inception.conv.weight": (4, 4),
        "metrics.f1.head.weight": (4, 4),
        "test_psnr.net.weight": (4, 4),
    }
    done = pickled(tmp_path, {"state_dict": tensors(**layers, **states), "pytorch-lightning_version": "2.5"})
    assert told(done) == dict.fromkeys(layers, NOISE) | dict.fromkeys(states, BY_CHECKPOINT)


def test_a_dictionary_that_only_sounds_like_a_loss_or_an_optimizer_is_a_model(tmp_path: Path) -> None:
    content = {
        "gloss_encoder": tensors(**{"a.weight": (4, 4), "a.scale": (4,)}),
        "optimus": tensors(**{"b.weight": (4, 4)}),
        "arcface_loss": tensors(weight=(9, 4), margins=(9,)),
        "center_loss": tensors(centers=(9, 4)),
    }
    done = pickled(tmp_path, content)
    names = ["a.weight", "a.scale", "b.weight", "weight", "margins"]
    assert told(done) == {**dict.fromkeys(names, NOISE), "centers": BY_CHECKPOINT}


def test_a_lone_vector_in_what_is_called_like_a_metric_is_a_doubt(tmp_path: Path) -> None:
    state = tensors(**{"net.0.weight": (4, 4), "f1.weight": (4,), "dice.weight": (3,), "acc.tp": (3,)})
    done = pickled(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.5"})
    assert told(done) == {
        "net.0.weight": NOISE,
        "f1.weight": (None, "names"),
        "dice.weight": (None, "names"),
        "acc.tp": BY_CHECKPOINT,
    }
    assert "f1.weight, dice.weight: perturbed, though" in done.warnings[0]


def test_a_loss_beside_the_models_is_shown_and_judged_by_its_path(tmp_path: Path) -> None:
    content = {
        "student": tensors(**{"module.a.weight": (4, 4)}),
        "teacher": tensors(**{"a.weight": (4, 4)}),
        "ibot_patch_loss": tensors(center2=(1, 9), center=(1, 7)),
    }
    done = pickled(tmp_path, content)
    assert told(done) == {
        "module.a.weight": NOISE,
        "a.weight": NOISE,
        "center2": BY_CHECKPOINT,
        "center": BY_CHECKPOINT,
    }
    rows = {row.name: row for row in inspect(str(tmp_path / "m.pt")).tensors}
    assert (rows["center"].path, rows["center"].told_by) == ("ibot_patch_loss.center", "checkpoint")
    shown = noisytune("perturb", tmp_path / "m.pt", "--dry-run", "--exclude", "student.*").stdout
    assert "ibot_patch_loss.center2  F32 1x9  copy (buffer, told by the checkpoint)" in shown
    # A pattern may name a tensor by its path; its noise is that of its name.
    assert "student.module.a.weight  F32 4x4  copy (excluded)" in shown


@pytest.mark.parametrize(
    ("copies", "weights_of"),
    [
        ({"ema_model.module.a.0.weight": "a.0.weight"}, {"a.0.weight"}),
        ({"model_ema.a0weight": "model.a.0.weight"}, {"model.a.0.weight"}),
        ({"unet_ema.a.0.weight": "unet.a.0.weight"}, {"unet.a.0.weight"}),
        # NanoDet and icefall, whose averages may be in float64.
        ({"avg_model.a.0.weight": "model.a.0.weight"}, {"model.a.0.weight"}),
        ({"model_avg.a.0.weight": "model.a.0.weight"}, {"model.a.0.weight"}),
        ({"netG_EMA.a.0.weight": "netG.a.0.weight"}, {"netG.a.0.weight"}),
        # mmcv, whose copies are buffers of the model, and imagen-pytorch, whose averages are a list.
        ({"ema_a_conv_0_weight": "a.conv.0.weight"}, {"a.conv.0.weight"}),
        ({"module.ema_a_0_weight": "module.a.0.weight"}, {"module.a.0.weight"}),
        (
            {"ema.0.ema_model.a.weight": "unets.0.a.weight", "ema.1.ema_model.b.weight": "unets.1.b.weight"},
            {"unets.0.a.weight", "unets.1.b.weight"},
        ),
    ],
)
def test_an_average_of_a_weight_is_no_weight(
    copies: dict[str, str], weights_of: set[str], tmp_path: Path
) -> None:
    found = {name: drawn(4, 4, seed=i) for i, name in enumerate([*copies, *weights_of])}
    expected = dict.fromkeys(copies, BY_CHECKPOINT) | dict.fromkeys(weights_of, NOISE)
    assert told(noised(tmp_path, found)) == expected


@pytest.mark.parametrize(
    ("copies", "weights"),
    [
        # MEGA, YOLO: a layer called so that is like another one here and there, or everywhere.
        ([], ["layers.0.ema.proj.weight", "layers.0.ema.omega", "layers.0.attn.proj.weight"]),
        ([], ["model.4.ema.conv1x1.weight", "model.3.conv1x1.weight"]),
        ([], ["layers.0.ema_attn.proj.weight", "layers.0.attn.proj.weight"]),
        ([], ["encoder.ema.proj.weight", "encoder.attn.proj.weight"]),
        ([], ["ema.proj.weight", "ema.omega", "attn.proj.weight"]),
        (["ema.l.0.ema.p.weight", "ema.l.0.q.weight"], ["l.0.ema.p.weight", "l.0.q.weight"]),
        (["net.ema.module.a.0.weight"], ["net.model.a.0.weight", "net.head.a.0.weight"]),
        (["module.unet_ema.a.0.weight"], ["module.unet.a.0.weight"]),
        ([], ["fc_avg.a.weight", "fc_max.a.weight"]),
        ([], ["ema.0.a.weight", "blocks.0.b.weight"]),
        ([], ["avg_model.a.weight", "model.b.weight"]),
        (["ema.ema_model.a.0.weight", "ema.online_model.a.0.weight"], ["unet.a.0.weight"]),
    ],
)
def test_a_layer_that_is_called_ema_is_no_average(
    copies: list[str], weights: list[str], tmp_path: Path
) -> None:
    found = {name: drawn(4, 4, seed=i) for i, name in enumerate([*copies, *weights])}
    expected = dict.fromkeys(copies, BY_CHECKPOINT) | dict.fromkeys(weights, NOISE)
    assert told(noised(tmp_path, found)) == expected


def test_a_weight_that_lies_among_its_averages_too_is_a_weight(tmp_path: Path) -> None:
    weight = tensors(x=(4, 4))["x"]
    copy = tensors(**{"ema_model.a.0.weight": (4, 4)})
    content = {"model": {"a.0.weight": weight}, "ema": {"online_model.a.0.weight": weight, **copy}}
    assert told(pickled(tmp_path, content)) == {
        "a.0.weight": NOISE,
        "online_model.a.0.weight": NOISE,
        "ema_model.a.0.weight": BY_CHECKPOINT,
    }


def test_averages_without_noise_are_warned_of(tmp_path: Path) -> None:
    """Real-ESRGAN takes `params_ema` where it is there, YOLOv5 `ema`."""
    content = {"params": tensors(**{"a.weight": (4, 4)}), "params_ema": tensors(**{"a.weight": (4, 4)})}
    (warning,) = pickled(tmp_path, content).warnings
    assert warning.startswith("params_ema.a.weight: an average (EMA) of other weights, left without")
    only = NoiseSpec(include=("params_ema.*",))
    done = perturb(Request(str(tmp_path / "m.pt"), only), str(tmp_path / "ema.pt"))
    assert done.warnings == ()
    assert told(done) == {"params.a.weight": ("excluded", None), "params_ema.a.weight": NOISE}


def test_averages_that_are_all_there_is_are_the_weights(tmp_path: Path) -> None:
    found = {"ema.a.0.weight": drawn(4, 4), "ema_gate.damping": drawn(9, seed=1)}
    assert set(told(noised(tmp_path, found)).values()) == {NOISE}


@pytest.mark.parametrize(
    ("method", "kept", "learned"),
    [
        ("RANDLORA", ["randlora_A", "randlora_B"], ["m.0.q.randlora_lambda", "m.0.q.randlora_gamma"]),
        ("TINYLORA", ["m.0.q.tinylora_A", "m.0.q.tinylora_P"], ["m.0.q.tinylora_v"]),
        ("VBLORA", [], ["vblora_vector_bank", "m.0.q.vblora_logits_A"]),
        ("LORA", [], ["m.0.q.lora_A.weight", "m.0.q.lora_B.weight"]),
    ],
)
def test_an_adapters_layers_say_what_they_learn(
    method: str, kept: list[str], learned: list[str], tmp_path: Path
) -> None:
    if importlib.util.find_spec("peft") is None:  # its import takes seconds, its source is enough
        pytest.skip("peft is not installed")
    found = {name: Tensor("F32", drawn(9, 4, seed=i)) for i, name in enumerate([*kept, *learned])}
    save(tmp_path / "m/adapter_model.safetensors", found)
    (tmp_path / "m/adapter_config.json").write_text(json.dumps({"peft_type": method}))
    done = perturb(Request(str(tmp_path / "m"), NoiseSpec()), str(tmp_path / "o"))
    assert told(done) == dict.fromkeys(kept, BY_CHECKPOINT) | dict.fromkeys(learned, NOISE)


def test_layers_that_share_two_projections_do_not_learn_them(tmp_path: Path) -> None:
    shared = {"base.newlora_A": BY_STRUCTURE, "base.newlora_B": BY_STRUCTURE}
    own = ["base.l.0.q.newlora_lambda_b", "base.l.1.q.newlora_lambda_b"]
    own += [f"base.l.{i}.q.lora_{end}" for i in (0, 1) for end in "AB"]
    found = {name: drawn(9, 4, seed=i) for i, name in enumerate([*shared, *own])}
    assert told(noised(tmp_path, found)) == shared | dict.fromkeys(own, NOISE)


@pytest.mark.parametrize("method", ["W", "attn"])
def test_projections_beside_layers_with_their_own_are_learned(method: str, tmp_path: Path) -> None:
    names = [f"{method}_A", f"{method}_B", f"blocks.0.{method}_q", f"blocks.0.{method}_out"]
    found = {name: drawn(9, 4, seed=i) for i, name in enumerate(names)}
    assert told(noised(tmp_path, found)) == dict.fromkeys(names, NOISE)


PAIRS: dict[str, tuple[list[str], list[str]]] = {
    "StyleGAN": (["input.freqs", "input.phases"], ["input.weight", "other.freqs"]),
    "MACE": (["c.U_matrix_2"], ["c.weights_max", "d.U_matrix_2"]),
    "pruned": (
        ["attn.in_proj_weight_mask", "attn.in_proj_bias_mask"],
        ["attn.in_proj_weight_orig", "attn.in_proj_bias_orig"],
    ),
    "spectral norm": (["c.weight_u", "c.weight_v"], ["c.weight_bar"]),
    "parametrized": (
        ["c.parametrizations.kernel.0._u", "c.parametrizations.kernel.0._v"],
        ["c.parametrizations.kernel.original", "c.parametrizations.kernel.1.scale_A"],
    ),
    "weight norm": ([], ["c.kernel_g", "c.kernel_v"]),
    "noisy layer": (["n.weight_epsilon"], ["n.weight_mu", "n.weight_sigma"]),
    "Bayesian layer": (["n.weight_eps"], ["n.weight_mu", "n.weight_log_sigma", "m.weight_eps"]),
    "Paddle": (["bn._mean", "bn._variance"], ["bn.weight", "bn.bias"]),
    "TF slim": (["bn/moving_mean", "bn/moving_var"], ["bn/gamma", "bn/beta"]),
    "a value's normaliser": (["v.running_mean", "v.running_mean_sq"], ["v.mean_sq_head"]),
    "sums": (["n._acc_sum", "n._acc_sum_squared"], ["n._acc_sum_head"]),
    "a policy": (["obs.running_mean", "obs.running_var"], ["net.weight"]),
    "schedule": (["betas", "alphas_cumprod", "lvlb_weights"], ["model.weight", "model.lvlb"]),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_siblings_tell(kind: str, tmp_path: Path) -> None:
    buffers, parameters = PAIRS[kind]
    found = {name: drawn(9, seed=i) for i, name in enumerate([*buffers, *parameters])}
    expected = dict.fromkeys(buffers, BY_STRUCTURE) | dict.fromkeys(parameters, NOISE)
    if not buffers:
        expected |= {"x.weight": NOISE}
        found |= {"x.weight": drawn(9, seed=9)}
    done = noised(tmp_path, found)
    assert told(done) == expected
    assert done.warnings == ()


def test_what_a_normaliser_keeps_beside_its_statistics_is_no_weight(tmp_path: Path) -> None:
    stats = {f"n.obs.input_stats.{name}": drawn(9, seed=i) for i, name in enumerate(["min", "mean"])}
    stats |= {f"n.obs.input_stats.{name}": 9 + np.abs(drawn(9)) for name in ("max", "std")}
    scales = {"n.obs.scale": drawn(9, seed=2), "n.obs.offset": drawn(9, seed=3)}
    learned = {"film.scale": drawn(9, seed=4), "film.offset": drawn(9, seed=5)}
    expected = dict.fromkeys(stats, BY_VALUES) | dict.fromkeys(scales, BY_STRUCTURE)
    assert told(noised(tmp_path, stats | scales | learned)) == expected | dict.fromkeys(learned, NOISE)


def test_a_queue_has_a_pointer_to_its_end(tmp_path: Path) -> None:
    found = {
        "bank.features": Tensor("F32", drawn(4, 9)),
        "bank.features_ptr": Tensor("I64", np.array([3])),
        "bank.features_proj": Tensor("F32", drawn(4, 9, seed=1)),
    }
    source = save(tmp_path / "m.safetensors", found)
    done = perturb(Request(str(source), NoiseSpec()), str(tmp_path / "o.safetensors"))
    assert told(done) == {
        "bank.features": BY_STRUCTURE,
        "bank.features_ptr": ("not-float", None),
        "bank.features_proj": NOISE,
    }


def test_what_a_weight_began_as_is_no_weight(tmp_path: Path) -> None:
    found = {
        "atomref.weight": drawn(40, 1),
        "initial_atomref": drawn(40, 1, seed=1),
        "rnn.initial_state": drawn(8),
        "rnn.state": drawn(9, seed=2),
    }
    expected = dict.fromkeys(found, NOISE) | {"initial_atomref": BY_STRUCTURE}
    assert told(noised(tmp_path, found)) == expected


def test_a_record_of_who_told_comes_back_and_an_older_one_without_it(tmp_path: Path) -> None:
    found = {"rope.freqs": FREQUENCIES, "b.mean": drawn(9), "a.weight": drawn(4, 4)}
    done = noised(tmp_path, found)
    path, base = done.manifest_path, str(tmp_path / "m.safetensors")
    assert told(done) == {"rope.freqs": BY_VALUES, "b.mean": (None, "names"), "a.weight": NOISE}
    assert verify(str(tmp_path / "o.safetensors"), base=base).ok
    written = path.read_text()
    for text in (written, re.sub(', "told_by": "[a-z]+"', "", written)):
        path.write_text(text)
        replay(str(path), str(tmp_path / "again/o.safetensors"), base=base)
        assert (tmp_path / "again/o.safetensors.noisytune.json").read_text() == text
        for left in (tmp_path / "again").iterdir():
            left.unlink()


def test_a_module_is_the_truth_in_memory() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Module()
    module.mean = torch.nn.Parameter(torch.from_numpy(drawn(9)))
    module.register_buffer("plain_weight", torch.from_numpy(drawn(9, seed=1)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noisytune_cli.perturb_(module)
    after = module.state_dict()
    assert not torch.equal(after["mean"], before["mean"])
    assert torch.equal(after["plain_weight"], before["plain_weight"])


def test_what_an_ema_codebook_sums_up_is_told_by_its_counts(tmp_path: Path) -> None:
    done = noised(
        tmp_path,
        {
            "vq._embedding.weight": drawn(16, 8),
            "vq._ema_w": drawn(16, 8, seed=1),
            "vq._ema_cluster_size": np.abs(drawn(16, seed=2)),
            "vq2.embedding": drawn(2, 4, 3, seed=5),
            "vq2.ema_weight": drawn(2, 4, 3, seed=6),
            "vq2.ema_count": np.abs(drawn(2, 4, seed=7)),
            "vq2.scale": drawn(3, seed=8),
            "other._ema_w": drawn(9, 8, seed=3),
            "net.cluster_size": drawn(16, seed=4),
        },
    )
    assert told(done) == {
        "vq._embedding.weight": NOISE,
        "vq._ema_w": BY_STRUCTURE,
        "vq._ema_cluster_size": BY_STRUCTURE,
        "vq2.embedding": BY_STRUCTURE,
        "vq2.ema_weight": BY_STRUCTURE,
        "vq2.ema_count": BY_STRUCTURE,
        "vq2.scale": NOISE,
        "other._ema_w": (None, "names"),
        "net.cluster_size": NOISE,
    }
    assert "other._ema_w" in done.warnings[0]


def test_a_copy_is_called_after_all_of_its_weights_path(tmp_path: Path) -> None:
    found = {"gate.ema_in_proj": drawn(4, 4), "gate.in_proj": drawn(4, 4, seed=1)}
    assert told(noised(tmp_path, found)) == {"gate.ema_in_proj": (None, "names"), "gate.in_proj": NOISE}


def test_a_scale_beside_whole_zero_points_is_no_weight(tmp_path: Path) -> None:
    found = {
        "conv.weight": Tensor("F32", drawn(9, 4)),
        "conv.weight_fake_quant.scale": Tensor("F32", abs(drawn(9, seed=1))),
        "conv.weight_fake_quant.zero_point": Tensor("I32", np.zeros(9, np.int32)),
        "learned.scale": Tensor("F32", abs(drawn(9, seed=2))),
        "learned.zero_point": Tensor("F32", drawn(9, seed=3)),
        "other.scale": Tensor("F32", abs(drawn(9, seed=4))),
        "other.zero_point": Tensor("I64", np.zeros(1, np.int64)),
    }
    source = save(tmp_path / "m.safetensors", found)
    expected = {
        "conv.weight": NOISE,
        "conv.weight_fake_quant.scale": BY_STRUCTURE,
        "conv.weight_fake_quant.zero_point": ("not-float", None),
        "learned.scale": NOISE,
        "learned.zero_point": NOISE,
        "other.scale": NOISE,
        "other.zero_point": ("not-float", None),
    }
    assert told(perturb(Request(str(source), NoiseSpec()), str(tmp_path / "o.safetensors"))) == expected
