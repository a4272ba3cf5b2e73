"""What tests of noise in memory share."""

from __future__ import annotations

import pytest

#: What is said of tensors that hold a NaN, and of noise that is very small or very large.
_TOLD = (".*left without noise, because", ".*left more than half", ".*times the weights' std")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let tests of bits have values and noise that are warned of; the warnings have tests of their own."""
    for told in _TOLD:
        item.add_marker(pytest.mark.filterwarnings(f"ignore:{told}:noisytune_cli.errors.NoisytuneWarning"))
