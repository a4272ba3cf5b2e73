"""From which keys of the checkpoint transformers loads a model's parameters.

Loading adds and takes away prefixes (a task's head over a base model), renames (`LayerNorm.gamma`), and makes
one parameter of several tensors (experts). Noise is named after the checkpoint's tensors, so the keys are
noted as transformers puts them where they belong. That is not a public interface: where it is another,
nothing is noted, and the model's own names are taken.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Of each model the key by name of a parameter, None where it is made of it in another way than as it is.
Origins = weakref.WeakKeyDictionary[nn.Module, dict[str, str | None]]


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
        outer = getattr(current, "keys", None)
        current.keys = origins[model] = {}
        try:
            return load(model, *arguments, **keywords)
        finally:
            current.keys = outer

    def noted_add(self: Any, target_key: str, source_key: str, *arguments: Any, **keywords: Any) -> Any:
        keys = getattr(current, "keys", None)
        if keys is not None:
            keys[target_key] = None if isinstance(self, converter) else source_key
        return add(self, target_key, source_key, *arguments, **keywords)

    models.convert_and_load_state_dict_in_model = noted_load
    transform.add_tensor = noted_add
    try:
        yield origins
    finally:
        models.convert_and_load_state_dict_in_model = load
        transform.add_tensor = add
