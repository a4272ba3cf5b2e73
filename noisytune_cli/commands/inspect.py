"""inspect: what is in a checkpoint, and what perturb would do with it.

The plan is perturb's own. What it leaves to the values (constant, non-finite, ties) is settled from them, and
std is the number that perturb would use; with headers only, neither is known and no weight is read.
A checkpoint that perturb would refuse as quantised is listed all the same.

What it reports are plain records, whose field names are the columns and keys that users see. A number that
does not exist is None: statistics of what is no float or was not read, those of values that NaN or Inf makes
meaningless, the std of a single element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.checkpoint.formats import check_read
from noisytune_cli.checkpoint.quantized import refuse_quantized_models
from noisytune_cli.commands.provenance import Provenance, provenance_of
from noisytune_cli.commands.result import Result
from noisytune_cli.commands.sorting import check_sort, sort_rows
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.matrix import UNMEASURED, Spread, outcome_of
from noisytune_cli.engine.statistics import Statistics, measure
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import InputInvalid
from noisytune_cli.escape import escape
from noisytune_cli.noise.devices import open_device
from noisytune_cli.plan.evidence.doubts import warning_of
from noisytune_cli.plan.evidence.told import tell_checkpoint
from noisytune_cli.plan.plan import check_noise, select
from noisytune_cli.plan.plans import plan_checkpoint
from noisytune_cli.plan.settle import look_at_values, settle_ties
from noisytune_cli.records import Granularity, NoiseSpec, Part, Plan, Step, whole


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor: what it is, its statistics, and what perturb would do with it and why.

    `stream` names the noise stream; `low` and `high` bound the noise. `unsure` says what perturb would look
    for in values that were not read (`constant`, `non-finite`, `computed`, `tied`). Of a tensor whose
    matrices have a std each there is a record for each `part`, with its own shape; `undivided` says why one
    that looks like several matrices is taken as one. `path` is a name with the containers that it is in,
    where these say more, and `told_by` says what told whether it is a buffer. `percentiles` go by their
    names, such as `p99`.
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
    low: float | None = None
    high: float | None = None
    noise_std: float | None = None
    unsure: tuple[str, ...] = ()
    part: str | None = None
    undivided: str | None = None
    path: str | None = None
    told_by: str | None = None
    percentiles: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the tensors reported; `perturbed` counts tensors, `nan` and `inf` elements."""

    tensors: int
    perturbed: int
    parameters: int
    bytes: int
    nan: int | None
    inf: int | None


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Result):
    """A checkpoint as `inspect` found it.

    `lam` is the λ that the noise ranges are for, or `sigma` the σ, of which one is None. `quantized` says why
    perturb would refuse the checkpoint whole, `earlier` that noisytune wrote it, `provenance` what a manifest
    says of its making; else they are None.
    """

    id: str
    revision: str | None
    lam: float | None
    quantized: str | None
    tensors: tuple[TensorReport, ...]
    totals: Totals
    warnings: tuple[str, ...] = ()
    sigma: float | None = None
    earlier: str | None = None
    provenance: Provenance | None = None

    def _rows(self) -> Sequence[Any]:
        return self.tensors

    def _told(self) -> str:
        totals = self.totals
        return f"{self.id}, {totals.tensors} tensors, {totals.parameters:,} parameters"


SORT_KEYS = tuple(field.name for field in fields(TensorReport) if field.name not in ("unsure", "percentiles"))


