"""From which keys of the checkpoint transformers loads a model's parameters.

Loading adds and takes away prefixes (a task's head over a base model), renames (`LayerNorm.gamma`), and makes
one parameter of several tensors (experts). Noise is named after the checkpoint's tensors, so the keys are
noted as transformers puts them where they belong, and so is what no tensor was there for: in its own report
transformers leaves out what a model computes for itself. That is not a public interface: where it is another,
nothing is noted, and the model's own names are taken.
"""

from __future__ import annotations

import importlib
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from noisytune_cli.manifest.previous import PreviousRun, read_previous
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX


@dataclass
class Origin:
    """Where a model's parameters come from, by their names.

    `keys` are the checkpoint's, None where a parameter is made of one in another way than as it is. `lacking`
    are those that nothing was loaded for, a tied one's other names among them.
    """

    keys: dict[str, str | None] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)


#: The weights that transformers takes of a folder, the first that there is.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

#: The origin of each model.
Origins = weakref.WeakKeyDictionary[nn.Module, Origin]


def noised_before(name: Any, subfolder: str = "") -> PreviousRun | None:
    """Return what a manifest says of the weights that transformers loads from a folder; None without one.

    It lies with the weights, or above where they are a component's of a pipeline.
    """
    if not isinstance(name, str | os.PathLike) or not os.path.isdir(name):
        return None
    folder = Path(os.path.abspath(os.path.join(name, subfolder)))
    weights = next((one for one in _WEIGHTS if (folder / one).is_file()), "")
    for root, about in ((folder, MANIFEST), (folder, weights + MANIFEST_SUFFIX), (folder.parent, MANIFEST)):
        said = read_previous(root / about) if (root / about).is_file() else None
        if said is not None and (
            root == folder or any(file.startswith(f"{folder.name}/") for file in said.files or ())
        ):
            return said
    return None


@contextmanager
def watched() -> Iterator[Origins]:
    """Yield what is noted of the models that are loaded inside the block."""
    origins: Origins = weakref.WeakKeyDictionary()
    try:
        loading: Any = importlib.import_module("transformers.core_model_loading")
        models: Any = importlib.import_module("transformers.modeling_utils")
        load, transform = models.convert_and_load_state_dict_in_model, loading.WeightTransform
        add, converter = transform.add_tensor, loading.WeightConverter
    except (ImportError, AttributeError):
        yield origins
        return
    current = threading.local()

    def noted_load(model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        # What is loaded into a model later is an adapter, which knows nothing of the base.
        origin = None if model in origins else Origin()
        outer = getattr(current, "origin", None)
        current.origin = origin
        try:
            loaded = load(model, *arguments, **keywords)
        finally:
            current.origin = outer
        if origin is not None:
            report = loaded[0] if isinstance(loaded, tuple) else loaded
            # As it is now: names are taken out of it later.
            origin.lacking.update(getattr(report, "missing_keys", ()))
            origins[model] = origin
        return loaded

    def noted_add(self: Any, target_key: str, source_key: str, *arguments: Any, **keywords: Any) -> Any:
        origin = getattr(current, "origin", None)
        if origin is not None:
            origin.keys[target_key] = None if isinstance(self, converter) else source_key
        return add(self, target_key, source_key, *arguments, **keywords)

    models.convert_and_load_state_dict_in_model = noted_load
    transform.add_tensor = noted_add
    try:
        yield origins
    finally:
        models.convert_and_load_state_dict_in_model = load
        transform.add_tensor = add
