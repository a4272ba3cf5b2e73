"""Which weights are factors of an adapter: their names say so, or the config beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from noisytune_cli.checkpoint.config import ADAPTER_CONFIG
from noisytune_cli.checkpoint.layout import stem_of
from noisytune_cli.errors import InputInvalid
from noisytune_cli.reading import read_json

if TYPE_CHECKING:
    from noisytune_cli.checkpoint.checkpoint import Checkpoint

_ADAPTER, _MAX_BYTES = "adapter_model", 16 << 20

#: peft's methods whose tensors add to the model, or multiply it, one by one: these have a mean.
_WITHOUT_FACTORS = frozenset(
    ("ADAPTION_PROMPT", "CPT", "IA3", "LN_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
) | {"PROMPT_TUNING", "TRAINABLE_TOKENS"}

#: What names of factors have in them, in peft, diffusers, LyCORIS and their kin.
_FACTOR = re.compile(
    r"(?:^|[._])(?:lora|loha|hada|lokr|dora|vera|adalora|randlora|glora|oft|boft|hra|fourierft)(?:[._]|$)",
    re.IGNORECASE,
)


def factors_among(names: Iterable[str]) -> list[str]:
    """Return those tensors that are called factors of an adapter."""
    return [name for name in names if _FACTOR.search(name)]


def kind_of_factors(checkpoint: Checkpoint) -> str:
    """Return the kind of adapter that the config calls weights, where that kind has factors, else ""."""
    config = adapter_config(checkpoint)
    kind = str(config.get("peft_type", "")) if config else ""
    return "" if kind in _WITHOUT_FACTORS else kind


def adapter_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Return the adapter's config where the weights are an adapter's, None elsewhere."""
    main = checkpoint.sources[0]
    path = main.path.with_name(ADAPTER_CONFIG)
    if stem_of(main.name) != _ADAPTER or not path.is_file():
        return None
    try:
        config = read_json(path, _MAX_BYTES, checkpoint.reach)
    except InputInvalid:
        return None
    return config if isinstance(config, dict) else None
