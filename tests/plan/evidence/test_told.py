"""What tells a buffer from a parameter: the checkpoint, a model, siblings, values, and at last the name."""

from __future__ import annotations

import collections
import importlib.util
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, save
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import noisytune_cli
from noisytune_cli.cli.app import app
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Perturbed, Request, perturb, plan_perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid
from noisytune_cli.plan.evidence.computed import look
from noisytune_cli.plan.evidence.values import Values
from noisytune_cli.records import Conversion, NoiseSpec, TensorSpec

Told = dict[str, tuple[str | None, str | None]]

BY_CHECKPOINT, BY_STRUCTURE, BY_VALUES = (("buffer", by) for by in ("checkpoint", "structure", "values"))
NOISE = (None, None)


def noisytune(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def drawn(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def told(done: Perturbed) -> Told:
    """Reason and, of a buffer or a doubt, what told it, as the manifest says."""
    document = json.loads(done.manifest_path.read_bytes())
    return {t["name"]: (t.get("reason"), t.get("told_by")) for t in document["tensors"]}


def noised(
    tmp_path: Path, tensors: Mapping[str, NDArray[Any]], noise: NoiseSpec | None = None, **options: Any
) -> Perturbed:
    stored = {name: Tensor("F32", np.asarray(values, np.float32)) for name, values in tensors.items()}
    source = save(tmp_path / "m.safetensors", stored)
    out = tmp_path / "o.safetensors"
    return perturb(Request(str(source), noise or NoiseSpec(), **options), str(out), overwrite=True)


def pickled(tmp_path: Path, content: Any) -> Perturbed:
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "m.pt")
    return perturb(Request(str(tmp_path / "m.pt"), NoiseSpec()), str(tmp_path / "o.pt"))


def tensors(**shapes: tuple[int, ...]) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(drawn(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}


def test_the_plan_says_of_what_the_values_decide(tmp_path: Path) -> None:
    shapes = {
        "net.0.weight": (8, 8),
        "net.0.bias": (8,),
        "net.q_proj": (8, 8),
        "embeddings.word_embeddings.weight": (16, 4),
        "embeddings.position_embeddings.weight": (16, 4),
        "pos_embed": (1, 16, 4),
        "obs.mean": (3,),
        "obs.std": (3,),
        "obs.gain": (3,),
        "x.running_mean": (8,),
        "x.running_var": (8,),
    }
    stored = {name: Tensor("F32", drawn(*shape)) for name, shape in shapes.items()}
    source = save(tmp_path / "m.safetensors", stored)
    left_open = ["embeddings.position_embeddings.weight", "pos_embed", "obs.mean", "obs.std"]

    steps = plan_perturb(Request(str(source), NoiseSpec())).plan.steps
    assert [step.tensor.name for step in steps if "computed" in step.unsure] == left_open
    dry = noisytune("perturb", source, "--dry-run")
    assert "pos_embed  F32 1x16x4  perturb λ=0.15; unless constant or non-finite or computed" in dry.stdout
    rows = inspect(str(source), headers_only=True).tensors
    assert [row.name for row in rows if "computed" in row.unsure] == left_open
    assert not any(row.unsure for row in inspect(str(source)).tensors)
    # What the user includes is a parameter whatever its values.
    included = plan_perturb(Request(str(source), NoiseSpec(include=("*",)))).plan.steps
    assert not any("computed" in step.unsure for step in included)


# The checkpoint itself.


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


def test_what_is_called_after_cosines_is_a_table_if_its_values_are(tmp_path: Path) -> None:
    table = sinusoids(64, 16)
    tables = {"rope.cos_emb": table[:, 8:], "rope.sin_emb": table[:, :8]}
    learned = {"kan.cos_amplitudes": drawn(64, 8), "kan.sin_amplitudes": drawn(64, 8, seed=1)}
    # Of angles that follow no formula, in any number, multiplied and rounded to BF16.
    angles = drawn(9, 30, seed=2) * 9
    rounded = [
        (np.float32(1.3) * wave(angles).astype(np.float32)).view(np.uint32) + 0x8000 & 0xFFFF0000
        for wave in (np.cos, np.sin)
    ]
    tables |= {"r.freqs_cos": rounded[0].view(np.float32), "r.freqs_sin": rounded[1].view(np.float32)}
    tables |= {"s.cos": np.cos(angles), "s.sin": np.sin(angles)}
    learned |= {"w.freqs_cos": drawn(9, 4, seed=3), "w.freqs_sin": drawn(9, 4, seed=4)}
    learned |= {"one.cos": np.cos(angles[0, :4]), "one.sin": np.sin(angles[0, :4])}
    expected = dict.fromkeys(tables, BY_VALUES) | dict.fromkeys(learned, NOISE)
    assert told(noised(tmp_path, tables | learned)) == expected
    plan = plan_perturb(Request(str(tmp_path / "m.safetensors"), NoiseSpec())).plan
    assert "computed" in {step.tensor.name: step.unsure for step in plan.steps}["w.freqs_cos"]


# Structure: siblings that only exist together, and what stands beside them.

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


# Values: what a formula gives.


def sinusoids(length: int, width: int, base: float = 10_000.0) -> NDArray[Any]:
    angle = np.arange(length)[:, None] / base ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


def unit(*shape: int, axis: int) -> NDArray[Any]:
    values = drawn(*shape)
    return values / np.linalg.norm(values, axis=axis, keepdims=True)


_BETAS = np.linspace(0.01, 0.11, 1000) ** 2
_KEPT = np.cumprod(1 - _BETAS)
_FREQUENCIES = 500_000.0 ** (-np.arange(64) / 64)
_GRID = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2)
_FIR = np.sinc(np.arange(-5.5, 6) / 2) * np.kaiser(12, 5)

COMPUTED: dict[str, NDArray[Any]] = {
    "table": sinusoids(100, 16),
    "table of other axes": sinusoids(64, 16, 100.0)[None, :, None],
    "table with padding": np.concatenate([sinusoids(40, 8)[:1], np.zeros((1, 8)), sinusoids(40, 8)[2:]]),
    "long table": sinusoids(5000, 8),
    "grid": np.concatenate([sinusoids(12, 8)[_GRID[:, 0]], sinusoids(12, 8)[_GRID[:, 1]]], 1)[None],
    "coordinates": _GRID * 0.5,
    "rotary cache": np.stack([sinusoids(64, 8), sinusoids(64, 8)[:, ::-1]], -1),
    "cosine transform": np.cos(np.pi / 16 * (np.arange(16) + 0.5) * np.arange(16)[:, None]),
    "frequencies": _FREQUENCIES,
    "frequencies by band": np.where(np.arange(64) < 40, _FREQUENCIES, _FREQUENCIES / 8),
    "slopes": (2.0 ** -np.arange(1, 9))[:, None, None],
    "timesteps": np.arange(999, -1, -1.0),
    "sigmas": np.sqrt((1 - _KEPT) / _KEPT),
    "log sigmas": np.log((1 - _KEPT) / _KEPT),
    "levels": np.append(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 40) ** 7, 0),
    "knots": np.tile(np.linspace(-1, 1, 12)[:, None], (1, 5)),
    "window": np.hanning(64),
    "periodic window": np.hamming(65)[:64],
    "filter": _FIR[None, None],
    "kernel": np.outer([1, 3, 3, 1], [1, 3, 3, 1])[None, None] / 64.0,
    "transform": np.cos(np.arange(9)[:, None] * np.arange(40) * 2 * np.pi / 40) * np.hanning(41)[:40],
    "mask": np.tril(np.ones((9, 9))),
    "additive mask": np.triu(np.full((9, 9), -1e4), 1),
    "signs": np.where(drawn(9, 9) > 0, 1.0, -1.0),
    "unit columns": unit(6, 40, axis=0),
    "unit rows": unit(40, 6, axis=1),
    "orthogonal rows": np.linalg.qr(drawn(24, 24))[0] * (1 + np.arange(24.0))[:, None],
    "random features": np.concatenate([np.linalg.qr(drawn(16, 16, seed=i))[0] * (2 + i) for i in range(3)])[
        :40
    ],
    "lattice": np.indices((4, 3, 5)).reshape(3, -1).T / 4,
    "powers": (np.arange(24) / 24) ** np.arange(4)[:, None],
    "powers up to one": (np.arange(24) / 24) ** np.arange(2)[:, None],
    "few counts": np.array([71.0, 94, 66, 38, 81, 120, 67, 77, 53, 18, 22]),
    "counts": np.floor(9 * np.abs(drawn(300))),
    "resolutions": np.floor(16 * 1.38 ** np.arange(16)),
    "channels first": np.moveaxis(sinusoids(12, 16)[_GRID], 2, 0).transpose(0, 2, 1).reshape(32, 12, 12),
}

