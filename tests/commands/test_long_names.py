"""Names of 200,000 characters: whatever looks at a name takes time in proportion to its length.

Each name repeats what a pattern would begin again at, and ends as no pattern does. Where time grows with the
square of the length, one of these would take many minutes.
"""

from __future__ import annotations

import pytest

from noisytune_cli.checkpoint.config import Hyperparameters
from noisytune_cli.checkpoint.formats.torch.globals import DType, StoredTensor
from noisytune_cli.checkpoint.formats.torch.state_dict import sort_content
from noisytune_cli.plan.evidence.buffers import find_buffers
from noisytune_cli.plan.evidence.told import tell
from noisytune_cli.plan.families import known_parts
from noisytune_cli.plan.patterns import KINDS, match_names
from noisytune_cli.plan.ties import find_ties, stream_of
from noisytune_cli.records import TensorSpec

LENGTH = 200_000

_UNITS = (
    *("norm", "normal", "bn", "bn1", "ln_", "mlp", "ffn", "attn", "embed_tokens", "lm_head", "bias", "_proj"),
    *("inv_freq", "alphas_cumprod", "optim", "sched", "1", "1.", ".", "shared_embedding."),
    *("shared.", "mlp.", "head.", "model.", "layers.0.", "predictions.", "experts.", "body.", "backbone."),
    *("backbone.bottom_up.", "norm.weight.", "attn.bias."),
)


def _spec(name: str) -> TensorSpec:
    return TensorSpec(name, "F32", (4, 4, 4), "model.safetensors", 0, 256)


@pytest.mark.parametrize("unit", _UNITS)
def test_a_long_name_is_looked_at_once(unit: str) -> None:
    module = ("backbone." if unit.startswith("bo") else "") + unit * (LENGTH // len(unit))
    names = [f"{module}{end}" for end in ("-", "\n", "x.weight", "x.running_mean", "-.weight\n")]
    tensors = [_spec(name) for name in names]
    for kind in KINDS:
        match_names([kind], names)
    frozen = [names[2]] if module.startswith("backbone.") else []
    assert list(find_buffers(tensors)) == list(tell(tensors, decider="auto").buffers) == frozen
    assert find_buffers(tensors, config={"model_type": unit}) == {}
    assert find_ties(tensors) == ()
    assert stream_of(names) in names
    by_name = {tensor.name: tensor for tensor in tensors}
    assert {known_parts(tensor, by_name, Hyperparameters({})) for tensor in tensors} == {()}
    stored = StoredTensor("0", DType("F32", 4), 0, (2, 2), (2, 1))
    kept = sort_content({name: {name: stored} for name in by_name}, StoredTensor)
    assert len(kept.weights) + len(kept.beside) == len(names)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("x" * LENGTH + "norm", {"@norm"}),
        ("norm" * LENGTH + "al", {"@norm"}),
        ("a.\n" * LENGTH + ".mlp.fc1.weight", {"@mlp"}),
        ("norm." * LENGTH + "bias", {"@norm", "@bias"}),
        ("attn." * LENGTH + "x", {"@attention"}),
        ("x" * LENGTH + "embed_tokens_1.weight", {"@embeddings"}),
        ("normal" * LENGTH, set()),
    ],
    ids=range(7),
)
def test_a_long_name_is_of_its_kinds(name: str, kinds: set[str]) -> None:
    assert {kind for kind in KINDS if match_names([kind], [name])[0]} == kinds


@pytest.mark.parametrize(
    ("module", "frozen"),
    [
        ("backbone.body.layer1.bn1", True),
        ("model.backbone.0.body.bn1", True),
        ("body.backbone.bn1", True),
        ("backbone.bottom_up.res2.norm", True),
        ("backbones.0.bn", True),
        ("backbone_3d.bn", False),
        ("body.bn1", False),
        ("backbone", False),
        ("backbone.body." + "x." * LENGTH + "bn", True),
    ],
    ids=range(9),
)
def test_batch_norms_of_frozen_backbones(module: str, frozen: bool) -> None:
    tensors = [
        TensorSpec(f"{module}.{name}", "F32", (8,), "model.safetensors", 0, 32)
        for name in ("weight", "running_mean", "running_var")
    ]
    assert (f"{module}.weight" in find_buffers(tensors)) == frozen
