"""A quantised model in memory: codes among its parameters, in its buffers, or in torch's packed objects.

A layer whose weight was quantised often keeps nothing as a parameter, so the parameters alone look like a
model's of embeddings and norms. A module is refused where its state dict would be; what it keeps for itself,
such as positions and caches, is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from noisytune_cli.checkpoint.quantized import refuse_quantized
from noisytune_cli.errors import InputInvalid
from noisytune_cli.memory.tensors import LiveTensor, spec_of
from noisytune_cli.records import TensorSpec

#: Where torch keeps the classes of objects that hold packed weights.
_PACKED = ("torch.classes.quantized.", "torch.classes.rnn.")


def refuse_quantized_model(
    model: nn.Module | Mapping[str, Any],
    live_tensors: Sequence[LiveTensor],
    *,
    config: Mapping[str, Any] | None,
    source: str,
) -> None:
    """Raise InputInvalid if a model or a state dict is quantised; `source` is what to call it."""
    specs = [spec for live in live_tensors for spec in live.specs()]
    if not isinstance(model, Mapping):
        # Siblings are known by the names that they have in the model.
        specs = [spec_of(own, live.tensor) for live in live_tensors for own in live.own]
        specs += _buffers(model)
    refuse_quantized(specs, config=config, path=source)
    if not isinstance(model, Mapping):
        _refuse_packed(model, source)


def _buffers(model: nn.Module) -> Iterator[TensorSpec]:
    """Yield the buffers that a state dict of the module would have."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        passing = getattr(module, "_non_persistent_buffers_set", ())
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in passing and not is_lazy(buffer):
                yield spec_of(f"{prefix}.{name}" if prefix else name, buffer)


def _refuse_packed(model: nn.Module, source: str) -> None:
    for prefix, module in model.named_modules():
        held = [*vars(module).values(), *module.buffers(recurse=False)]
        if any(map(_is_packed, held)):
            raise InputInvalid(
                "cannot use a quantised model",
                path=source,
                tensor=prefix or None,
                why=f"it is quantised: torch ({type(module).__name__} holds codes); noise on what is left "
                "alone means nothing",
                next_step="Use the full-precision model it was made from, then quantise the result",
            )


def _is_packed(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_quantized
    return isinstance(value, torch.ScriptObject) and any(
        place in value._type().qualified_name() for place in _PACKED
    )
