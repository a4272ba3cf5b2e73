"""A model with adapters (peft): which parameters are the base model's, and what they are called there.

An adapter's layer holds the layer that it adapts as `base_layer`, and beside it what it adds; a module that
is trained whole holds the one before as `original_module`. What is added learns from zero or from noise of
its own, so it takes none; the base gets the noise of its checkpoint, under the names that it has there. peft
is known by these attributes, and never imported.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from noisytune_cli.errors import InputInvalid

_BASE_LAYER, _ORIGINAL = "base_layer", "original_module"


def base_names(model: nn.Module) -> dict[str, str] | None:
    """Return by its name in the model what each parameter of the base is called; None without adapters.

    InputInvalid where an adapter is merged: the base's values, and so the std of its noise, are not its own.
    """
    for prefix in merged_layers(model):
        raise still_merged(prefix.removesuffix("."))
    wrappers = {
        prefix: inner
        for prefix, module in model.named_modules(remove_duplicate=False)  # a block may be in several places
        if (inner := _inner(module)) is not None
    }
    root = next((prefix for prefix, module in model.named_modules() if _is_peft_model(module)), None)
    if not wrappers and root is None:
        return None
    base = "" if root is None else _base_prefix(model, root)
    names: dict[str, str] = {}
    for own, _ in model.named_parameters(remove_duplicate=False):
        kept: list[str] = []
        parts = own.split(".")
        for at, part in enumerate(parts):
            inner = wrappers.get(".".join(parts[:at]))
            if inner is None:
                kept.append(part)
            elif part != inner:
                break
        else:
            if own.startswith(base):
                names[own] = ".".join(kept)[len(base) :]
    return names


def merged_layers(model: nn.Module) -> tuple[str, ...]:
    """Return what the names in layers begin with whose adapter is merged into them, with a dot."""
    return tuple(
        f"{prefix}.{_BASE_LAYER}.".removeprefix(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        if _inner(module) == _BASE_LAYER and getattr(module, "merged", False)
    )


def still_merged(name: str) -> InputInvalid:
    """Return the error that says so of a layer or a parameter."""
    return InputInvalid(
        "cannot tell the base from its adapter",
        tensor=name,
        why="an adapter is merged into it",
        next_step="Call the model's unmerge_adapter() first, and merge_adapter() afterwards",
    )


def _inner(module: nn.Module) -> str | None:
    """Return what an adapter's layer calls the layer that it adapts; None where it is none."""
    if getattr(module, "adapter_layer_names", None) and _BASE_LAYER in module._modules:
        return _BASE_LAYER
    if _ORIGINAL not in module._modules:
        return None
    if module._modules[_ORIGINAL] is not None:
        return _ORIGINAL
    # A wrapper that trains some rows of a table leaves this to an adapter's layer in it.
    return next((name for name, held in module.named_children() if _inner(held) is not None), None)


def _is_peft_model(module: nn.Module) -> bool:
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def _base_prefix(model: nn.Module, root: str) -> str:
    """Return what goes before the base model's names, with its dot."""
    peft_model: Any = model.get_submodule(root)
    base = peft_model.get_base_model()
    for prefix, module in peft_model.named_modules(remove_duplicate=False):
        if module is base:
            return "".join(f"{part}." for part in (root, prefix) if part)
    return ""
