"""From a checkpoint and plans to whole weight files: every output's, in its staging directory.

Publishing is not decided here: what is filled is flushed, and is as the source was from beginning to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.formats import Nowhere, Sink, Source, check_read
from noisytune_cli.checkpoint.formats._direct import room_for
from noisytune_cli.engine.threads import Progress
from noisytune_cli.engine.walk import Output, Walk, work_bytes
from noisytune_cli.output.convert import OutputFile
from noisytune_cli.records import FileRecord, Plan, Receipt, SourceRecord

#: Says where the weight file of a name is to be made.
Where = Callable[[str], Path]


def fill(
    opened: ExitStack,
    walk: Walk,
    plans: Sequence[Plan],
    sources: Sequence[Source],
    places: Sequence[Where],
    progress: Progress,
    files: Sequence[OutputFile] = (),
    recorded: Mapping[str, Receipt] | None = None,
    stds: Sequence[float] = (),
) -> tuple[tuple[tuple[Receipt, ...], ...], list[Sink]]:
    """Fill every weight file of every plan's output; return the receipts, and what `complete` is to flush.

    `places` say where each output's files are made; without any the plans are carried out for their receipts
    alone. `files` are those of each output where they are not like the source's; `recorded` are earlier
    receipts by tensor name, whose std and amplitude hold; `stds` are those of each output in scope global,
    where they are known. What is not complete when `opened` is closed is given up.
    """
    models: Sequence[Source | OutputFile] = files or sources
    targets = {name: slot for file in files for name, slot in file.slots.items()}
    nbytes = sum(model.size for model in models) * len(places)
    room = room_for(walk.direct, nbytes, len(places) or 1, walk.threads)
    opened.enter_context(room or nullcontext())
    variants = []
    for index, plan in enumerate(plans):
        sinks: dict[str, Sink] = {}
        for file, made in zip(sources, models, strict=True):
            sinks[file.name] = made.create_sink(places[index](made.name), room=room) if places else Nowhere()
            opened.callback(sinks[file.name].abort)
        std = stds[index] if stds else None
        variants.append(Output(plan, sinks, targets, recorded=recorded or {}, std=std))
    with progress(work_bytes(variants)) as report:
        by_name = {file.name: file for file in sources}
        receipts = replace(walk, progress=report).carry_out(variants, by_name)
    return receipts, [sink for variant in variants for sink in variant.sinks.values()]


def complete(sources: Iterable[Source], sinks: Iterable[Sink]) -> None:
    """Flush what was filled, unless its sources are not as they were when they were opened."""
    check_read(sources)
    for sink in sinks:
        sink.finish()


def record_source(source: Checkpoint) -> SourceRecord:
    """Return where weights come from, as a manifest records it."""
    files = tuple(FileRecord(file.name, file.size, file.header_digest) for file in source.sources)
    return SourceRecord(source.id, source.revision, files)
