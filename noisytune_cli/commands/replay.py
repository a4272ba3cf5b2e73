"""replay: the noisy checkpoint, rebuilt exactly from its manifest and the base.

Nothing is measured and nothing decided: every tensor gets the amplitude and the stream that the manifest
records, and the manifest given is the manifest written, byte for byte. A base whose headers differ is refused
before a weight is read; one whose bytes differ, or an output that did, before anything is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from noisytune_cli.checkpoint.address import Place
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.commands.base import match_files, name_base, not_the_base, open_base
from noisytune_cli.commands.card import OTHER_CARD, read_card, write_card
from noisytune_cli.commands.differences import Difference, compare_receipts, recorded_steps
from noisytune_cli.commands.replaced import check_before_download, refuse_planned, require_unchanged
from noisytune_cli.commands.result import Result
from noisytune_cli.commands.write import complete, fill
from noisytune_cli.engine.threads import Progress, default_threads
from noisytune_cli.engine.walk import Walk
from noisytune_cli.manifest.locate import manifest_of
from noisytune_cli.manifest.read import RecordedManifest, read_manifest
from noisytune_cli.manifest.write import CARD, to_json
from noisytune_cli.noise.devices import open_device
from noisytune_cli.output.commits import publication_at
from noisytune_cli.output.convert import OutputFile, lay_out
from noisytune_cli.output.destination import check_output, resolve_rewritten
from noisytune_cli.output.publish import Publication
from noisytune_cli.output.sidecars import companions
from noisytune_cli.output.space import check_descriptors, check_space, needed_bytes
from noisytune_cli.records import Manifest, OutputRecord, Plan


@dataclass(frozen=True, repr=False)
class Replayed(Result):
    """What was published: where it is, the manifest, and the left-overs of killed runs that were removed."""

    output: Place
    manifest_path: Place
    manifest: Manifest
    cleared: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def _rows(self) -> Sequence[Any]:
        rows: Sequence[Any] = to_json(self.manifest)["tensors"]
        return rows

    def _told(self) -> str:
        return f"{len(self.manifest.receipts)} tensors -> {self.output}"


def replay(
    manifest_path: str,
    out: str,
    *,
    base: str | None = None,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    direct: bool | None = None,
    mmap: bool = False,
    follow_links: bool = False,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Replayed:
    """Write to `out` what the manifest records, durably, or change nothing.

    `manifest_path` may also be that of an output, which has its manifest in it or beside it. `base` is the
    checkpoint it was made from; None stands for the hub id and commit that it records.
    """
    recorded = read_manifest(manifest_of(manifest_path))
    recorded.require_files()
    recorded.require_original()
    manifest = recorded.manifest
    receipts = {receipt.step.tensor.name: receipt for receipt in manifest.receipts}
    overwrite = overwrite or overwrite_changed
    base = name_base(recorded, base)
    check_before_download(base, [out], overwrite=overwrite, overwrite_changed=overwrite_changed)
    with open_base(recorded, base, mmap=mmap, follow_links=follow_links, outs=[out]) as source:
        files, found = match_files(manifest, source)
        _refuse([*found, *_missing_copies(manifest, source)], recorded, source)
        walk = Walk(open_device(device), threads or default_threads(), direct=direct)
        plan = Plan(manifest.noise, recorded_steps(manifest.receipts, files))
        rewritten = () if manifest.output is None else _rewrite(manifest.output, plan, source, recorded)
        output = resolve_rewritten(out, source, rewritten)
        check_output(output, source, overwrite=overwrite, manifest=recorded.path)
        refuse_planned([output])
        seen = require_unchanged([output], insists=overwrite_changed, threads=threads, progress=progress)
        written = len(rewritten) or len(source.weight_files)
        check_space([output], needed_bytes(source, plan, rewritten), written + len(source.others) + 1)
        check_descriptors(len(source.weight_files) + written + 1)
        with publication_at(
            output,
            directory=not source.single_file,
            overwrite=overwrite,
            seen=seen[output],
            progress=progress,
        ) as publication:
            digests = {
                name: publication.copy(source.root / name, name, source.open_beside)
                for name, _ in manifest.copied
            }
            changed = [name for name, digest in manifest.copied if digests[name] != digest]
            found = [Difference(name, None, "its bytes are not those recorded") for name in changed]
            if manifest.rewritten:
                card = read_card(source)
                if write_card(card, card.of_noise(manifest), [publication]) != manifest.rewritten:
                    found.append(Difference(CARD, None, OTHER_CARD))
            if manifest.output is not None:
                found += _write_anew(manifest.output, source, rewritten, publication)
            _refuse(found, recorded, source)
            places = [publication.place]
            sources = source.sources
            with ExitStack() as filling:
                (done,), sinks = fill(filling, walk, [plan], sources, places, progress, rewritten, receipts)
                complete(sources, sinks)
            _refuse(compare_receipts(receipts, done), recorded, source)
            path = publication.publish(recorded.pieces())
            return Replayed(output, path, manifest, publication.cleared, publication.warnings)


def _missing_copies(manifest: Manifest, source: Checkpoint) -> list[Difference]:
    """Say which of the recorded other files the base does not have."""
    there = set(source.others)
    names = [*(name for name, _ in manifest.copied), *(name for _, name, _ in manifest.followed)]
    # A card of its own an output may have without the base's, but not beside a single file.
    names += [old or name for name, old, _ in manifest.rewritten if old or source.single_file]
    return [Difference(name, None, "it is absent") for name in names if name not in there]


def _rewrite(
    output: OutputRecord, plan: Plan, source: Checkpoint, recorded: RecordedManifest
) -> tuple[OutputFile, ...]:
    """Return the output's weight files, which must be those that the manifest records."""
    files = lay_out(source.sources, plan, output.conversion)
    found = []
    for file, record in zip(files, output.files, strict=True):
        made = file.record if not source.single_file else replace(file.record, name=record.name)
        if made != record:
            found.append(Difference(record.name, None, "the base gives another header than recorded"))
    _refuse(found, recorded, source)
    return files


def _write_anew(
    output: OutputRecord, source: Checkpoint, files: tuple[OutputFile, ...], publication: Publication
) -> list[Difference]:
    """Write the small files that follow the weights, and say which are not as recorded."""
    made = tuple(
        (one.name, one.source, publication.write(one.name, one.content))
        for one in companions(source, files, output.conversion)
    )
    differing = set(made) ^ set(output.rewritten)
    return [
        Difference(name, None, "the base gives other bytes than recorded")
        for name in sorted({name for name, _, _ in differing})
    ]


def _refuse(found: list[Difference], recorded: RecordedManifest, source: Checkpoint) -> None:
    """Raise Mismatch if anything was found."""
    if found:
        raise not_the_base(found, recorded, source.path)
