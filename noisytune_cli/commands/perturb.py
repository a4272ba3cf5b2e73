"""perturb: a checkpoint in, a noisy checkpoint and its manifest out.

Everything that can be refused is refused before a weight is read: the source's kind, the plan, the place of
the output, the space it needs. Then tensors walk from source to staging, and publishing is the last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from noisytune_cli import __version__
from noisytune_cli.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.companions import companions, left_behind
from noisytune_cli.confirm import settle_ties
from noisytune_cli.crew import Progress, default_threads
from noisytune_cli.dequantize import check_config, dequantize
from noisytune_cli.devices import open_device
from noisytune_cli.errors import InputInvalid, unreadable
from noisytune_cli.escape import escape
from noisytune_cli.formats import Sink, Source
from noisytune_cli.manifest import encode
from noisytune_cli.output import check_output, check_space
from noisytune_cli.parameters import Told, tell_buffers
from noisytune_cli.plan import check_not_empty, check_outcomes, convert, make_plan
from noisytune_cli.publish import Publication
from noisytune_cli.quantized import refuse_quantized, refuse_quantized_config
from noisytune_cli.records import (
    Conversion,
    FileRecord,
    Manifest,
    NoiseSpec,
    OutputRecord,
    Plan,
    Receipt,
    SourceRecord,
)
from noisytune_cli.rewrite import OutputFile, lay_out, resolve_rewritten
from noisytune_cli.walk import Variant, Walk, work_bytes

#: Room for the manifest in the check for space: a fixed part, and that of each tensor.
_MANIFEST_BYTES, _MANIFEST_BYTES_A_TENSOR = 4096, 1024


@dataclass(frozen=True)
class Request:
    """Where to read and how; what `perturb` and its dry run have in common."""

    source: str
    noise: NoiseSpec
    conversion: Conversion | None = None
    weights: str | None = None
    revision: str | None = None
    mmap: bool = False
    again: bool = False
    quiet: bool = False
    buffers_from: str = "auto"


@dataclass(frozen=True)
class Perturbed:
    """What was published: the manifest, where it and the output are, and what the user should know."""

    output: Path
    manifest_path: Path
    manifest: Manifest
    cleared: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """A dry run's answer: the plan, made from headers alone."""

    id: str
    revision: str | None
    plan: Plan
    warnings: tuple[str, ...]


def plan_perturb(request: Request) -> Planned:
    """Say what `perturb` would do, without reading a weight."""
    with _open(request) as source:
        told = tell_buffers(source.tensors, config=source.config, decider=request.buffers_from)
        plan, _ = _plan(source, request, told)
        return Planned(source.id, source.revision, plan, (*source.warnings, *told.warnings))


