"""Experts of which one tensor holds all: a stack [n, …], each with gate and up in one matrix or apart.

That a tensor of three dimensions among `experts` is a stack is certain. Where gate and up lie in one expert's
matrix is told by the sizes of its `down_proj`, and by the model whether they alternate; if that leaves a
doubt, each expert is one matrix. Layouts as in transformers 5, in memory and on disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from noisytune_cli.checkpoint.config import Hyperparameters
from noisytune_cli.plan.parts import cut, stack
from noisytune_cli.records import Part, TensorSpec

#: Models whose experts keep gate and up in halves of the columns, and in alternate ones.
_HALF_COLUMNS = frozenset(["aria", "aria_text", "llama4", "llama4_text", "openai_privacy_filter"])
_ALTERNATE_COLUMNS = frozenset(("gpt_oss",))

_JETMOE = "jetmoe"

_EXPERTS = re.compile(r"(?:.*\.)?(?:shared_)?experts\.(?:(?:gate_up|gate|up|down)_proj|w[123])(?:_bias)?")
_LINEAR = re.compile(r"(?:.*\.)?(?:block_sparse_moe|mlp|experts)\.(?:input|output)_linear\.weight")
_ARIA = re.compile(r"(?:.*\.)?experts\.fc[12]\.weight")
_DBRX = re.compile(r"(?:.*\.)?experts\.mlp\.(?:w1|v1|w2)")


def stacked_parts(
    tensor: TensorSpec, by_name: Mapping[str, TensorSpec], model: Hyperparameters
) -> tuple[Part, ...] | str:
    """Return the matrices of a stack of experts, or none; a string says why they cannot be told."""
    name = tensor.name
    if "experts" not in name and "_linear" not in name:
        return ()
    if _EXPERTS.fullmatch(name):
        return _stack(tensor, by_name, model)
    if len(tensor.shape) == 3 and (_LINEAR.fullmatch(name) or _ARIA.fullmatch(name)):
        return stack(tensor.shape, _renamed(tensor, model))
    if len(tensor.shape) == 2 and _DBRX.fullmatch(name):
        count = model.number("moe_num_experts")
        if count is None or tensor.shape[0] % count:
            return "the config does not say how many experts it holds"
        return stack((count, tensor.shape[0] // count, tensor.shape[1]), ())
    return ()


def _stack(tensor: TensorSpec, by_name: Mapping[str, TensorSpec], model: Hyperparameters) -> tuple[Part, ...]:
    """Divide a stack of matrices, or of their biases."""
    weight = by_name.get(tensor.name.removesuffix("_bias"))
    if weight is None or len(weight.shape) != 3:
        return ()
    inside: tuple[Part, ...] = ()
    axis = _gate_up_axis(weight, by_name, model) if ".gate_up_proj" in f".{weight.name}" else None
    if axis is not None:
        half = weight.shape[1 + axis] // 2
        alternate = model.types & _ALTERNATE_COLUMNS
        pieces, times = (("gate", 1 if alternate else half), ("up", 1 if alternate else half)), 1
        if alternate:
            times = half
        if tensor.name == weight.name:
            inside = cut(weight.shape[1:], axis, pieces, times)
        elif tensor.shape == (weight.shape[0], 2 * half):
            inside = cut(tensor.shape[1:], 0, pieces, times)
    if tensor.name != weight.name and (len(tensor.shape) != 2 or tensor.shape[0] != weight.shape[0]):
        return ()
    return stack(tensor.shape, inside)


def _gate_up_axis(
    weight: TensorSpec, by_name: Mapping[str, TensorSpec], model: Hyperparameters
) -> int | None:
    """Return which dimension of one expert's matrix gate and up share, if that is certain."""
    _, rows, columns = weight.shape
    down = by_name.get(weight.name.replace("gate_up_proj", "down_proj"))
    if down is None or len(down.shape) != 3:
        return None
    in_rows = (rows, columns) == (2 * down.shape[2], down.shape[1])
    in_columns = (rows, columns) == (down.shape[2], 2 * down.shape[1])
    if model.types & (_HALF_COLUMNS | _ALTERNATE_COLUMNS):
        return 1 if in_columns else None
    if in_columns and f"{weight.name}_bias" in by_name:
        return None  # stored so by models with halves and by models with alternate columns
    return 0 if in_rows else 1 if in_columns else None


def _renamed(tensor: TensorSpec, model: Hyperparameters) -> tuple[Part, ...]:
    """Return gate and up of one expert where files have other names than models in memory.

    Granite and JetMoE's feed-forward experts keep them in halves of the rows of `input_linear` (JetMoE's
    attention has no gate), Aria in halves of the columns of `fc1`.
    """
    module = tensor.name.removesuffix(".weight")
    gated = module.endswith((".block_sparse_moe.input_linear", ".fc1")) or (
        _JETMOE in model.types and module.endswith(".mlp.input_linear")
    )
    axis = 1 if module.endswith(".fc1") else 0
    size = tensor.shape[1 + axis]
    if not gated or size % 2:
        return ()
    return cut(tensor.shape[1:], axis, (("gate", size // 2), ("up", size // 2)))
