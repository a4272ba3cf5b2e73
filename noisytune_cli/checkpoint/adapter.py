"""Which weights are factors of an adapter: their names say so, or the config beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from noisytune_cli.checkpoint.layout import stem_of

if TYPE_CHECKING:
    from noisytune_cli.checkpoint.checkpoint import Checkpoint

#: What an adapter's weights are called, without what their name ends in.
_ADAPTER = "adapter_model"

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
    return checkpoint.adapter if stem_of(checkpoint.sources[0].name) == _ADAPTER else None
