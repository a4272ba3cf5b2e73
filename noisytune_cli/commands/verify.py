"""verify: is an output what its manifest says, and is that what the base and the noise give?

Alone, the manifest accounts for every byte: sizes, header digests, the digest of each tensor and of each
copied file. With the base every tensor is made again from it, from the recorded std, and compared. Digests
are of 256 bits, so equal digests are equal bytes, and each file is read once.

Exit codes: no manifest is a missing input (4) and a bad one a malformed input (3), for then there is nothing
to answer from; whatever is not as a valid manifest says, a missing or damaged file too, is the answer "does
not match" (8).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from noisytune_cli.checkpoint.address import Place, is_address
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.composition import Component, in_component
from noisytune_cli.checkpoint.folder import list_folder
from noisytune_cli.checkpoint.formats import Nowhere, Source, check_read, open_source
from noisytune_cli.checkpoint.index import read_index
from noisytune_cli.checkpoint.layout import index_suffix, is_weights
from noisytune_cli.commands.base import compare_files, match_files, open_base, prefixes_of
from noisytune_cli.commands.card import compare_card
from noisytune_cli.commands.differences import Difference, as_written, compare_receipts, recorded_steps
from noisytune_cli.commands.result import Result
from noisytune_cli.engine.threads import Progress, default_threads
from noisytune_cli.engine.walk import Output, Walk
from noisytune_cli.errors import InputInvalid, InputUnreadable, UsageError
from noisytune_cli.escape import escape
from noisytune_cli.manifest.average import RecordedAverage, read_any_manifest
from noisytune_cli.manifest.locate import Location, place_of, require_manifest
from noisytune_cli.manifest.read import REFORMATTED, RecordedManifest
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX
from noisytune_cli.noise.devices import open_device
from noisytune_cli.output.publish import copy_file
from noisytune_cli.records import Manifest, NoiseSpec, Plan, Receipt, with_output_files


@dataclass(frozen=True)
class Checked:
    """What was held against the manifest; `base` says whether the base was too."""

    tensors: int
    files: int
    bytes: int
    base: bool


@dataclass(frozen=True, repr=False)
class Verified(Result):
    """The answer: everything that does not match, and what was looked at."""

    output: Place
    checked: Checked
    mismatches: tuple[Difference, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all is as the manifest says."""
        return not self.mismatches

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as `noisytune verify --json` prints it, and the warnings."""
        return {"ok": self.ok, **super().to_dict()}

    def _rows(self) -> Sequence[Any]:
        return self.mismatches

    def _told(self) -> str:
        found = "all as the manifest says" if self.ok else f"{len(self.mismatches)} mismatches"
        return f"{self.output}, {self.checked.tensors} tensors: {found}"


def verify(
    out: str,
    *,
    base: str | None = None,
    threads: int | None = None,
    mmap: bool = False,
    follow_links: bool = False,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Verified:
    """Hold an output against its manifest and, where given, against the base.

    `out` is the path of the output, a folder or a file, or of its manifest; or the address of one of them in
    an object store, from where the output is fetched.
    """
    with _located(out) as located:
        return _verify(located, base, threads, mmap, follow_links, progress)


def compare_base(
    manifest: Manifest,
    base: Checkpoint,
    *,
    threads: int | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> list[Difference]:
    """Say where an open checkpoint does not give what a manifest records; no output needs to be there."""
    original, found = _match_base(manifest, base)
    with progress(original.nbytes) as report:
        walk = Walk(open_device("cpu"), threads or default_threads(), progress=report)
        return found + original.remake(walk)


@dataclass(frozen=True)
class _Original:
    """The weight files of a base, the steps that a manifest records of them, and what came of these."""

    files: Mapping[str, Source]
    plan: Plan
    receipts: Mapping[str, Receipt]

    @property
    def nbytes(self) -> int:
        return sum(step.tensor.nbytes for step in self.plan.steps)

    def remake(self, walk: Walk) -> list[Difference]:
        """Do the steps again, and say what did not come out as recorded."""
        found = compare_receipts(self.receipts, _redo(walk, self.plan, self.files, recorded=self.receipts))
        check_read(self.files.values())
        return found


def _match_base(manifest: Manifest, base: Checkpoint) -> tuple[_Original, list[Difference]]:
    """Return a base as a manifest needs it, and what its headers and its card have against that."""
    files, found = match_files(manifest, base, "the base: ")
    receipts = {receipt.step.tensor.name: receipt for receipt in manifest.receipts}
    plan = Plan(manifest.noise, recorded_steps(manifest.receipts, files))
    return _Original(files, plan, receipts), [*found, *compare_card(manifest, base)]


@dataclass(frozen=True)
class _Located:
    """An output and its manifest, found: where errors and answers say it is, and the names of its files."""

    shown: Place
    place: Location
    recorded: RecordedManifest
    names: Sequence[str]


@contextmanager
def _located(out: str) -> Iterator[_Located]:
    if not is_address(out):
        place = place_of(out)
        recorded = _read_manifest(place)
        yield _Located(
            place.output, place, recorded, list_folder(place.output).files if place.is_folder else ()
        )
        return
    from noisytune_cli.checkpoint.bucket import Bucket  # what is here should not wait for it

    output = out[: -len(MANIFEST)] if out.endswith(f"/{MANIFEST}") else out.removesuffix(MANIFEST_SUFFIX)
    with closing(Bucket(output)) as bucket, bucket.named():
        names, file = bucket.listing.files, bucket.file
        manifest = MANIFEST if file is None else file + MANIFEST_SUFFIX
        bucket.fetch([name for name in (manifest, file) if name in names])
        place = Location(bucket.root / (file or ""), file is None, bucket.root / manifest)
        recorded = _read_manifest(place)
        if file is None:
            known = _known(recorded.manifest)
            bucket.fetch([name for name in names if name in known])
        yield _Located(bucket.address, place, recorded, names if file is None else ())


def _verify(
    located: _Located,
    base: str | None,
    threads: int | None,
    mmap: bool,
    follow_links: bool,
    progress: Progress,
) -> Verified:
    place, recorded = located.place, located.recorded
    if base is not None and isinstance(recorded, RecordedAverage):
        raise UsageError(
            "--base",
            why="an average is of several checkpoints",
            next_step="Average them again, and compare the two manifests",
        )
    manifest = recorded.manifest
    receipts = {receipt.step.tensor.name: receipt for receipt in manifest.receipts}
    walk = Walk(open_device("cpu"), threads or default_threads())
    found = [] if recorded.is_original else [Difference(recorded.path.name, None, REFORMATTED)]
    with ExitStack() as opened:
        files, broken = _open_files(with_output_files(manifest), place, mmap, opened)
        produced, contradictions = as_written(manifest, files)
        matched, headers = compare_files(produced, files)
        found += [*broken, *contradictions, *(d for d in headers if d.file in files)]
        found += _compare_streams(receipts, files, _aliases(files, place, manifest))
        plan = _plan_digests(produced, matched)
        original = None
        if base is not None:
            source = opened.enter_context(open_base(recorded, base, mmap=mmap, follow_links=follow_links))
            original, differing = _match_base(manifest, source)
            found += differing
        nbytes = sum(step.tensor.nbytes for step in plan.steps)
        with progress(nbytes + (original.nbytes if original else 0)) as report:
            walk = replace(walk, progress=report)
            found += _compare_digests(receipts, _redo(walk, plan, matched))
            if original is not None:
                found += original.remake(walk)
        for file in matched.values():
            file.check_unchanged()
        found += [difference for name, file in matched.items() for difference in _compare_sums(name, file)]
    others = manifest.others
    found += [d for name, digest in others.items() for d in compare_copy(place.path(name), name, digest)]
    checked = Checked(
        tensors=len(manifest.receipts),
        files=len(produced.source.files) + len(others),
        bytes=sum(file.size for file in produced.source.files),
        base=base is not None,
    )
    return Verified(located.shown, checked, tuple(found), tuple(_strays(located)))


def _read_manifest(place: Location) -> RecordedManifest:
    """Read the manifest of the output at `place`; InputUnreadable where there is none."""
    recorded = read_any_manifest(require_manifest(place.manifest))
    recorded.require_files()
    if not place.is_folder and (len(recorded.manifest.source.files) > 1 or recorded.manifest.others):
        raise InputInvalid(
            "cannot verify the file alone",
            path=place.output,
            why="its manifest is that of a folder",
            next_step=f"Put the manifest into the folder as {MANIFEST}, and name the folder",
        )
    return recorded


def _strays(located: _Located) -> list[str]:
    """Return a warning for each file that might be taken for weights, but is not recorded."""
    known = _known(located.recorded.manifest)
    return [
        f"{escape(name)} is not in the manifest, and was not verified"
        for name in located.names
        if name not in known and is_weights(name)
    ]


def _known(manifest: Manifest) -> set[str]:
    """Return the names of all files that a manifest records of an output."""
    return {*(file.name for file in manifest.output_files), *manifest.others}


def _open_files(
    manifest: Manifest, place: Location, mmap: bool, opened: ExitStack
) -> tuple[dict[str, Source], list[Difference]]:
    """Open the weight files that are there and whole, and say what is wrong with the others."""
    files: dict[str, Source] = {}
    found = []
    folders = prefixes_of(manifest)
    for record in manifest.source.files:
        folder = folders[record.name]
        try:
            file: Source = open_source(place.path(record.name), record.name, mmap)
            files[record.name] = Component(file, folder) if folder else file
        except (InputInvalid, InputUnreadable) as error:
            found.append(Difference(record.name, error.tensor, _why_not_opened(error)))
        else:
            opened.callback(files[record.name].close)
    return files, found


def _why_not_opened(error: InputInvalid | InputUnreadable) -> str:
    """Say how a file does not match; raises the error again where that cannot be told."""
    if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
        return "it is absent"
    if isinstance(error, InputUnreadable):
        raise error
    return error.why


def _plan_digests(manifest: Manifest, files: Mapping[str, Source]) -> Plan:
    """Plan to read every recorded tensor of an output as it is."""
    steps = recorded_steps(manifest.receipts, files)
    return Plan(NoiseSpec(), tuple(replace(step, action="copy", reason="excluded") for step in steps))


def _redo(
    walk: Walk, plan: Plan, files: Mapping[str, Source], recorded: Mapping[str, Receipt] | None = None
) -> tuple[Receipt, ...]:
    """Carry out a plan on `files` (by recorded name) for its receipts alone."""
    sources = {file.name: file for file in files.values()}
    variant = Output(plan, dict.fromkeys(sources, Nowhere()), recorded=recorded or {})
    (receipts,) = walk.carry_out([variant], sources)
    return receipts


def _aliases(files: Mapping[str, Source], place: Location, manifest: Manifest) -> dict[str, str]:
    """Return what index and weight files say of names, as it was when the noise was planned."""
    said: dict[str, str] = {}
    components = set(prefixes_of(manifest).values())
    for name in manifest.others:
        if index_suffix(name):
            with suppress(InputInvalid, InputUnreadable):  # which is told of the file by its digest
                found = read_index(place.output, name).metadata
                folder = posixpath.dirname(name)
                said |= in_component(folder, found) if folder in components - {""} else found
    for _, file in sorted(files.items()):
        said |= file.metadata
    return said


def _compare_streams(
    receipts: Mapping[str, Receipt], files: Mapping[str, Source], aliases: Mapping[str, str]
) -> Iterator[Difference]:
    """Find streams that are neither a recorded name nor one that was stored as the tensor."""
    for name, receipt in receipts.items():
        stream, file = receipt.step.stream, receipt.step.tensor.file
        if stream not in receipts and file in files:
            stored = receipts.get(aliases.get(stream, ""))
            if stored is None or stored.step.stream != stream:
                yield Difference(file, name, "its stream is no name of it")


def _compare_digests(recorded: Mapping[str, Receipt], read: Iterable[Receipt]) -> list[Difference]:
    return [
        Difference(receipt.step.tensor.file, receipt.step.tensor.name, "its bytes are not those recorded")
        for receipt in read
        if receipt.digest != recorded[receipt.step.tensor.name].digest
    ]


def _compare_sums(name: str, file: Source) -> list[Difference]:
    """Hold a weight file against its own checksums, which its header's digest leaves out."""
    try:
        file.check_sums()
    except InputInvalid as error:
        return [Difference(name, None, error.why)]
    return []


def compare_copy(path: Path, name: str, digest: str) -> list[Difference]:
    """Compare a copied file with its digest."""
    try:
        found = copy_file(path, name, [])
    except (InputInvalid, InputUnreadable) as error:
        return [Difference(name, None, _why_not_opened(error))]
    return [] if found == digest else [Difference(name, None, "its bytes are not those recorded")]
