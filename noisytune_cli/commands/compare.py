"""compare: what lies between two checkpoints, tensor by tensor, and by layer and kind.

Both are opened as `inspect` opens one, so format, sharding and dtype do not matter. Tensors are paired by
name, by a prefix, or as the user says; what has no partner, or a partner of another shape, is listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.checkpoint.formats import check_read
from noisytune_cli.commands.heat_map import KIND_ORDER, HeatMap, arrange, layer_order
from noisytune_cli.commands.provenance import Provenance, provenance_of
from noisytune_cli.commands.result import Result
from noisytune_cli.commands.sorting import check_sort, natural, sort_rows
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.changes import Change, measure_changes
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.plan.evidence.told import tell_checkpoint
from noisytune_cli.plan.groups import kinds_of, layers_of
from noisytune_cli.plan.plan import select
from noisytune_cli.plan.renames import Pair, Renaming, Rules, pair_up
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    from noisytune_cli.commands.detect import SeedScore
    from noisytune_cli.manifest.read import RecordedManifest

By = Literal["tensor", "layer", "kind"]


@dataclass(frozen=True, slots=True)
class ChangeRow:
    """The change of one tensor, or of all of a layer or kind; what does not exist is None.

    `norm_change` and `change_norm` are in units of the L1 norm of A; `l2` and `largest` are of the change
    itself, `equal` is a share (0 to 1). `noise` is what the change of a tensor looks like, with `lam` between
    `lam_low` and `lam_high`. `b` is its name in B where that is another.
    """

    name: str
    tensors: int
    elements: int
    kind: str | None = None
    layer: str | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    shape: tuple[int, ...] | None = None
    norm_change: float | None = None
    change_norm: float | None = None
    l2: float | None = None
    largest: float | None = None
    cosine: float | None = None
    equal: float | None = None
    noise: str | None = None
    lam: float | None = None
    lam_low: float | None = None
    lam_high: float | None = None
    b: str | None = None


SORT_KEYS = tuple(field.name for field in fields(ChangeRow))


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints: a plain name or hub id, its commit, and what its manifest says."""

    id: str
    revision: str | None
    provenance: Provenance | None