_SORTED = np.sort(drawn(64, seed=3))

LEARNED: dict[str, NDArray[Any]] = {
    "table": drawn(64, 16),
    "smooth table": np.cumsum(drawn(64, 16), 0) * 0.02,
    "table that moved": sinusoids(64, 16) + 0.01 * drawn(64, 16),
    "frequencies that moved": _FREQUENCIES * (1 + 0.02 * drawn(64)),
    "levels that moved": np.linspace(0, 1, 64) + 5e-3 * drawn(64),
    "sorted": _SORTED,
    "thresholds": _SORTED[::8],
    "scale": 1 + 0.01 * drawn(64),
    "pruned": drawn(16, 16) * (drawn(16, 16, seed=1) > 1),
    "nearly unit": unit(40, 6, axis=1) * 1.05,
    "kernel": drawn(1, 1, 4, 4),
    "few": np.arange(6.0),
    "where fractions have no room": np.round(400 + 40 * drawn(64)) * 64,
    "whole but for one": np.append(np.floor(99 * drawn(64)), 0.5),
    "rotations": unit(40, 4, axis=1),
    "blocks": np.kron(np.eye(4), drawn(4, 4) + 1),
    "halves": np.round(drawn(60, 3) * 2) / 2,
}


@pytest.mark.filterwarnings(
    "ignore:.*left more than half", "ignore:.*half of the values"
)  # of what was learned
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_what_was_computed_is_told_from_what_was_learned(dtype: str, tmp_path: Path) -> None:
    """Values alone tell what becomes of a tensor, on disk as in a state dict in memory."""
    torch = pytest.importorskip("torch")
    spelt = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[dtype]
    values = {f"computed.{kind}.x0": array for kind, array in COMPUTED.items()}
    values |= {f"learned.{kind}.x0": array for kind, array in LEARNED.items()}
    # A few steps of 4 % cannot be told from the roundings of F16, nor a dozen of 9 % from BF16's.
    powers = ["powers", "powers up to one"]
    lost = {"F16": powers, "BF16": [*powers, "knots", "coordinates", "resolutions"]}
    for kind in lost.get(dtype, []):
        del values[f"computed.{kind}.x0"]
    state = {
        name: torch.tensor(np.ascontiguousarray(array), dtype=torch.float64).to(spelt)
        for name, array in values.items()
    }
    done = pickled(tmp_path, state)
    assert told(done) == {name: BY_VALUES if name.startswith("computed") else NOISE for name in values}
    noisytune_cli.perturb_(state)
    on_disk = torch.load(tmp_path / "o.pt", weights_only=True)
    assert [name for name in state if not torch.equal(state[name], on_disk[name])] == []


