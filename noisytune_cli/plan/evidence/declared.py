"""What a checkpoint says of itself: the strongest evidence of what its tensors are.

DeepSpeed lists buffers and parameters by name; a tree of Flax's is divided into collections, of which one
alone is `params`; PyTorch Lightning keeps losses and metrics as modules of the model; and a copy that follows
a weight as its average (EMA) is no weight itself: the optimizer never moves it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.plan.evidence.structure import Kind, split_name
from noisytune_cli.records import Declared, TensorSpec

#: The last word of a tree's collections beside `params`: what a Flax or Haiku module does not learn.
_COLLECTIONS = frozenset(
    ("stats", "statistics", "state", "states", "cache", "constants", "buffers", "intermediates")
)

_METRIC = (
    r"((train|val|valid|validation|test)_)?(metrics?|acc|accuracy|auc|auroc|f1|precision|recall|confmat|iou"
    r"|jaccard|dice|mse|rmse|mae|r2|psnr|ssim|fid|kid|lpips|perceptual_loss|perplexity|bleu|rouge|wer|cer)"
    r"(_?\d{1,4})?"
)

#: Metrics for certain, whatever they hold: those of a stage, and those with a network that they look through.
_CERTAIN = r"(train|val|valid|validation|test)_.*|metrics|fid|kid|lpips|perceptual_loss"

#: Why an average of a weight is a buffer.
AVERAGE = "an EMA copy of a weight"

#: How what a loss learns is called: logarithms of variances, temperatures.
_LEARNED = ("log", "raw", "temperature", "params")

#: What a model's averages are called; what is called by one of the last words has to be called a model, too:
#: `model_avg`, but not `fc_avg`, which stands beside `fc_max`.
_EMA, _AVERAGED = "ema", frozenset(("avg", "averaged", "swa"))

#: Modules above a weight and its copy that may differ: wrappers.
_WRAPPERS = 3

#: Modules that a set of copies is held against.
_MOST_MODELS = 64

#: By a name without dots, below some modules, and a shape: the modules. With `_` for dots it begins with one.
_Weights = dict[tuple[str, tuple[int, ...]], dict[tuple[str, ...], None]]


def look(tensors: Sequence[TensorSpec], declared: Declared) -> dict[str, tuple[Kind, str]]:
    """Return the kind of each tensor that the checkpoint itself tells, and why."""
    kinds: dict[str, tuple[Kind, str]] = {}
    kinds |= dict.fromkeys(declared.parameters, ("parameter", "listed as a parameter"))
    kinds |= dict.fromkeys(declared.buffers, ("buffer", "listed as a buffer, or a loss's state"))
    kinds |= _collections(tensors)
    kinds |= _averages(tensors, {b: a for pair in declared.pairs for a, b in (pair, pair[::-1])})
    if declared.lightning:
        kinds |= _losses(tensors)
    names = {tensor.name for tensor in tensors}
    return {name: told for name, told in kinds.items() if name in names}


def _collections(tensors: Sequence[TensorSpec]) -> dict[str, tuple[Kind, str]]:
    """Return the kinds in a tree whose every tensor is in `params` or in another collection."""
    if not any(tensor.name.startswith(("params.", "params/")) for tensor in tensors):
        return {}
    collection = {tensor.name: re.split("[./]", tensor.name, maxsplit=1)[0] for tensor in tensors}
    others = set(collection.values()) - {"params"}
    if not others or len(others) == len(set(collection.values())):
        return {}
    if not all(other.rpartition("_")[2] in _COLLECTIONS for other in others):
        return {}
    return {
        name: ("parameter", "in params") if which == "params" else ("buffer", f"in the collection {which}")
        for name, which in collection.items()
    }


def _losses(tensors: Sequence[TensorSpec]) -> dict[str, tuple[Kind, str]]:
    """Return the buffers of losses and metrics: class weights, centres and counts, which are vectors.

    A network inside a loss (a discriminator) has matrices, and vectors with a bias beside them; so has a
    block that is merely called like a metric (`r2`, `mae`). A lone vector called `weight` is a doubt.
    """
    names = {tensor.name for tensor in tensors}
    kinds: dict[str, tuple[Kind, str]] = {}
    metrics: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        module, last = split_name(tensor.name)
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if re.fullmatch(_METRIC, part)), None)
        if at is not None:
            metrics.setdefault(".".join(parts[: at + 1]), []).append(tensor)
        elif is_class_weights(tensor, names) and not last.startswith(_LEARNED):
            kinds[tensor.name] = "buffer", "a loss's class weights or state"
    for metric, states in metrics.items():
        if re.fullmatch(_CERTAIN, metric.rpartition(".")[2]) or not any(map(_is_layer, states)):
            kinds |= dict.fromkeys((state.name for state in states), ("buffer", "a metric's state"))
    return kinds


def _is_layer(tensor: TensorSpec) -> bool:
    """Say whether a tensor is one of a layer's: a matrix (no confusion matrix), a bias, a norm's weight."""
    last = split_name(tensor.name)[1]
    has_shape = len(tensor.shape) > 1 and re.fullmatch(_METRIC, last) is None
    is_vector = last in ("weight", "bias") and tensor.elements > 1  # a mean's state `weight` is one value
    return tensor.dtype in FLOAT_DTYPES and (has_shape or is_vector)


def is_metrics_weight(tensor: TensorSpec, names: set[str]) -> bool:
    """Say whether a vector may be a norm's weight, or the class weights of what is called like a metric."""
    module, last = split_name(tensor.name)
    return (
        last == "weight"
        and len(tensor.shape) == 1
        and f"{module}bias" not in names
        and re.fullmatch(_METRIC, split_name(module[:-1])[1]) is not None
    )


