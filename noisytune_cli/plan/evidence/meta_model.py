"""A process of its own that builds a model without weights and tells its parameters from its buffers.

    stdin    {"library": …, "config": {…}, "names": […]}     the checkpoint's config.json, its tensors' names
    stdout   {"kinds": {NAME: "parameter" | "buffer"}, "tied": [[NAME, …], …]}     of those that it knows

`tied` are the names that it declares to be one weight.

torch's meta device allocates no weights. The architecture is one of the library's own classes, so nothing
that comes with the checkpoint is imported, and the hub is told to be offline. A config is a stranger's all
the same: time and memory are limited, and whatever goes wrong is an exit code other than 0.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: What building may take. The largest models have some 100,000 modules, which take a tenth of this.
_CPU_SECONDS, _DATA_BYTES = 120, 8 << 30

#: Keys of a config that are not the architecture's: they could fetch weights, or ask for packages.
_LEFT_OUT = frozenset({"auto_map", "quantization_config", "attn_implementation", "_attn_implementation"})
_FETCHES = re.compile("pretrained|checkpoint|cache|url|path")
_OFF = {"use_pretrained_backbone": False, "use_kernels": False}

#: Keys beside `model_args` that size a model of timm.
_OF_TIMM = ("num_classes", "global_pool")


def main() -> None:
    """Read a request, build the model, and answer."""
    for limit, most in ((resource.RLIMIT_CPU, _CPU_SECONDS), (resource.RLIMIT_DATA, _DATA_BYTES)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (most, most))
    request = json.load(sys.stdin)
    answer = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no part of the answer
    with os.fdopen(answer, "w") as file:
        model = _BUILDERS[request["library"]](request["config"])
        own = _own_names(model, request["names"])
        json.dump({"kinds": _kinds(model, own), "tied": _tied(model, own)}, file)


def _build(config: Mapping[str, Any]) -> Any:
    """Return the model of transformers that a config names, on the meta device."""
    import torch
    import transformers
    from transformers import initialization

    kind = getattr(transformers, config["architectures"][0])
    if not issubclass(kind, transformers.PreTrainedModel):
        raise TypeError("the architecture is no model")
    known = transformers.AutoConfig.for_model(**_without_effects(config))
    with torch.device("meta"), initialization.no_init_weights():
        return kind(known)


def _build_of_diffusers(config: Mapping[str, Any]) -> Any:
    """Return the model of diffusers that a config names."""
    import torch

    diffusers = importlib.import_module("diffusers")

    kind = getattr(diffusers, config["_class_name"])
    if not issubclass(kind, diffusers.ModelMixin):
        raise TypeError("the architecture is no model")
    with torch.device("meta"):
        return kind.from_config(_without_effects(config))


def _build_of_timm(config: Mapping[str, Any]) -> Any:
    """Return the model of timm that a config names, whose arguments name no weights."""
    import torch

    timm = importlib.import_module("timm")

    name = config["architecture"].partition(".")[0]  # what follows is a tag of the weights
    if not timm.is_model(name):
        raise TypeError("the architecture is no model")
    given = {**{key: config[key] for key in _OF_TIMM if key in config}, **(config.get("model_args") or {})}
    given = {key: value for key, value in given.items() if not _FETCHES.search(key)}
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **_without_effects(given))


_BUILDERS = {"transformers": _build, "diffusers": _build_of_diffusers, "timm": _build_of_timm}


def _without_effects(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, and the configs inside it, without what is not the architecture's."""
    kept = {key: _inside(value) for key, value in config.items() if key not in _LEFT_OUT}
    return kept | {key: value for key, value in _OFF.items() if key in kept}


def _inside(value: Any) -> Any:
    if isinstance(value, list):
        return [_inside(item) for item in value]
    return _without_effects(value) if isinstance(value, dict) else value


def _own_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the model's name of each that it knows, under a base model's prefix or without one."""
    known = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    is_renamed = hasattr(model, "base_model_prefix")  # transformers alone does when it loads
    rename, prefix = (_renaming(model), f"{model.base_model_prefix}.") if is_renamed else (str, "")
    own = {}
    for name in names:
        renamed = rename(name)
        for candidate in (name, renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if candidate in known:
                own[name] = candidate
                break
    return own


def _kinds(model: Any, own: Mapping[str, str]) -> dict[str, str]:
    """Return the kind of each name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: "parameter" if kept in parameters else "buffer" for name, kept in own.items()}


def _tied(model: Any, own: Mapping[str, str]) -> list[list[str]]:
    """Return the names, in groups, that the model declares to be one weight.

    What is tied to one that is not stored is tied to each other.
    """
    declared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, list[str]] = {}
    for name, kept in own.items():
        seen = {kept}
        while (kept := declared.get(kept, kept)) not in seen:
            seen.add(kept)
        groups.setdefault(kept, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _renaming(model: Any) -> Callable[[str], str]:
    """Return how transformers, when it loads this model, renames what a checkpoint holds."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]

    def rename(name: str) -> str:
        renamed: str = rename_source_key(name, renamings, converters)[0]
        return renamed

    return rename


if __name__ == "__main__":
    main()