@pytest.mark.parametrize("name", ["norm.weight", "q_proj", "lora_B", "proj.bias", "gamma"])
def test_weights_at_their_initial_values_are_weights(name: str, tmp_path: Path) -> None:
    half = np.repeat([0.0, 1.0], 8)
    found = {name: half, f"m.{name}": np.linspace(0, 1, 16), "x.weight": drawn(4, 4)}
    assert set(told(noised(tmp_path, found)).values()) == {NOISE}


def test_masks_and_permutations_may_be_called_by_a_letter(tmp_path: Path) -> None:
    """As flows do; a matrix that begins as the identity is learned from there."""
    computed = {
        "flows.0.b": np.tile([[1.0, 0.0]], 8),
        "flows.1.P": np.eye(12)[np.random.default_rng(0).permutation(12)],
    }
    learned = {
        "flows.1.U": np.eye(12),
        "flows.1.L": np.tril(drawn(12, 12)),
        "ssm.D": np.repeat([0.0, 1.0], 8),
    }
    expected = dict.fromkeys(computed, BY_VALUES) | dict.fromkeys(learned, NOISE)
    assert told(noised(tmp_path, computed | learned)) == expected


def test_a_progression_may_rise_from_a_level(tmp_path: Path) -> None:
    computed = {
        "confidence_thresholds": 0.8 + 0.1 * np.exp(-4 * np.arange(9) / 9),
        "squared_bins": np.linspace(3.25, 20.75, 15) ** 2,
        "raised_cosine": 0.54 - 0.46 * np.cos(np.arange(12) / 5),
    }
    learned = {f"moved.{name}": values * (1 + 1e-3 * drawn(len(values))) for name, values in computed.items()}
    expected = dict.fromkeys(computed, BY_VALUES) | dict.fromkeys(learned, NOISE)
    assert told(noised(tmp_path, computed | learned)) == expected


