"""average: several checkpoints of one model in, their mean and its manifest out.

The output has the first source's format, layout and other files. As with perturb everything that can be
refused is refused before a weight is read, memory holds a few tiles, and publishing is the last step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace

from noisytune_cli.checkpoint.address import Place
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.formats._direct import room_for
from noisytune_cli.checkpoint.formats._file import common_mode
from noisytune_cli.commands.card import claims_of, read_card, write_card
from noisytune_cli.commands.one_model import (
    check_same_buffers,
    check_same_config,
    check_same_tensors,
    refuse_adapter,
)
from noisytune_cli.commands.replaced import check_before_download, refuse_planned, require_unchanged
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.write import complete, record_source
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine import mean
from noisytune_cli.engine.threads import Progress, default_threads
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.escape import enumerate_some
from noisytune_cli.manifest.average import AverageManifest, manifest_bytes, pieces
from noisytune_cli.manifest.write import MAX_BYTES
from noisytune_cli.noise.devices import open_device
from noisytune_cli.output.commits import publication_at
from noisytune_cli.output.convert import check_names
from noisytune_cli.output.destination import check_output, resolve_rewritten
from noisytune_cli.output.publish import Publication
from noisytune_cli.output.space import check_descriptors, check_space, copied_bytes
from noisytune_cli.records import NoiseSpec, TensorSpec


@dataclass(frozen=True)
class Averaged:
    """What was published: the manifest, where it and the output are, and what the user should know."""

    output: Place
    manifest_path: Place
    manifest: AverageManifest
    cleared: tuple[str, ...]
    warnings: tuple[str, ...]


def average(
    sources: Sequence[str],
    out: str,
    *,
    coefficients: Sequence[float] = (),
    ignore_config: bool = False,
    average_statistics: bool = False,
    card: bool = False,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    threads: int | None = None,
    direct: bool | None = None,
    mmap: bool = False,
    follow_links: bool = False,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Averaged:
    """Write the mean of `sources` and its manifest to `out`, durably, or change nothing.

    `coefficients` are the sources' weights, finite and > 0, by default all alike; they are divided by their
    sum. Raises UsageError for those, InputInvalid where the sources are not checkpoints of one model; with
    `ignore_config` their configs need not say so, and with `average_statistics` what batch norms estimated
    on data may differ and is averaged too. With a `card` the model card says what was averaged.
    """
    weights = _check_coefficients(sources, coefficients)
    overwrite = overwrite or overwrite_changed
    # The output is a folder where the first source is: what the others are makes no difference.
    check_before_download(sources[0], [out], overwrite=overwrite, overwrite_changed=overwrite_changed)
    with ExitStack() as opened:
        members: list[Checkpoint] = []
        for source in sources:
            # An average of what was noised is no noise on noise.
            asked = Request(source, NoiseSpec(), mmap=mmap, follow_links=follow_links, again=True)
            members.append(opened.enter_context(asked.open(outs=() if members else [out])))
            # What is open, and room for as much as the last again: the next one, or the output.
            held = [len(member.weight_files) for member in members]
            check_descriptors(sum(held) + held[-1])
        first = members[0]
        refuse_adapter(first, sources[0])
        anew = read_card(first) if card else None
        claims = [] if anew or first.single_file else claims_of(first)
        for name, member in zip(sources[1:], members[1:], strict=True):
            check_same_tensors(first, sources[0], member, name)
            if not ignore_config:
                check_same_config(first, sources[0], member, name)
        _check_has_floats(first.tensors, sources[0])
        recorded = _check_recordable(first.tensors, len(members), sources[0])
        check_names(first)
        estimates = check_same_buffers(members, sources, average_statistics=average_statistics)
        output = resolve_rewritten(out, first)
        check_output(output, *members, overwrite=overwrite)
        refuse_planned([output])
        seen = require_unchanged([output], insists=overwrite_changed, threads=threads, progress=progress)
        files = len(first.weight_files) + len(first.others) + 1
        check_space([output], copied_bytes(first) + recorded, files)
        publication = opened.enter_context(
            publication_at(
                output,
                directory=not first.single_file,
                overwrite=overwrite,
                seen=seen[output],
                progress=progress,
            )
        )
        done = _carry_out(members, weights, publication, threads or default_threads(), direct, progress)
        manifest = AverageManifest(
            members=tuple(
                (weight, record_source(member)) for weight, member in zip(weights, members, strict=True)
            ),
            tensors=tuple(one.tensor for one in done),
            copied=tuple(
                (name, publication.copy(first.root / name, name, first.open_beside))
                for name in first.others
                if anew is None or name not in anew.own
            ),
            left_out=(*first.left_out, *(anew.left_out if anew else ())),
        )
        if anew is not None:
            manifest = replace(manifest, rewritten=write_card(anew, anew.of_average(manifest), [publication]))
        first.check_beside()
        manifest_path = publication.publish(pieces(manifest))
        warnings = [warning for member in members for warning in member.warnings]
        warnings += [*claims, *estimates, *publication.warnings]
        return Averaged(output, manifest_path, manifest, publication.cleared, (*warnings, *_warnings(done)))


def _check_coefficients(sources: Sequence[str], coefficients: Sequence[float]) -> list[float]:
    if len(sources) < 2:
        raise UsageError(
            "an average of one checkpoint",
            why="it would be a copy of it",
            next_step="Name at least two checkpoints of one model",
        )
    if not coefficients:
        return [1.0] * len(sources)
    if len(coefficients) != len(sources):
        raise UsageError(
            "--coefficients",
            why=f"there are {len(coefficients)} for {len(sources)} checkpoints",
            next_step="Give one for each, in their order",
        )
    for coefficient in coefficients:
        if not (math.isfinite(coefficient) and coefficient > 0):
            raise UsageError(
                f"--coefficients: {coefficient:g}",
                why="a coefficient is a finite number greater than 0",
                next_step="Leave out the checkpoints that shall not count",
            )
    if not math.isfinite(sum(coefficients)):
        raise UsageError(
            "--coefficients",
            why="they add up to more than float64 holds",
            next_step="Divide all by the largest: only their ratios count",
        )
    return list(coefficients)


def _check_has_floats(tensors: Sequence[TensorSpec], path: str) -> None:
    if not any(tensor.dtype in FLOAT_DTYPES and tensor.elements for tensor in tensors):
        raise InputInvalid(
            "nothing to average",
            path=path,
            why="it holds no floating-point values",
            next_step="Check that these are the weights",
        )


def _check_recordable(tensors: Sequence[TensorSpec], members: int, path: str) -> int:
    """Return the bytes of the manifest (an estimate); InputInvalid if it could be too large to be read."""
    nbytes = manifest_bytes(tensors, members)
    if nbytes > MAX_BYTES:
        raise InputInvalid(
            "too many tensors and members for one manifest",
            path=path,
            why=f"{len(tensors):,} tensors of {members:,} checkpoints can take {nbytes:,} bytes of it; "
            f"the limit is {MAX_BYTES:,}",
            next_step="Average fewer checkpoints, or their weight files one by one",
        )
    return nbytes


def _carry_out(
    members: Sequence[Checkpoint],
    weights: Sequence[float],
    publication: Publication,
    threads: int,
    direct: bool | None,
    progress: Progress,
) -> list[mean.Done]:
    """Fill every weight file and flush it; the sources must be as they were throughout."""
    first = members[0]
    room = room_for(direct, sum(file.size for file in first.sources), 1, threads)
    with ExitStack() as opened:
        opened.enter_context(room or nullcontext())
        sinks = {}
        mode = common_mode(file.mode for member in members for file in member.sources)
        for file in first.sources:
            name = publication.output.name if first.single_file else file.name
            sinks[file.name] = file.create_sink(publication.path(name), mode, room)
            opened.callback(sinks[file.name].abort)
        weighted = [
            mean.AverageMember(
                weight,
                {file.name: file for file in member.sources},
                {tensor.name: tensor for tensor in member.tensors},
            )
            for weight, member in zip(weights, members, strict=True)
        ]
        with progress(sum(tensor.nbytes for tensor in first.tensors) * len(members)) as report:
            done = mean.average(
                first.tensors, weighted, sinks, open_device("cpu"), threads=threads, progress=report
            )
        complete([file for member in members for file in member.sources], sinks.values())
    return done


def _warnings(done: Sequence[mean.Done]) -> list[str]:
    """Say which tensors hold what is no number, and which could not be averaged though they differ."""
    broken = [one.tensor.tensor.name for one in done if one.strange]
    apart = [one.tensor.tensor.name for one in done if one.tensor.action == "copy" and one.differs]
    warnings = []
    if broken:
        warnings.append(f"{enumerate_some(broken, 3)}: NaN or infinite values came of the average")
    if apart:
        warnings.append(
            f"{enumerate_some(apart, 3)}: no floats, and not the same everywhere: the first checkpoint's "
            "are kept"
        )
    return warnings