def perturb(
    request: Request,
    out: str,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Perturbed:
    """Write the noisy checkpoint and its manifest to `out`, durably, or change nothing."""
    with _open(request) as source:
        told = tell_buffers(source.tensors, config=source.config, decider=request.buffers_from)
        plan, files = _plan(source, request, told)
        walk = Walk(open_device(device), threads or default_threads())
        output = resolve_rewritten(out, source, files)
        check_output(output, source, overwrite=overwrite)
        check_space(output, needed_bytes(source, files), len(source.sources) + len(source.others) + 1)
        with Publication(output, directory=not source.single_file, overwrite=overwrite) as publication:
            (plan,) = settle_ties([plan], {file.name: file for file in source.sources})
            check_not_empty(plan, path=request.source)
            plan = convert(plan, request.conversion or Conversion())
            (receipts,) = carry_out(walk, [(plan, publication)], source, progress, files)
            check_outcomes(plan.noise, ((r.action, r.reason) for r in receipts), path=request.source)
            anew = [] if request.conversion is None else companions(source, files, request.conversion)
            kept = [name for name in source.others if name not in {one.source for one in anew}]
            copied = tuple((name, publication.copy(source.root / name, name)) for name in kept)
            rewritten = tuple((c.name, c.source, publication.write(c.name, c.content)) for c in anew)
            converted = None
            if request.conversion is not None:
                records = tuple(file.record for file in files)
                converted = OutputRecord(request.conversion, records, rewritten)
            manifest = Manifest(
                tool_name="noisytune",
                tool_version=__version__,
                source=SourceRecord(
                    source.id,
                    source.revision,
                    tuple(FileRecord(s.name, s.size, s.header_digest) for s in source.sources),
                ),
                noise=plan.noise,
                receipts=receipts,
                copied=copied,
                left_out=(*source.left_out, *left_behind(source, files)),
                output=converted,
            )
            manifest_path = publication.publish(encode(manifest))
            warnings = (*source.warnings, *told.warnings, *_warnings(receipts))
            return Perturbed(output, manifest_path, manifest, publication.cleared, warnings)


def _open(request: Request) -> Checkpoint:
    dequantizes = request.conversion is not None and request.conversion.dequantized is not None
    source = open_checkpoint(
        request.source,
        weights=request.weights,
        revision=request.revision,
        mmap=request.mmap,
        check_config=check_config if dequantizes else refuse_quantized_config,
        quiet=request.quiet,
    )
    try:
        if source.noised and not request.again:
            raise InputInvalid(
                "the source was noised before",
                path=request.source,
                why="a manifest of noisytune lies beside its weights, and noise on noise is rarely meant",
                next_step="Give the original checkpoint, or pass --again",
            )
        if dequantizes:
            return dequantize(source, request.source)
        refuse_quantized(source.tensors, config=source.config, metadata=source.metadata, path=request.source)
    except BaseException:
        source.close()
        raise
    return source


def _plan(source: Checkpoint, request: Request, told: Told) -> tuple[Plan, tuple[OutputFile, ...]]:
    """Return the plan, and the output's weight files where they are not like the source's."""
    plan = make_plan(
        source.tensors,
        request.noise,
        config=source.config,
        metadata=source.metadata,
        stored_as_one=source.stored_as_one,
        buffers=told.buffers,
        by_model=told.by_model,
    )
    check_not_empty(plan, path=source.root)
    if request.conversion is None:
        return plan, ()
    plan = convert(plan, request.conversion)
    return plan, lay_out(source.sources, plan, request.conversion)


def carry_out(
    walk: Walk,
    wanted: Sequence[tuple[Plan, Publication]],
    source: Checkpoint,
    progress: Progress,
    files: Sequence[OutputFile] = (),
    recorded: Mapping[str, Receipt] | None = None,
) -> tuple[tuple[Receipt, ...], ...]:
    """Fill every weight file of every output and flush it; the source must be as it was throughout.

    `files` are those of each output where they are not like the source's.
    """
    models: Sequence[Source | OutputFile] = files or source.sources
    targets = {name: slot for file in files for name, slot in file.slots.items()}
    with ExitStack() as opened:
        variants = []
        for plan, publication in wanted:
            sinks: dict[str, Sink] = {}
            for file, made in zip(source.sources, models, strict=True):
                name = publication.output.name if source.single_file else made.name
                sinks[file.name] = made.create_sink(publication.path(name))
                opened.callback(sinks[file.name].abort)
            variants.append(Variant(plan, sinks, targets, recorded=recorded or {}))
        with progress(work_bytes(variants)) as report:
            sources = {file.name: file for file in source.sources}
            receipts = replace(walk, progress=report).carry_out(variants, sources)
        for file in source.sources:
            file.check_unchanged()
            file.check_sums()
        for variant in variants:
            for sink in variant.sinks.values():
                sink.finish()
    return receipts


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(error, path) from error


def needed_bytes(source: Checkpoint, files: Sequence[OutputFile] = ()) -> int:
    """Return how many bytes an output of this source takes, its manifest included (an estimate)."""
    weights = sum(file.size for file in files or source.sources)
    others = sum(_size(source.root / name) for name in source.others)
    return weights + others + _MANIFEST_BYTES + _MANIFEST_BYTES_A_TENSOR * len(source.tensors)


def _warnings(receipts: tuple[Receipt, ...]) -> list[str]:
    """Say which tensors the noise could not reach, or hardly; a line for each kind, not for each tensor."""
    broken = [r.step.tensor.name for r in receipts if r.reason == "non-finite" and not r.parts]
    broken += [
        f"{r.step.tensor.name}[{p.part.name}]" for r in receipts for p in r.parts if p.reason == "non-finite"
    ]
    numb = [r.step for r in receipts if r.unchanged * 2 > r.step.tensor.elements]
    warnings = []
    if broken:
        warnings.append(f"{_some(broken)}: copied as they are, because they hold NaN or infinite values")
    if numb:
        dtypes = "/".join(sorted({step.out_dtype or step.tensor.dtype for step in numb}))
        warnings.append(
            f"{_some([step.tensor.name for step in numb])}: rounding to {dtypes} left more than half of the "
            "elements without noise (the manifest has the counts)"
        )
    return warnings


def _some(names: list[str]) -> str:
    """Name the first three, and count the rest."""
    shown = ", ".join(escape(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
