"""Where the hub's cache is, without asking huggingface_hub, whose import takes longer than a small run.

The environment is read as its `constants.py` does it; a test holds the two together.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Return where the hub's cache is, links resolved; None where the environment names nothing.

    It need not exist.
    """
    home = os.path.join(os.getenv("XDG_CACHE_HOME", os.path.join("~", ".cache")), "huggingface")
    default = os.path.join(_expanded(os.getenv("HF_HOME", home)), "hub")
    folder = _expanded(os.getenv("HF_HUB_CACHE", os.getenv("HUGGINGFACE_HUB_CACHE", default)))
    return Path(os.path.realpath(folder)) if folder else None


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))
