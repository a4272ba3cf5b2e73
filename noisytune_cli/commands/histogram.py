"""inspect --histogram: how the values of one tensor are spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.checkpoint.formats import check_read
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.histogram import Histogram, count_values
from noisytune_cli.errors import UsageError
from noisytune_cli.records import TensorSpec

#: Bins: as many as fit a terminal's height.
BINS = 40


@dataclass(frozen=True, slots=True)
class Counted:
    """A tensor of a checkpoint and its histogram."""

    id: str
    tensor: TensorSpec
    histogram: Histogram


def histogram(
    source: str,
    name: str,
    *,
    weights: str | None = None,
    components: Sequence[str] = (),
    revision: str | None = None,
    mmap: bool = False,
    follow_links: bool = False,
) -> Counted:
    """Count the values of the tensor called `name`; UsageError where there is none, or it holds no floats."""
    with open_checkpoint(
        source,
        weights=weights,
        components=components,
        revision=revision,
        mmap=mmap,
        follow_links=follow_links,
    ) as checkpoint:
        for file in checkpoint.sources:
            for tensor in file.tensors:
                if tensor.name == name and tensor.dtype in FLOAT_DTYPES:
                    found = count_values(file, tensor, BINS)
                    check_read([file])
                    return Counted(checkpoint.id, tensor, found)
    raise UsageError(
        f"--histogram={name}",
        why="no tensor of floats has this name",
        next_step="List the names with: noisytune inspect SOURCE --headers-only",
    )