def test_what_a_weight_began_as_is_no_weight(tmp_path: Path) -> None:
    found = {
        "atomref.weight": drawn(40, 1),
        "initial_atomref": drawn(40, 1, seed=1),
        "rnn.initial_state": drawn(8),
        "rnn.state": drawn(9, seed=2),
    }
    expected = dict.fromkeys(found, NOISE) | {"initial_atomref": BY_STRUCTURE}
    assert told(noised(tmp_path, found)) == expected


def test_an_embedding_may_hold_a_table_of_sinusoids(tmp_path: Path) -> None:
    found = {
        "embed_positions.weight": sinusoids(64, 16),
        "minute_embed.emb.weight": sinusoids(4, 16).reshape(4, 2, 8).swapaxes(1, 2).reshape(4, 16),
        "weekday_embed.emb.weight": sinusoids(7, 16),
        "month_embed.emb.weight": np.concatenate([sinusoids(1, 16), drawn(3, 16)]),
        "embed_tokens.weight": np.concatenate([np.zeros((1, 16), np.float32), drawn(63, 16)]),
    }
    done = noised(tmp_path, found)
    learned = dict.fromkeys(("month_embed.emb.weight", "embed_tokens.weight"), NOISE)
    assert told(done) == dict.fromkeys(found, BY_VALUES) | learned


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (("n.mean", "n.std"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),
        (("n.mel_mean", "n.mel_variance"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),
        (("n.state.min", "n.state.max"), (-abs(drawn(9)), abs(drawn(9, seed=1))), BY_VALUES),
        (("bn/~/mean_ema/average", "bn/~/var_ema/average"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),
        (("cmvn.mean", "cmvn.istd"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),  # WeNet
        (("n.acc_sum", "n.acc_sum_squared"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),  # MeshGraphNets
        (("n.mean", "n.M2"), (drawn(9), abs(drawn(9, seed=1))), BY_VALUES),
        (("pinn.lb", "pinn.ub"), (-abs(drawn(9)), abs(drawn(9, seed=1))), BY_VALUES),
        (("x.q01", "x.q99"), (-abs(drawn(9)), abs(drawn(9, seed=1))), BY_VALUES),
        (("x.lower", "x.upper"), (drawn(9), drawn(9, seed=1)), NOISE),
        (("n.sum", "n.sum_squared"), (drawn(9), drawn(9, seed=1)), NOISE),
        (("n.mean", "n.std"), (drawn(9), drawn(9, seed=1)), (None, "names")),
        (("film.shift", "film.scale"), (drawn(9), abs(drawn(9, seed=1))), NOISE),
        (("prior.mean", "prior.log_std"), (drawn(9), abs(drawn(9, seed=1))), None),
    ],
)
def test_a_mean_and_its_spread_are_statistics(
    names: tuple[str, str], values: tuple[Any, Any], expected: Any, tmp_path: Path
) -> None:
    done = noised(tmp_path, dict(zip(names, values, strict=True)) | {"a.weight": drawn(4, 4, seed=5)})
    found = told(done)
    if expected is None:  # a lone mean is in doubt, a logarithm is not
        assert [found[name] for name in names] == [(None, "names"), NOISE]
    else:
        assert {found[name] for name in names} == {expected}
    assert found["a.weight"] == NOISE


@pytest.mark.parametrize(("matrix", "bias"), [("weight", "bias"), ("w", "b"), ("kernel", "bias")])
def test_the_heads_of_a_mean_and_a_std_are_layers(matrix: str, bias: str, tmp_path: Path) -> None:
    found = {
        f"encoder.fc_mean.{matrix}": drawn(9, 4),
        f"encoder.fc_mean.{bias}": drawn(9, seed=1),
        f"encoder.fc_std.{matrix}": abs(drawn(9, 4, seed=2)),
        f"encoder.fc_std.{bias}": abs(drawn(9, seed=3)),
    }
    done = noised(tmp_path, found)
    assert told(done) == dict.fromkeys(found, NOISE)


# Names: a doubt, a warning, and --strict.

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
    save(tmp_path / "m.safetensors", {"rope.freqs": Tensor("F32", _FREQUENCIES.astype(np.float32))})
    noise = NoiseSpec(include=("rope.*",))
    done = perturb(Request(str(tmp_path / "m.safetensors"), noise), str(tmp_path / "o.safetensors"))
    assert told(done) == {"rope.freqs": NOISE}


def test_a_computed_buffer_keeps_its_dtype(tmp_path: Path) -> None:
    frequencies = Tensor("F32", _FREQUENCIES.astype(np.float32))
    found = {"rope.freqs": frequencies, "a.weight": Tensor("F32", drawn(4, 4))}
    source = save(tmp_path / "m.safetensors", found)
    out = tmp_path / "o.safetensors"
    done = perturb(Request(str(source), NoiseSpec(), conversion=Conversion("BF16")), str(out))
    dtypes = {r.step.tensor.name: r.step.out_dtype for r in done.manifest.receipts}
    assert dtypes == {"rope.freqs": None, "a.weight": "BF16"}
    assert verify(str(out), base=str(source)).ok


def test_a_record_of_who_told_comes_back_and_an_older_one_without_it(tmp_path: Path) -> None:
    found = {"rope.freqs": _FREQUENCIES, "b.mean": drawn(9), "a.weight": drawn(4, 4)}
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


def mel(filters: int, bins: int, *, area: bool) -> NDArray[np.float32]:
    """Triangles on a mel scale, [filters, bins], of height one or of area one."""
    edges = 700 * (10 ** (np.linspace(0, 2.8, filters + 2) / 2.8) - 1) / 6300 * (bins - 1)
    at, low, middle, high = np.arange(bins), edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bumps = np.maximum(0, np.minimum((at - low) / (middle - low), (high - at) / (high - middle)))
    return np.asarray(bumps * 2 / (high - low) if area else bumps, np.float32)


def test_a_bank_of_filters_is_computed(tmp_path: Path) -> None:
    banks = {
        "featurizer.fb": mel(40, 201, area=True)[None],
        "mel_scale.fb": mel(40, 201, area=False).T,
        "melmat": mel(80, 257, area=True).T,
    }
    trained = mel(40, 201, area=True)
    trained[7, trained[7].nonzero()[0][0]] *= -0.01
    pruned = np.where(np.abs(drawn(40, 64)) > 1, np.abs(drawn(40, 64)), 0)
    parameters = {
        "a.fb": trained,
        "b.fb": mel(40, 201, area=True)[::-1] + drawn(40, 201) * 1e-3,
        "c.fb": pruned,
    }
    assert told(noised(tmp_path, banks | parameters)) == dict.fromkeys(banks, BY_VALUES) | dict.fromkeys(
        parameters, NOISE
    )


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


@pytest.mark.parametrize("name", ["frozen_codebook", "rand_projs", "k_cache", "code_weights"])
def test_names_of_what_is_drawn_once_are_doubts(name: str, tmp_path: Path) -> None:
    (warning,) = noised(tmp_path, {f"head.{name}": drawn(9), "head.randomness": drawn(9, seed=1)}).warnings
    assert warning.startswith(f"head.{name}: perturbed, though")


def test_the_edges_of_learned_filters_are_learned_though_they_hardly_moved(tmp_path: Path) -> None:
    low = 700 * (10 ** (np.linspace(60, 2800, 40) / 2595) - 1)
    found = {"fb.low_hz_": low, "fb.band_hz_": np.diff(low, append=3000)}
    found |= {"fb.n_": np.arange(-125, 0) / 16000, "other.low_hz_": low}
    learned = dict.fromkeys(("fb.low_hz_", "fb.band_hz_"), NOISE)
    assert told(noised(tmp_path, found)) == dict.fromkeys(found, BY_VALUES) | learned


def test_a_copy_is_called_after_all_of_its_weights_path(tmp_path: Path) -> None:
    found = {"gate.ema_in_proj": drawn(4, 4), "gate.in_proj": drawn(4, 4, seed=1)}
    assert told(noised(tmp_path, found)) == {"gate.ema_in_proj": (None, "names"), "gate.in_proj": NOISE}


@pytest.mark.parametrize("name", ["_ema_w", "_count", "class_freq", "label_priors", "cls_frequencies"])
def test_names_of_what_is_counted_are_doubts(name: str, tmp_path: Path) -> None:
    done = noised(
        tmp_path, {f"head.{name}": drawn(9), "head.weight": drawn(3, 9), "class_embed": drawn(3, 9)}
    )
    assert f"head.{name}: perturbed, though" in done.warnings[0]
    assert len(done.warnings) == 1


def test_a_letter_that_no_formula_calls_a_weight_is_looked_at(tmp_path: Path) -> None:
    slopes = 2.0 ** -np.arange(1, 9)
    laplace = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32)
    tensors = {"attn.m": slopes.reshape(8, 1, 1), "edges.k": laplace.reshape(1, 1, 3, 3)}
    weights = {"mixer.D": slopes, "linear.w": np.eye(8), "norm.g": slopes, "mixer.s": drawn(8)}
    assert told(noised(tmp_path, tensors | weights)) == dict.fromkeys(tensors, BY_VALUES) | dict.fromkeys(
        weights, NOISE
    )


def test_a_moving_average_beside_its_variance_is_statistics(tmp_path: Path) -> None:
    names = ["norm.moving_avg", "norm.moving_var"]
    tensors = {name: drawn(8, seed=i) for i, name in enumerate([*names, "norm.avg_pool"])}
    assert told(noised(tmp_path, tensors)) == {
        **dict.fromkeys(names, BY_STRUCTURE),
        "norm.avg_pool": NOISE,
    }


def test_a_kind_holds_no_buffer_that_values_tell(tmp_path: Path) -> None:
    found = {
        "pos_embed": sinusoids(64, 16),
        "wte.weight": drawn(16, 8),
        "obs_norm.mean": drawn(9),
        "obs_norm.std": abs(drawn(9, seed=1)),
        "ln.scale": drawn(9, seed=2),
        "rope.freqs": _FREQUENCIES,
        "fc.weight": drawn(4, 4),
    }
    include = ("@embeddings", "@norm", "rope.*")
    done = noised(tmp_path, found, noise=NoiseSpec(include=include))
    expected = {
        "pos_embed": BY_VALUES,
        "wte.weight": NOISE,
        "obs_norm.mean": BY_VALUES,
        "obs_norm.std": BY_VALUES,
        "ln.scale": NOISE,
        "rope.freqs": NOISE,  # named, and no kind
        "fc.weight": ("excluded", None),
    }
    assert told(done) == expected
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(np.float32(values)) for name, values in found.items()}
    noisytune_cli.perturb_(state, include=include)
    on_disk = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "o.safetensors")
    assert [name for name in state if not np.array_equal(state[name].numpy(), on_disk[name])] == []
    dry = noisytune("perturb", tmp_path / "m.safetensors", "--dry-run", "--include", "@embeddings").stdout
    assert "pos_embed  F32 64x16  perturb λ=0.15; unless constant or non-finite or computed" in dry


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


