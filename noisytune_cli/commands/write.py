"""From a checkpoint and plans to whole weight files: every output's, in its staging directory.

Publishing is not decided here: what is filled is flushed, and is as the source was from beginning to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.formats import Nowhere, Sink, Source
from noisytune_cli.engine.threads import Progress
from noisytune_cli.engine.walk import Output, Walk, work_bytes
from noisytune_cli.output.convert import OutputFile
from noisytune_cli.output.publish import Publication
from noisytune_cli.records import FileRecord, Plan, Receipt, SourceRecord


def write_tensors(
    walk: Walk,
    plans: Sequence[Plan],
    source: Checkpoint,
    publications: Sequence[Publication],
    progress: Progress,
    files: Sequence[OutputFile] = (),
    recorded: Mapping[str, Receipt] | None = None,
) -> tuple[tuple[Receipt, ...], ...]:
    """Fill every weight file of every plan's output and flush it; the source must be as it was throughout.

    Without publications the plans are carried out for their receipts alone. `files` are those of each output
    where they are not like the source's; `recorded` are earlier receipts by tensor name, whose std and
    amplitude hold.
    """
    models: Sequence[Source | OutputFile] = files or source.sources
    targets = {name: slot for file in files for name, slot in file.slots.items()}
    places: Sequence[Publication | None] = publications or [None] * len(plans)
    with ExitStack() as opened:
        variants = []
        for plan, publication in zip(plans, places, strict=True):
            sinks: dict[str, Sink] = {}
            for file, made in zip(source.sources, models, strict=True):
                sinks[file.name] = Nowhere()
                if publication is not None:
                    name = publication.output.name if source.single_file else made.name
                    sinks[file.name] = made.create_sink(publication.path(name))
                opened.callback(sinks[file.name].abort)
            variants.append(Output(plan, sinks, targets, recorded=recorded or {}))
        with progress(work_bytes(variants)) as report:
            sources = {file.name: file for file in source.sources}
            receipts = replace(walk, progress=report).carry_out(variants, sources)
        complete(source.sources, [sink for variant in variants for sink in variant.sinks.values()])
    return receipts


def complete(sources: Iterable[Source], sinks: Iterable[Sink]) -> None:
    """Flush what was filled, unless its sources are not as they were when they were opened."""
    for source in sources:
        source.check_unchanged()
        source.check_sums()
    for sink in sinks:
        sink.finish()


def record_source(source: Checkpoint) -> SourceRecord:
    """Return where weights come from, as a manifest records it."""
    files = tuple(FileRecord(file.name, file.size, file.header_digest) for file in source.sources)
    return SourceRecord(source.id, source.revision, files)
