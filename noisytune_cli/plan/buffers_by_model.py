"""Parameter or buffer: what the names leave open, a model without weights settles.

`plan/buffers.py` tells buffers by their names and shapes, at no cost and nearly always. Where `config.json`
names one of transformers' architectures and transformers is installed, a model built from it on torch's meta
device (`plan/meta_model.py`, in a process of its own) knows exactly. That takes seconds, and importing torch,
so by default it is asked only where the names leave a doubt; what it does not know, the names still decide.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import UsageError
from noisytune_cli.escape import escape
from noisytune_cli.plan.buffers import find_buffers
from noisytune_cli.records import TensorSpec

Decider = Literal["auto", "names", "model"]

#: What --buffers-from can be.
DECIDERS: tuple[str, ...] = get_args(Decider)

#: The family of a buffer that the model knows as one.
REGISTERED = "registered as a buffer by its architecture"

#: The last part of names that no architecture gives a buffer, batch norms aside.
_PLAIN = re.compile(
    r"weight(_[gv]|_[ih]h_l\d+(_reverse)?)?|bias(_[kv]|_[ih]h_l\d+(_reverse)?)?|original[01]|gamma|beta"
    r"|in_proj_(weight|bias)|\w*_proj(_bias)?|A_log|D|dt_bias|logit_scale|sinks|(cls|mask|dist)_token"
    r"|class_embedding|relative_position_bias_table|lora_(A|B|embedding_[AB])|lambda_[12]"
)

#: Keys of a config that say how many of something a model is made of.
_COUNTS = re.compile(r"(num|n)_\w*(layers?|blocks?|experts?|layer)|depths?|\w*_(layers|depths?|blocks)")

#: More parts than this for each tensor of the checkpoint, and the config is of another model, or a trap.
_MOST_PARTS, _FEWEST_ALLOWED = 2, 1000

_SECONDS = 180  # that a model may take to be built, the imports included


@dataclass(frozen=True)
class Told:
    """The buffers, each with the family it is of; which names the model decided, and what to warn of."""

    buffers: Mapping[str, str]
    by_model: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = field(default=())


def tell_buffers(
    tensors: Sequence[TensorSpec], *, config: Mapping[str, Any] | None = None, decider: str = "auto"
) -> Told:
    """Tell which tensors are buffers: by their names, and by the model where it is to be asked.

    UsageError for an unknown decider, and for `model` where no model can be asked.
    """
    if decider not in DECIDERS:
        raise UsageError(
            f"--buffers-from {decider}",
            why="there is no such source",
            next_step=f"Use one of: {', '.join(DECIDERS)}",
        )
    by_names = find_buffers(tensors, config=config)
    doubtful = [] if decider == "names" else list(_doubtful(tensors, by_names))
    if decider == "names" or (decider == "auto" and not doubtful):
        return Told(by_names)
    kinds = _ask(tensors, config or {})
    if isinstance(kinds, str):
        if decider == "model":
            raise UsageError(
                "--buffers-from model",
                why=f"no model can be asked: {kinds}",
                next_step="Leave the option out, and use --exclude for what should get no noise",
            )
        has_architecture = bool((config or {}).get("architectures"))
        return Told(by_names, warnings=(_warning(doubtful, kinds),) if has_architecture else ())
    buffers = {name: family for name, family in by_names.items() if kinds.get(name) != "parameter"}
    registered = [name for name, kind in kinds.items() if kind == "buffer"]
    return Told(dict.fromkeys(registered, REGISTERED) | buffers, frozenset(kinds))


def _doubtful(tensors: Sequence[TensorSpec], buffers: Mapping[str, str]) -> Iterator[str]:
    """Yield the names that may be a buffer's or a parameter's, among those that could take noise."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for tensor in tensors:
        if tensor.dtype not in FLOAT_DTYPES or tensor.elements < 2 or tensor.name in buffers:
            continue
        module, _, last = tensor.name.rpartition(".")
        statistics = f"{module}.running_mean" in by_name
        counted = f"{module}.num_batches_tracked" in by_name
        if not _PLAIN.fullmatch(last) or (statistics and not counted):
            yield tensor.name


def _ask(tensors: Sequence[TensorSpec], config: Mapping[str, Any]) -> dict[str, str] | str:
    """Return the kind of each name that the model knows, or why there is no model to ask."""
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


def _run(request: Mapping[str, Any]) -> dict[str, str] | str:
    """Have the model built in a process of its own, which the current folder has no say in (-P)."""
    from noisytune_cli.plan import meta_model

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
    except (OSError, ValueError, subprocess.SubprocessError):
        return "transformers cannot build its architecture from config.json"
    known = set(request["names"])
    return {name: kind for name, kind in answer.items() if name in known}


def _warning(doubtful: Sequence[str], why: str) -> str:
    shown = ", ".join(escape(name) for name in doubtful[:3])
    more = f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else ""
    return f"{shown}{more}: taken for parameters by name, which no model could confirm: {why}"