def inspect(
    source: str,
    *,
    lam: float = 0.15,
    sigma: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    granularity: Granularity = "tensor",
    splits: Sequence[tuple[str, str]] = (),
    sort: str | None = None,
    limit: int | None = None,
    percentiles: Sequence[float] = (),
    headers_only: bool = False,
    weights: str | None = None,
    components: Sequence[str] = (),
    revision: str | None = None,
    mmap: bool = False,
    threads: int = 1,
    follow_links: bool = False,
    buffers_from: str = "auto",
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Inspection:
    """Report the tensors of `source` that `include` and `exclude` leave, in file order or sorted.

    Of more than `limit` rows the first are listed; totals count them all. `sort` is one of SORT_KEYS,
    descending with a `-` before it. `lam` is the λ whose noise ranges are given, or `sigma` the std of
    Gaussian noise in its place.
    With granularity `matrix` the matrices of a tensor are reported in its place, as known or as `splits`
    (PATTERN=DIM:SIZES) say.
    """
    noise = NoiseSpec(lam=lam, granularity=granularity, splits=tuple(splits))
    if sigma is not None:
        noise = replace(noise, lam=sigma, distribution="gaussian", scope="absolute")
    check_noise(noise)
    check_sort(sort, SORT_KEYS)
    with open_checkpoint(
        source,
        weights=weights,
        components=components,
        revision=revision,
        mmap=mmap,
        follow_links=follow_links,
        headers_only=headers_only,
    ) as checkpoint:
        told = tell_checkpoint(checkpoint, buffers_from)
        plan = plan_checkpoint(checkpoint, noise, told)
        names = select(checkpoint.tensors, include, exclude, told.buffers)
        quantized = _refusal(checkpoint, source)
        measured: dict[str, list[Statistics]] = {}
        if not headers_only:
            files = {file.name: file for file in checkpoint.sources}
            plan = plan_checkpoint(checkpoint, noise, look_at_values(plan, told, files, names))
            # A tie that shows in no row need not be read.
            shown = tuple(tie for tie in plan.ties if not names.isdisjoint(tie.names))
            (plan,) = settle_ties([replace(plan, ties=shown)], files)
            floats = [t for t in checkpoint.tensors if t.name in names and t.dtype in FLOAT_DTYPES]
            parts = {step.tensor.name: step.parts for step in plan.steps if step.action == "perturb"}
            with progress(sum(tensor.nbytes for tensor in floats)) as report:
                statistics = measure(
                    floats,
                    files,
                    open_device("cpu"),
                    threads=threads,
                    progress=report,
                    parts=parts,
                    percentiles=percentiles,
                )
            measured = {tensor.name: found for tensor, found in zip(floats, statistics, strict=True)}
        check_read(checkpoint.sources)
        rows = _report(plan, names, measured, quantized is not None)
        return Inspection(
            id=checkpoint.id,
            revision=checkpoint.revision,
            lam=lam if sigma is None else None,
            sigma=sigma,
            quantized=quantized,
            tensors=tuple(rows if sort is None else sort_rows(rows, sort))[:limit],
            totals=_total(rows, counted=not headers_only),
            warnings=(*checkpoint.warnings, *warning_of(plan)),
            earlier=_noised_before(checkpoint),
            provenance=provenance_of(checkpoint),
        )


def _refusal(checkpoint: Checkpoint, path: str) -> str | None:
    """Return why perturb would refuse the checkpoint as quantised, or None."""
    try:
        refuse_quantized_models(checkpoint.models, metadata=checkpoint.metadata, path=path, are_all=True)
    except InputInvalid as error:
        return error.why
    return None


def _noised_before(checkpoint: Checkpoint) -> str | None:
    if (earlier := checkpoint.previous_run) is None:
        return None
    why = f": {escape(earlier.why, 500)}" if earlier.files is None else ""  # else it is as it should be
    return f"{earlier.what}{why}; perturb needs --again"


def _report(
    plan: Plan, names: frozenset[str], measured: Mapping[str, Sequence[Statistics]], refused: bool
) -> list[TensorReport]:
    rows = []
    for step in plan.steps:
        tensor = step.tensor
        if tensor.name not in names:
            continue
        parts = step.matrices if step.action == "perturb" else (whole(tensor),)
        for part, found in zip(parts, measured.get(tensor.name, [None] * len(parts)), strict=True):
            rows.append(
                TensorReport(
                    name=tensor.name,
                    file=tensor.file,
                    dtype=tensor.dtype,
                    shape=part.shape,
                    elements=part.elements,
                    bytes=part.elements * FLOAT_DTYPES[tensor.dtype] if part.name else tensor.nbytes,
                    **asdict(found or Statistics()),
                    **_outcome(plan.noise, step, part, found, refused),
                    stream=step.stream,
                    part=part.name or None,
                    undivided=step.undivided,
                    path=tensor.path or None,
                    told_by=step.told_by,
                )
            )
    return rows


def _outcome(
    noise: NoiseSpec, step: Step, part: Part, found: Statistics | None, refused: bool
) -> dict[str, Any]:
    """Return the fields of a report that say what perturb would do, as far as the values are known."""
    if refused:
        return {"action": "refuse", "reason": "quantized"}
    if found is None and part.elements != 1:
        return {"action": step.action, "reason": step.reason, "unsure": step.unsure}
    spread = None
    if found is not None and found.std is not None:
        spread = Spread(found.std if noise.needs_std else None, found.min == found.max and noise.needs_std)
    elif found is not None and not (found.nan or found.inf):
        spread = UNMEASURED  # of one element
    outcome = outcome_of(noise, step, part, spread)
    return {key: getattr(outcome, key) for key in ("action", "reason", "low", "high", "noise_std")}


def _total(rows: Sequence[TensorReport], *, counted: bool) -> Totals:
    return Totals(
        tensors=len({row.name for row in rows}),
        perturbed=len({row.name for row in rows if row.action == "perturb"}),
        parameters=sum(row.elements for row in rows),
        bytes=sum(row.bytes for row in rows),
        nan=sum(row.nan or 0 for row in rows) if counted else None,
        inf=sum(row.inf or 0 for row in rows) if counted else None,
    )
