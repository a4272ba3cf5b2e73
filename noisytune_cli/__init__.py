"""noisytune: reproducible, std-scaled noise for pretrained checkpoints (NoisyTune, Wu et al., ACL 2022)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from noisytune_cli.errors import lacking
from noisytune_cli.version import __version__

if TYPE_CHECKING:
    from noisytune_cli.commands.files import compare, inspect, perturb, replay, verify
    from noisytune_cli.memory.ladder import ladder
    from noisytune_cli.memory.perturb import perturb_
    from noisytune_cli.memory.population import Population, noisy
    from noisytune_cli.memory.slices import add_noise_
    from noisytune_cli.memory.transformers import NoisyTuneCallback, noisy_from_pretrained

__all__ = [
    "NoisyTuneCallback",
    "Population",
    "__version__",
    "add_noise_",
    "compare",
    "inspect",
    "ladder",
    "noisy",
    "noisy_from_pretrained",
    "perturb",
    "perturb_",
    "replay",
    "verify",
]

#: Public names, and the modules that they are imported from when they are first asked for.
_HOMES = {
    "NoisyTuneCallback": "memory.transformers",
    "Population": "memory.population",
    "add_noise_": "memory.slices",
    "compare": "commands.files",
    "inspect": "commands.files",
    "ladder": "memory.ladder",
    "noisy": "memory.population",
    "noisy_from_pretrained": "memory.transformers",
    "perturb": "commands.files",
    "perturb_": "memory.perturb",
    "replay": "commands.files",
    "verify": "commands.files",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package imports nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise lacking(error) or error from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
