"""Which tensors divide into matrices, and how: the user's `--split` first, else what is known of the model.

A split is PATTERN=DIVISION. A division cuts dimensions, outer ones first, each written DIM:SIZES:

    0:4096,1024,1024     rows 0-4095, the next 1024, the last 1024
    -1:/2                two equal blocks of columns
    0:64,64,64*12        64, 64 and 64 rows, twelve times in turn: q, k and v stored by head
    0:/8;2:/2            eight stacked matrices, each cut into two equal blocks of columns
    0:/1                 one matrix, whatever is known of the model

The last split that matches a tensor counts. Its parts are called by their numbers: 0, 1, or 3.0 in a stack.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from noisytune_cli.checkpoint.composition import models_of
from noisytune_cli.checkpoint.config import Hyperparameters
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import UsageError
from noisytune_cli.manifest.write import FEWER_PARTS, MAX_LINES
from noisytune_cli.plan.parts import cut, within
from noisytune_cli.records import MAX_PARTS, Part, TensorSpec, whole

_LEVEL = r"(-?\d{1,2}):(?:/(\d{1,18})|(\d{1,18}(?:,\d{1,18})*)(?:\*(\d{1,18}))?)"


class _Level(NamedTuple):
    """A cut of one dimension: into `equal` blocks, or into blocks of `sizes`, `times` times in turn."""

    text: str
    axis: int
    equal: int
    sizes: tuple[int, ...]
    times: int


class Division(NamedTuple):
    """The parts of one tensor, none if it is one matrix, and why it is one though it looks like several."""

    parts: tuple[Part, ...] = ()
    undivided: str | None = None


def check_splits(splits: Sequence[tuple[str, str]], granularity: str) -> None:
    """Raise UsageError for a division that cannot be read, and for splits that would not be used."""
    if splits and granularity != "matrix":
        raise UsageError(
            f"--split={shlex.quote('='.join(splits[0]))}",
            why="it divides tensors into matrices, and each tensor is to have one std",
            next_step="Add --granularity=matrix, or leave --split out",
        )
    for pattern, division in splits:
        _levels(pattern, division)


def divide(
    tensors: Sequence[TensorSpec],
    splits: Sequence[tuple[str, str]],
    matched: Sequence[Collection[str]],
    config: Mapping[str, Any] | None,
    configs: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> dict[str, Division]:
    """Return the division of each tensor that has one, or that looks as if it should have.

    The layouts in each model of a composition are told by its own of `configs` (see `models_of`).
    `matched` are the names that each split's pattern matches. Raises UsageError where a split does not fit
    a tensor that it matches (one that can take noise).
    """
    from noisytune_cli.plan.families import known_parts  # each tensor is one matrix, unless asked

    split_of = {name: split for split, found in zip(splits, matched, strict=True) for name in found}
    divisions = {}
    for model in models_of(tensors, config, configs):
        by_name = {tensor.name: tensor for tensor in model.tensors}
        sizes = Hyperparameters(model.config)
        for tensor in model.tensors:
            if tensor.dtype not in FLOAT_DTYPES or tensor.elements < 2:
                continue
            name = model.prefix + tensor.name
            if name in split_of:
                divisions[name] = Division(_split(tensor, *split_of[name]))
                continue
            found = known_parts(tensor, by_name, sizes)
            if isinstance(found, str):
                divisions[name] = Division(undivided=found)
            elif len(found) > MAX_PARTS:
                divisions[name] = Division(undivided=f"it has {len(found):,} matrices, too many to record")
            elif found:
                divisions[name] = Division(found)
    if (count := sum(len(division.parts) for division in divisions.values())) > MAX_LINES:
        raise UsageError(
            "--granularity=matrix",
            why=f"the checkpoint has {count:,} sub-matrices, more than the {MAX_LINES:,} of a manifest",
            next_step=FEWER_PARTS,
        )
    return divisions


def _split(tensor: TensorSpec, pattern: str, division: str) -> tuple[Part, ...]:
    """Divide a tensor as the user says."""
    parts: tuple[Part, ...] = (whole(tensor),)
    for level in _levels(pattern, division):
        if any(part.repeat > 1 for part in parts):
            raise _misfit(tensor, pattern, division, f"{level.text} cuts what is not in one piece any more")
        parts = tuple(
            piece
            for part in parts
            for piece in _named(part, _cut(part.shape, level, tensor, pattern, division))
        )
        if len(parts) > MAX_PARTS:
            why = f"it would have {len(parts):,} parts, and {MAX_PARTS:,} is the most"
            raise _misfit(tensor, pattern, division, why)
    return parts if len(parts) > 1 else ()


def _named(part: Part, pieces: tuple[Part, ...]) -> tuple[Part, ...]:
    return within(part, pieces) if part.name else pieces


def _cut(
    shape: Sequence[int], level: _Level, tensor: TensorSpec, pattern: str, division: str
) -> tuple[Part, ...]:
    """Cut one dimension of what lies in one piece; UsageError where it does not come out even."""
    axis = level.axis + len(shape) if level.axis < 0 else level.axis
    if not 0 <= axis < len(shape):
        raise _misfit(tensor, pattern, division, f"it has no dimension {level.axis}")
    size, sizes = shape[axis], level.sizes
    if level.equal:
        if size % level.equal:
            why = f"its dimension {level.axis} is {size:,}, which is not {level.equal:,} equal parts"
            raise _misfit(tensor, pattern, division, why)
        if level.equal > MAX_PARTS:
            why = f"it would have {level.equal:,} parts, and {MAX_PARTS:,} is the most"
            raise _misfit(tensor, pattern, division, why)
        sizes = (size // level.equal,) * level.equal
    elif (total := sum(sizes) * level.times) != size:
        added = "+".join(map(str, sizes)) if len(sizes) < 9 else f"the {len(sizes):,} sizes"
        product = f"({added}) · {level.times}" if level.times > 1 else added
        why = f"its dimension {level.axis} is {size:,}, and {product} is {total:,}"
        raise _misfit(tensor, pattern, division, why)
    return cut(shape, axis, [(str(i), piece) for i, piece in enumerate(sizes)], level.times)


def _levels(pattern: str, division: str) -> list[_Level]:
    levels = []
    for text in division.split(";"):
        match = re.fullmatch(_LEVEL, text)
        sizes = tuple(map(int, match[3].split(","))) if match and match[3] else ()
        equal, times = (int(match[2] or 0), int(match[4] or 1)) if match else (0, 0)
        if match is None or math.prod(sizes) == 0 or times == 0 or (not sizes and equal == 0):
            raise UsageError(
                f"--split={shlex.quote(f'{pattern}={division}')}",
                why=f'"{text}" is not DIM:SIZES with sizes above 0',
                next_step="Write for example '*.qkv_proj.weight=0:4096,1024,1024', or '*.kv.weight=0:/2'",
            )
        levels.append(_Level(text, int(match[1]), equal, sizes, times))
    return levels


def _misfit(tensor: TensorSpec, pattern: str, division: str, why: str) -> UsageError:
    return UsageError(
        f"--split={shlex.quote(f'{pattern}={division}')}",
        tensor=tensor.name,
        why=f"the tensor is {list(tensor.shape)}: {why}",
        next_step="Correct the sizes, or narrow the pattern; inspect --headers-only lists the shapes",
    )