@pytest.mark.parametrize("name", ["model.24.anchors", "model.105.anchor_grid", "generator.cell_anchors.0"])
def test_anchors_are_doubts(name: str, tmp_path: Path) -> None:
    done = noised(tmp_path, {name: drawn(3, 3, 2), "head.weight": drawn(3, 9), "blocks.0": drawn(3, 3)})
    assert f"{name}: perturbed, though" in done.warnings[0]
    assert "blocks" not in done.warnings[0]


def test_weights_that_are_held_to_length_one_are_weights(tmp_path: Path) -> None:
    names = ["W_dec", "sae.W_D", "q.parametrizations.weight.original", "decoder.weight"]
    found = {name: unit(40, 6, axis=1) for name in names} | {"net.memory": unit(40, 6, axis=1)}
    expected = dict.fromkeys(names, NOISE) | {"net.memory": BY_VALUES}
    assert told(noised(tmp_path, found)) == expected


def grid(width: int, *sizes: int) -> NDArray[Any]:
    """A table of sinusoids for each axis of a grid, side by side, the last axis the fastest."""
    at = np.indices(sizes).reshape(len(sizes), -1)
    return np.concatenate([sinusoids(n, width)[places] for n, places in zip(sizes, at, strict=True)], 1)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "sizes", [(32, 32), (8, 64), (64, 8), (9, 30), (192, 192), (8, 14, 14), (12, 9, 20)], ids=str
)
def test_tables_of_sinusoids_over_grids_are_computed(sizes: tuple[int, ...], dtype: str) -> None:
    table = grid(16, *sizes)
    moved = table + 0.02 * drawn(*table.shape)
    lines = sizes[-1] * (len(table) // sizes[-1] // 2)
    learned = np.concatenate([table[:lines], np.repeat(drawn(1, table.shape[1]), len(table) - lines, 0)])
    with_token = np.concatenate([np.zeros_like(table[:1]), table])
    for rows, is_computed in [(table, True), (with_token, True), (moved, False), (learned, False)]:
        stored = rounded(rows, dtype)
        spec = TensorSpec("pos_embed", dtype, (1, *stored.shape), "", 0, 0)
        assert bool(look(spec, reader(stored), plain=False)) is is_computed


def reader(stored: NDArray[Any]) -> Values:
    return lambda first, count: stored.reshape(-1)[first : first + count]


def rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        return np.asarray((bits + 0x8000 & 0xFFFF0000).view(np.float32), float)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).astype(float)


