"""What `inspect` reports: plain records, whose field names are the columns and keys that users see.

A number that does not exist is None: statistics of what is no float or was not read, those of values that
NaN or Inf makes meaningless, the std of a single element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor: what it is, its statistics, and what perturb would do with it and why.

    `stream` names the noise stream; `low` and `high` bound the noise. `unsure` says what perturb would look
    for in values that were not read (`constant`, `non-finite`, `tied`). Of a tensor whose matrices have a std
    each there is a record for each `part`, with its own shape; `undivided` says why one that looks like
    several matrices is taken as one.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    bytes: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    l1: float | None
    l2: float | None
    zeros: float | None
    nan: int | None
    inf: int | None
    action: Literal["perturb", "copy", "refuse"]
    reason: str | None
    stream: str
    low: float | None
    high: float | None
    unsure: tuple[str, ...] = ()
    part: str | None = None
    undivided: str | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the tensors reported; `perturbed` counts tensors, `nan` and `inf` elements."""

    tensors: int
    perturbed: int
    parameters: int
    bytes: int
    nan: int | None
    inf: int | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint as `inspect` found it.

    `lam` is the λ that the noise ranges are for. `quantized` says why perturb would refuse the checkpoint
    whole, or is None.
    """

    id: str
    revision: str | None
    lam: float
    quantized: str | None
    tensors: tuple[TensorReport, ...]
    totals: Totals
    warnings: tuple[str, ...] = ()
