"""The model's own `config.json`, read as data.

It helps to decide ties and to recognise quantised weights. Nothing it names (`auto_map`, Python files) is
ever imported or run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from noisytune_cli.errors import InputInvalid
from noisytune_cli.reading import Reach, read_json

CONFIG = "config.json"

#: Called with a config and its path before any weights are fetched or opened; raises to refuse them.
ConfigCheck = Callable[[Mapping[str, Any], str], None]

_MAX_BYTES = 16 << 20


def read_config(path: Path, reach: Reach | None = None) -> Mapping[str, Any] | None:
    """Return the parsed config, None where there is none; raises InputInvalid if it is no JSON object."""
    if not os.path.lexists(path):
        return None
    config = read_json(path, _MAX_BYTES, reach, lenient=True)
    if not isinstance(config, dict):
        raise InputInvalid(
            "cannot read the config",
            path=path,
            why="it is not a JSON object",
            next_step="Fetch or save the checkpoint again",
        )
    return config
