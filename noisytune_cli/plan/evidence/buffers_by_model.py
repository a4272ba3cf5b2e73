"""A model without weights, which knows its parameters, its buffers and its ties exactly.

Where `config.json` names one of transformers' architectures and transformers is installed, a model is built
from it on torch's meta device (`meta_model.py`, in a process of its own). That takes seconds, and importing
torch, so by default it is asked only where there is a doubt (`told.py`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noisytune_cli.plan.evidence.structure import Kind
from noisytune_cli.records import TensorSpec

#: Keys of a config that say how many of something a model is made of.
_COUNTS = re.compile(r"(num|n)_\w*(layers?|blocks?|experts?|layer)|depths?|\w*_(layers|depths?|blocks)")

#: More parts than this for each tensor of the checkpoint, and the config is of another model, or a trap.
_MOST_PARTS, _FEWEST_ALLOWED = 2, 1000

_SECONDS = 180  # that a model may take to be built, the imports included


@dataclass(frozen=True)
class Answer:
    """What a model knows: the kind of each name, and the names that it declares to be one weight."""

    kinds: Mapping[str, Kind]
    tied: tuple[tuple[str, ...], ...] = ()


def ask(tensors: Sequence[TensorSpec], config: Mapping[str, Any]) -> Answer | str:
    """Return what the model that a config names knows of the tensors, or why there is none to ask."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or type(names[0]) is not str:
        return "config.json names no architecture"
    if "auto_map" in config:
        return "its architecture comes with the checkpoint, and what comes with one is never run"
    if not re.fullmatch(r"[A-Za-z]\w*", names[0]) or type(config.get("model_type")) is not str:
        return "its architecture is none of transformers'"
    most = max(_FEWEST_ALLOWED, _MOST_PARTS * len(tensors))
    if any(count > most for count in _counts(config, 0)):
        return f"config.json describes more than {most:,} parts, far more than the checkpoint has"
    if not all(importlib.util.find_spec(package) for package in ("transformers", "torch")):
        return "transformers is not installed (pip install '.[transformers]' in a clone)"
    return _run({"config": dict(config), "names": [tensor.name for tensor in tensors]})


def _counts(value: object, depth: int, key: str = "") -> Iterator[float]:
    """Yield every number under a key that counts parts of the model, lists of them summed up."""
    if isinstance(value, (int, float)) and _COUNTS.fullmatch(key):
        yield value
    elif isinstance(value, list) and _COUNTS.fullmatch(key):
        yield sum(item for item in value if isinstance(item, (int, float)))
    elif isinstance(value, Mapping) and depth < 8:
        for name, item in value.items():
            yield from _counts(item, depth + 1, str(name))


def _run(request: Mapping[str, Any]) -> Answer | str:
    """Have the model built in a process of its own, which the current folder has no say in (-P)."""
    from noisytune_cli.plan.evidence import meta_model

    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-P", meta_model.__file__],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **offline},
            timeout=_SECONDS,
            check=True,
        )
        answer = json.loads(done.stdout)
        kinds, tied = answer["kinds"], answer["tied"]
    except (OSError, LookupError, TypeError, ValueError, subprocess.SubprocessError):
        return "transformers cannot build its architecture from config.json"
    known = set(request["names"])
    return Answer(
        {name: kind for name, kind in kinds.items() if name in known},
        tuple(tuple(name for name in group if name in known) for group in tied),
    )
