"""A model without weights, which knows its parameters, its buffers and its ties exactly.

Where `config.json` names an architecture of a library's own (transformers, diffusers, timm) and that is
installed, a model is built from it on torch's meta device (`meta_model.py`, in a process of its own). That
takes seconds, and importing torch, so by default it is asked only where there is a doubt (`told.py`).
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

from noisytune_cli.checkpoint.config import library_of
from noisytune_cli.plan.evidence.structure import Kind
from noisytune_cli.records import TensorSpec

#: Keys of a config that say how many of something a model is made of.
_COUNTS = re.compile(
    r"(num|n)_\w*(layers?|blocks?|experts?|layer)|depths?|\w*_(layers|depths?|blocks)|\w*layers_per_\w*"
)

#: The key under which each library names the architecture.
_NAMED_BY = {"transformers": "architectures", "diffusers": "_class_name", "timm": "architecture"}
#: What such a name is; in timm it may have a tag, but no colon, which would name a repository.
_CLASS = re.compile(r"[A-Za-z]\w*")
_NAME = {"transformers": _CLASS, "diffusers": _CLASS, "timm": re.compile(r"\w+(\.\w+)?")}

#: What is installed for a library in a clone, where it is one of noisytune's extras.
_EXTRA = {"transformers": "'.[transformers]' in a clone"}

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
    library = library_of(config)
    name = config.get(_NAMED_BY.get(library or "", ""))
    if library == "transformers" and isinstance(name, list) and len(name) == 1:
        name = name[0]
    if library is None or type(name) is not str:
        return "config.json names no architecture"
    if "auto_map" in config:
        return "its architecture comes with the checkpoint, and what comes with one is never run"
    is_typed = library != "transformers" or type(config.get("model_type")) is str
    if not is_typed or not _NAME[library].fullmatch(name):
        return f"its architecture is none of {library}'{'' if library.endswith('s') else 's'}"
    most = max(_FEWEST_ALLOWED, _MOST_PARTS * len(tensors))
    if any(count > most for count in _counts(config, 0)):
        return f"config.json describes more than {most:,} parts, far more than the checkpoint has"
    if not all(importlib.util.find_spec(package) for package in (library, "torch")):
        return f"{library} is not installed (pip install {_EXTRA.get(library, library)})"
    names = [tensor.name for tensor in tensors]
    return _run({"library": library, "config": dict(config), "names": names})


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
        return f"{request['library']} cannot build its architecture from config.json"
    known = set(request["names"])
    return Answer(
        {name: kind for name, kind in kinds.items() if name in known},
        tuple(tuple(name for name in group if name in known) for group in tied),
    )