def is_class_weights(tensor: TensorSpec, names: set[str]) -> bool:
    """Say whether a tensor has the place and the shape of a loss's class weights."""
    if "loss" not in tensor.name and "criterion" not in tensor.name:
        return False
    from noisytune_cli.checkpoint.formats.torch.state_dict import is_loss  # few names come this far

    module, last = split_name(tensor.name)
    is_vector = sum(n != 1 for n in tensor.shape) <= 1
    has_layer = last == "bias" or f"{module}bias" in names or f"{module}running_mean" in names
    return is_vector and not has_layer and any(map(is_loss, module.split(".")))


def _averages(tensors: Sequence[TensorSpec], same: Mapping[str, str]) -> dict[str, tuple[Kind, str]]:
    """Return the EMA copies: what is in a container called so that as a whole follows the model.

    Some have their weight's name without its dots (LitEma) or with underscores for them (mmcv), some are
    under other wrappers than the model. `same` are other names for one tensor.
    """
    copies: dict[tuple[str, ...], list[tuple[tuple[str, ...], TensorSpec]]] = {}
    inside = set()
    for tensor in tensors:
        shown = tensor.shown.lower()
        may_be = _EMA in shown or any(word in shown for word in _AVERAGED)
        container, rest = _split(tuple(tensor.shown.split("."))) if may_be else ((), ())
        if container:
            copies.setdefault(container, []).append((rest, tensor))
            inside.add(tensor.name)
    if not copies:
        return {}
    weights: _Weights = {}
    for tensor in tensors:
        if tensor.name in inside:
            continue
        parts = tuple(tensor.shown.split("."))
        for i in range(min(_WRAPPERS + 1, len(parts) - 2) + 1):
            for joined in ("".join(parts[i:]), f"_{'_'.join(parts[i:])}"):
                weights.setdefault((joined, tensor.shape), {})[parts[:i]] = None
    kinds: dict[str, tuple[Kind, str]] = {}
    for container, found in copies.items():
        # A container may hold the weights themselves beside the copies (ema_pytorch's `online_model`).
        own = [(rest, tensor) for rest, tensor in found if same.get(tensor.name, tensor.name) in inside]
        if _follow(own, container, weights):
            kinds |= dict.fromkeys((tensor.name for _, tensor in own), ("buffer", AVERAGE))
    return kinds


def _split(parts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the modules down to the one called an average, and what is below it; nothing where none is.

    Each of a list of averages is one (`ema.0.ema_model.w`). A buffer that the model keeps itself is called
    after all of its weight's path (`ema_layer_w`). What is called so below a numbered layer is its part.
    """
    for i, part in enumerate(parts[: _WRAPPERS + 1]):
        if part.isdecimal():
            break
        if i == len(parts) - 1:
            path = part.removeprefix(f"{_EMA}_")
            return ((*parts[:i], _EMA), (f"_{path}",)) if path != part else ((), ())
        if _is_average(part):
            end = i + 1
            while end < len(parts) - 1 and (
                _is_average(parts[end]) or (parts[end].isdecimal() and _is_average(parts[end + 1]))
            ):
                end += 1
            return parts[:end], parts[end:]
    return (), ()


def _is_average(module: str) -> bool:
    """Say whether a module or dictionary is called an average of a model."""
    from noisytune_cli.checkpoint.formats.torch.state_dict import is_model  # few files have such containers

    words = module.lower().split("_")
    return _EMA in words or (not _AVERAGED.isdisjoint(words) and is_model(_without_average(module)))


def _without_average(module: str) -> str:
    return "_".join(word for word in module.split("_") if word.lower() not in (_EMA, *_AVERAGED))


def _follow(
    copies: Sequence[tuple[tuple[str, ...], TensorSpec]], container: tuple[str, ...], weights: _Weights
) -> bool:
    """Say whether all of a container's tensors are alike to those of one module, each under its name there.

    Of a container at the top that may be any module, as it is the model, whatever it is called; of one
    further down it is the module that the container lies in, or one beside it that is called like a model.
    """
    from noisytune_cli.checkpoint.formats.torch.state_dict import is_model  # few files have such containers

    begin = next(i for i, part in enumerate(container) if _is_average(part))
    above, own = container[:begin], _without_average(container[-1])

    def may_be_model(module: tuple[str, ...]) -> bool:
        below = module[begin:]
        return not above or (module[:begin] == above and (below == (own,) or all(map(is_model, below))))

    rests = [
        (rest, tensor.shape)
        for rest, tensor in copies
        if tensor.dtype in FLOAT_DTYPES and tensor.elements > 1
    ]
    longest, shape = max(rests, key=lambda rest: sum(map(len, rest[0])), default=((), ()))
    for i in range(min(_WRAPPERS, max(0, len(longest) - 2)) + 1):
        modules = itertools.islice(weights.get(("".join(longest[i:]), shape), ()), _MOST_MODELS)
        for module in filter(may_be_model, modules):
            if all(
                rest[:i] == longest[:i] and module in weights.get(("".join(rest[i:]), shape), ())
                for rest, shape in rests
            ):
                return True
    return False