def test_a_fourier_transform_may_be_a_convolution(tmp_path: Path) -> None:
    n = 64
    angle = -2j * np.pi / n * np.arange(n // 2 + 1)[:, None] * np.arange(n)
    transform = np.exp(angle) * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n))
    inverse = np.exp(-angle[: n // 2]) / n
    computed = {
        "stft.conv_real.weight": transform.real[:, None],
        "stft.conv_imag.weight": transform.imag[:, None],
        "istft.conv_real.weight": inverse.real[:, :, None],
        "istft.conv_imag.weight": inverse.imag[:, :, None],
    }
    learned = {
        "enc.conv_real.weight": transform.real[:, None] + 1e-3 * drawn(33, 1, n),
        "enc.conv_imag.weight": drawn(33, 1, n),
        "conv.weight": transform.real[:, None],
        "entity_real.weight": unit(40, 6, axis=1),
    }
    expected = dict.fromkeys(computed, BY_VALUES) | dict.fromkeys(learned, NOISE)
    assert told(noised(tmp_path, computed | learned)) == expected


def test_numbers_that_a_convolution_takes_the_mean_of_are_computed(tmp_path: Path) -> None:
    numbers = np.arange(16.0).reshape(1, 16, 1, 1)
    weights = {
        "a.conv.weight": numbers * 1.01,
        "b.conv.weight": numbers.reshape(16, 1, 1, 1),
        "c.weight": numbers.reshape(16),
        "d.conv.weight": drawn(1, 16, 1, 1),
    }
    done = noised(tmp_path, {"model.22.dfl.conv.weight": numbers} | weights)
    assert told(done) == {"model.22.dfl.conv.weight": BY_VALUES} | dict.fromkeys(weights, NOISE)
    dry = noisytune("perturb", tmp_path / "m.safetensors", "--dry-run").stdout
    assert "dfl.conv.weight  F32 1x16x1x1  perturb λ=0.15; unless constant or non-finite or computed" in dry


def test_a_large_grid_is_looked_at_in_a_few_places() -> None:
    rows, width = 36864, 1536
    table = {axis: sinusoids(192, width // 2) for axis in (0, 1)}
    asked = []

    def values(first: int, count: int) -> NDArray[Any]:
        asked.append(count)
        at = np.arange(first, first + count)
        row, column = at // width, at % width
        half = width // 2
        found = np.where(
            column < half, table[1][row % 192, column % half], table[0][row // 192, column % half]
        )
        return found.astype(np.float16).astype(float)

    assert look(TensorSpec("pos_embed", "F16", (1, rows, width), "", 0, 0), values, plain=False)
    assert max(asked) <= 1 << 18
    assert sum(asked) < rows * width // 10
