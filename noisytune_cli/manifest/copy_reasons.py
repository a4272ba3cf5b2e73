"""What the reason for a copy says of its tensor, or part of one: its dtype, its elements and its std."""

from __future__ import annotations

from typing import get_args

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.records import Reason, Scope

#: The reasons, by the word that a manifest has for them.
REASONS: dict[str, Reason] = {reason: reason for reason in get_args(Reason)}

#: What a part can be copied for: the rest is known of its tensor, which then has no parts.
PART_REASONS: dict[str, Reason] = {
    "one-element": "one-element",
    "constant": "constant",
    "non-finite": "non-finite",
    "unrepresentable": "unrepresentable",
}


def misfit(
    reason: Reason, dtype: str, elements: int, std: float | None, scope: Scope
) -> tuple[str, str] | None:
    """Return the field that contradicts a reason and in what way, or None where all fits."""
    is_float = dtype in FLOAT_DTYPES
    if (
        (reason == "not-float") == is_float
        or (reason == "empty") != (is_float and elements == 0)
        or (reason == "one-element" and (elements != 1 or scope == "global"))
    ):
        return "reason", f"is {reason}, which its dtype and shape are not"
    # An unrepresentable amplitude: std may be 0 (too small for a float32), null (too large), or any.
    fits = std == 0.0 if reason == "constant" else reason == "unrepresentable" or std is None
    return None if fits else ("std", f"does not fit the reason {reason}")