@dataclass(frozen=True, slots=True)
class Lone:
    """A tensor that only one side has."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Misfit:
    """A pair that cannot be compared: of other shapes, or of other dtypes that are no floats."""

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Result):
    """What `compare` found. `rows` are by tensor, layer or kind; with headers only, `differs` is of
    these. `other_dtype` are the names of pairs whose dtypes differ, `heat_map` has `change_norm`. `seeds` say
    whether the change is the noise of the seeds that were asked for.
    """

    a: Side
    b: Side
    by: By
    rows: tuple[ChangeRow, ...]
    total: ChangeRow
    only_a: tuple[Lone, ...]
    only_b: tuple[Lone, ...]
    misfits: tuple[Misfit, ...]
    other_dtype: tuple[str, ...]
    kinds: tuple[ChangeRow, ...]
    heat_map: HeatMap
    renaming: str
    tolerance: float
    differs: bool
    headers_only: bool
    seeds: tuple[SeedScore, ...] = ()
    warnings: tuple[str, ...] = ()

    def _rows(self) -> Sequence[Any]:
        return self.rows

    def _told(self) -> str:
        what = "they differ" if self.differs else "no difference"
        return f"{self.a.id} and {self.b.id}, {len(self.rows)} rows by {self.by}: {what}"


def compare(
    a: str,
    b: str,
    *,
    by: By = "tensor",
    maps: Sequence[tuple[str, str]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    sort: str | None = "name",
    tolerance: float = 0.0,
    headers_only: bool = False,
    seeds: Sequence[int] = (),
    manifest: str | None = None,
    weights: tuple[str | None, str | None] = (None, None),
    components: Sequence[str] = (),
    revisions: tuple[str | None, str | None] = (None, None),
    mmap: bool = False,
    threads: int = 1,
    follow_links: bool = False,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Comparison:
    """Compare the checkpoints `a` and `b`, of which `include` and `exclude` choose tensors by A's names.

    They differ where a value does by more than `tolerance`, where it is no number in one of them alone, where
    a tensor has no partner or none of its shape, and with a tolerance of 0 where a dtype differs. Of `seeds`,
    or those of a `manifest`, it is told which one's noise the change is.
    Rows are sorted by a key of SORT_KEYS, descending with a `-` before it; tensors are in A's order for None,
    layers and kinds in their own for that and for "name".
    """
    check_sort(sort, SORT_KEYS)
    if not 0 <= tolerance < math.inf:
        raise UsageError(
            f"--tolerance={tolerance:g}",
            why="it is no finite number from 0 on",
            next_step="Give the largest change of a value that counts as none, such as 1e-6",
        )
    rules = Rules(maps) if maps else None
    recorded = None if manifest is None else _read_manifest(manifest)
    if (seeds or recorded) and headers_only:
        raise UsageError(
            "--headers-only",
            why="whose noise the change is, only the values tell",
            next_step="Leave it out, or --seed and --manifest",
        )
    with ExitStack() as opened:
        first, second = (
            opened.enter_context(
                open_checkpoint(
                    source,
                    weights=chosen,
                    components=components,
                    revision=revision,
                    mmap=mmap,
                    follow_links=follow_links,
                    headers_only=headers_only,
                )
            )
            for source, chosen, revision in zip((a, b), weights, revisions, strict=True)
        )
        pairing = pair_up(first.tensors, second.tensors, rules)
        buffers = frozenset().union(*(tell_checkpoint(side, "names").buffers for side in (first, second)))
        selected = select([*first.tensors, *pairing.only_b], include, exclude, buffers)
        pairs = [pair for pair in pairing.pairs if pair.a.name in selected]
        fitting = [pair for pair in pairs if _fits(pair)]
        changes: list[Change | None] = [None] * len(fitting)
        if not headers_only:
            changes = list(_measure(fitting, first, second, threads, progress))
        scores: tuple[SeedScore, ...] = ()
        if seeds or recorded:
            scores = _find_seeds(fitting, first, second, seeds, recorded, threads, progress)
        check_read((*first.sources, *second.sources))
        found = list(zip(fitting, changes, strict=True))
        only_a = [_lone(t) for t in pairing.only_a if t.name in selected]
        only_b = [_lone(t) for t in pairing.only_b if t.name in selected]
        misfits = [_misfit(pair) for pair in pairs if not _fits(pair)]
        if sort is not None:  # what is not sorted by another key, too
            found.sort(key=lambda one: natural(one[0].a.name))
            only_a, only_b = sort_rows(only_a, "name"), sort_rows(only_b, "name")
            misfits = sort_rows(misfits, "name")
        return _summarize(
            first,
            second,
            found,
            by=by,
            sort=None if by != "tensor" and sort == "name" else sort,
            tolerance=tolerance,
            only_a=only_a,
            only_b=only_b,
            misfits=misfits,
            renaming=pairing.renaming,
            buffers=buffers,
            headers_only=headers_only,
            seeds=scores,
        )


def _read_manifest(path: str) -> RecordedManifest:
    from noisytune_cli.manifest.locate import manifest_of
    from noisytune_cli.manifest.read import read_manifest

    return read_manifest(manifest_of(path))


def _fits(pair: Pair) -> bool:
    """Tell whether values can be held against each other."""
    floats = pair.a.dtype in FLOAT_DTYPES and pair.b.dtype in FLOAT_DTYPES
    return pair.a.shape == pair.b.shape and (floats or pair.a.dtype == pair.b.dtype)


def _lone(tensor: TensorSpec) -> Lone:
    return Lone(tensor.name, tensor.dtype, tensor.shape)


def _misfit(pair: Pair) -> Misfit:
    return Misfit(pair.a.name, pair.a.dtype, pair.b.dtype, pair.a.shape, pair.b.shape)


def _measure(
    pairs: Sequence[Pair], first: Checkpoint, second: Checkpoint, threads: int, progress: Progress
) -> list[Change]:
    files_a, files_b = ({file.name: file for file in side.sources} for side in (first, second))
    with progress(sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)) as report:
        return measure_changes(
            [(pair.a, pair.b) for pair in pairs], files_a, files_b, threads=threads, progress=report
        )


def _find_seeds(
    pairs: Sequence[Pair],
    first: Checkpoint,
    second: Checkpoint,
    seeds: Sequence[int],
    recorded: RecordedManifest | None,
    threads: int,
    progress: Progress,
) -> tuple[SeedScore, ...]:
    """Look for the noise of each seed in what B has over A, under the names that it has in A or in B."""
    # Imported here: few comparisons ask for it, and it takes as long as a small one.
    from noisytune_cli.commands.detect import (
        distributions_of,
        each_once,
        find_seeds,
        perturbed_steps,
        planned_streams,
        seeds_of,
    )
    from noisytune_cli.engine.correlation import Suspect

    if recorded is None:
        noised = planned_streams(first)
    else:
        noised = {step.tensor.name: step.stream for step in perturbed_steps(recorded)}
    files_a, files_b = ({file.name: file for file in side.sources} for side in (first, second))
    streams, suspects = [], []
    for pair in pairs:
        stream = noised.get(pair.a.name, noised.get(pair.b.name))
        if stream is not None and pair.a.dtype in FLOAT_DTYPES:
            streams.append(stream)
            suspects.append(Suspect(pair.b, files_b[pair.b.file], (pair.a, files_a[pair.a.file])))
    if not suspects:
        raise InputInvalid(
            "nothing to look for noise in",
            path=second.path,
            why="no pair of tensors has the name of one that gets noise",
            next_step="Check --manifest and the filters, or leave --seed and --manifest out",
        )
    streams, suspects = each_once(streams, suspects)
    scores, _ = find_seeds(
        suspects,
        streams,
        seeds_of(seeds, recorded),
        distributions_of(None, recorded),
        renames=recorded is None,
        config=first.config,
        threads=threads,
        progress=progress,
    )
    return scores


def _summarize(
    first: Checkpoint,
    second: Checkpoint,
    found: Sequence[tuple[Pair, Change | None]],
    *,
    by: By,
    sort: str | None,
    tolerance: float,
    only_a: Sequence[Lone],
    only_b: Sequence[Lone],
    misfits: Sequence[Misfit],
    renaming: Renaming,
    buffers: Collection[str],
    headers_only: bool,
    seeds: tuple[SeedScore, ...],
) -> Comparison:
    names = [pair.a.name for pair, _ in found]
    kinds = kinds_of(names, buffers, {pair.a.name: pair.a.shape for pair, _ in found})
    layers = layers_of(names)
    tensors = [_row(pair, change, kinds, layers) for pair, change in found]
    groups = {
        "layer": _group(
            sorted(found, key=lambda one: layer_order(layers[one[0].a.name])), lambda name: layers[name]
        ),
        "kind": _group(
            sorted(found, key=lambda one: KIND_ORDER[kinds[one[0].a.name]]), lambda name: kinds[name]
        ),
    }
    rows = tensors if by == "tensor" else groups[by]
    other_dtype = [pair.a.name for pair, _ in found if pair.a.dtype != pair.b.dtype]
    changed = any(change is not None and _differs(change, tolerance) for _, change in found)
    structure = bool(only_a or only_b or misfits or (other_dtype and not tolerance))
    return Comparison(
        a=Side(first.id, first.revision, provenance_of(first)),
        b=Side(second.id, second.revision, provenance_of(second)),
        by=by,
        rows=tuple(rows if sort is None else sort_rows(rows, sort)),
        total=_together("TOTAL", found),
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        misfits=tuple(misfits),
        other_dtype=tuple(other_dtype),
        kinds=tuple(groups["kind"]),
        heat_map=_heat_map(found, kinds, layers),
        renaming=str(renaming),
        tolerance=tolerance,
        differs=changed or structure,
        headers_only=headers_only,
        seeds=seeds,
        warnings=(*first.warnings, *(w for w in second.warnings if w not in first.warnings)),
    )


def _differs(change: Change, tolerance: float) -> bool:
    """Tell whether a change is more than the tolerance; without numbers, equal bytes and NaN are none."""
    largest = change.largest_change
    return change.equal < change.elements and (largest is None or largest > tolerance)


def _row(pair: Pair, change: Change | None, kinds: dict[str, str], layers: dict[str, str]) -> ChangeRow:
    name = pair.a.name
    likeness = None if change is None else change.noise
    return ChangeRow(
        name=name,
        tensors=1,
        elements=pair.a.elements,
        kind=kinds[name],
        layer=layers[name],
        dtype_a=pair.a.dtype,
        dtype_b=pair.b.dtype,
        shape=pair.a.shape,
        **_numbers(change),
        noise=None if likeness is None else likeness.distribution,
        lam=None if likeness is None else likeness.lam,
        lam_low=None if likeness is None else likeness.low,
        lam_high=None if likeness is None else likeness.high,
        b=pair.b.name if pair.b.name != name else None,
    )


def _numbers(change: Change | None) -> dict[str, Any]:
    if change is None:
        return {}
    return {
        "norm_change": change.norm_change,
        "change_norm": change.change_norm,
        "l2": change.l2,
        "largest": change.largest_change,
        "cosine": change.cosine,
        "equal": change.equal_share,
    }


def _group(found: Iterable[tuple[Pair, Change | None]], key: Callable[[str], str]) -> list[ChangeRow]:
    """Return a row for each group of tensors, in the order of their first ones."""
    groups: dict[str, list[tuple[Pair, Change | None]]] = {}
    for pair, change in found:
        groups.setdefault(key(pair.a.name), []).append((pair, change))
    return [_together(name, members) for name, members in groups.items()]


def _together(name: str, members: Sequence[tuple[Pair, Change | None]]) -> ChangeRow:
    """Return the row of all elements of some tensors together."""
    changes = [change for _, change in members if change is not None]
    total = sum(changes, Change()) if len(changes) == len(members) else None
    return ChangeRow(name, len(members), sum(pair.a.elements for pair, _ in members), **_numbers(total))


def _heat_map(
    found: Sequence[tuple[Pair, Change | None]], kinds: dict[str, str], layers: dict[str, str]
) -> HeatMap:
    cells: dict[tuple[str, str], Change] = {}
    for pair, change in found:
        if change is not None:
            cell = layers[pair.a.name], kinds[pair.a.name]
            cells[cell] = cells.get(cell, Change()) + change
    return arrange({cell: change.change_norm for cell, change in cells.items()})
