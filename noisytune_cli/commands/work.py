"""work: shares of a job, each read once and written for every output, with a receipt for each.

What is there already is not done again; what two processes do at once comes out the same. A share opens its
own weight files and reads its own steps, and nothing of the others; with scope global it needs their sums, so
all of these come first.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from noisytune_cli.checkpoint.address import is_address
from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_files
from noisytune_cli.checkpoint.formats import Nowhere, Source, check_read
from noisytune_cli.checkpoint.remote import Remote
from noisytune_cli.commands.differences import same_kind
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.write import Where, complete, fill
from noisytune_cli.engine.behind import some_behind
from noisytune_cli.engine.matrix import warnings_of
from noisytune_cli.engine.threads import Progress, default_threads
from noisytune_cli.engine.walk import Output, Walk
from noisytune_cli.errors import Mismatch, NoisytuneError, OutputUnsafe, unreadable
from noisytune_cli.manifest.job import Job, Share, Stamp
from noisytune_cli.manifest.share import ShareSums, read_steps, read_sums, sums_bytes
from noisytune_cli.manifest.write import pieces
from noisytune_cli.noise.devices import open_device
from noisytune_cli.noise.std import exact_std, new_exact_sums
from noisytune_cli.output.convert import OutputFile, lay_out
from noisytune_cli.output.job_folder import JobFolder, open_job
from noisytune_cli.output.jobs import no_job
from noisytune_cli.records import FileRecord, Manifest, NoiseSpec, OutputRecord, Plan, Step


@dataclass(frozen=True)
class Worked:
    """What became of the shares that were asked for: how many there were, and how many were done just now.

    With scope global `waits_for` are the shares, of all, whose sums are still to come before noise is added.
    """

    folder: JobFolder
    shares: int
    done: int
    waits_for: tuple[int, ...]
    warnings: tuple[str, ...]


def work(
    out: str,
    share: tuple[int, int] = (1, 1),
    *,
    device: str = "cpu",
    threads: int | None = None,
    direct: bool | None = None,
    mmap: bool = False,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Worked:
    """Do every n-th share of the job of `out`, from the k-th on, where `share` is (k, n).

    With scope global the sums of all these shares come first; their noise follows where the sums of all
    shares are there.
    """
    folder = open_job(out)
    chosen = list(range(share[0] - 1, len(folder.job.shares), share[1]))
    if share == (1, 1) and chosen:
        # Who does all of them beside others should not do the same ones at the same time.
        start = random.randrange(len(chosen))
        chosen = chosen[start:] + chosen[:start]
    walk = Walk(open_device(device), threads or default_threads(), direct=direct)
    done = set[int]()
    warnings: list[str] = []
    lacking, undone = set(folder.lacking_sums), set(folder.left)
    to_sum = [one for one in chosen if one in lacking]
    left = [one for one in chosen if one in undone]
    total = sum(folder.job.shares[one].nbytes for one in to_sum)
    total += sum(folder.job.shares[one].nbytes for one in left) * len(folder.job.outputs)
    try:
        with progress(total) as report:
            walk = replace(walk, progress=report)
            for one in to_sum:
                if not folder.has_sums(one):
                    add_up_share(folder, one, walk, mmap=mmap)
                    done.add(one)
            if waits_for := folder.lacking_sums:
                return Worked(folder, len(chosen), len(done), tuple(waits_for), ())

            def begun() -> Iterator[Callable[[], tuple[str, ...]]]:
                for one in left:
                    if not folder.is_done(one):
                        yield begin_share(folder, one, walk, mmap=mmap)
                        done.add(one)

            for told in some_behind(begun()):
                warnings += told
    except NoisytuneError as error:
        if folder.is_there or isinstance(error, OutputUnsafe):
            raise
        raise no_job(folder.path) from error  # others did the shares too, and finished it
    return Worked(folder, len(chosen), len(done), (), tuple(dict.fromkeys(warnings)))


def add_up_share(folder: JobFolder, number: int, walk: Walk, *, mmap: bool = False) -> None:
    """Leave what a share's values add to the std of all."""
    job, share = folder.job, folder.job.shares[number]
    with _opened(job, share, mmap) as sources:
        with folder.storage.reading(folder.steps(number)) as path:
            steps = read_steps(path, job, share)
        noises = {output.noise.lam: output.noise for output in job.outputs}
        plans = plans_of(list(noises.values()), steps.steps, sources)
        sinks = {file.name: Nowhere() for file in sources}
        outputs = [Output(plan, sinks) for plan in plans]
        totals = walk.add_up(outputs, {file.name: file for file in sources}, steps.repeated)
        check_read(sources)
    folder.storage.put([sums_bytes([ShareSums(*total) for total in totals])], folder.sums(number))


def begin_share(
    folder: JobFolder, number: int, walk: Walk, *, mmap: bool = False
) -> Callable[[], tuple[str, ...]]:
    """Fill a share's weight files of every output; return what leaves them in the job, and its receipts.

    That mostly waits for the device or the store, so it may be called while the next share is begun. It
    returns what the user should know.
    """
    job, share = folder.job, folder.job.shares[number]
    noises = [output.noise for output in job.outputs]
    with folder.storage.reading(folder.steps(number)) as path:
        by_strength = dict(zip(job.strengths, read_steps(path, job, share).steps, strict=True))
    stds: Mapping[float, float] = _stds(folder) if job.has_sums else {}
    with ExitStack() as opened:
        sources = opened.enter_context(_opened(job, share, mmap))
        plans = plans_of(noises, [by_strength[noise.lam] for noise in noises], sources)
        files = () if job.conversion is None else lay_out(sources, plans[0], job.conversion)
        places: list[Where] = []
        if not job.recipe_only:
            scratch = opened.enter_context(folder.storage.growing(folder.own, number))
            places = [_place(scratch, f"{output + 1}-", sources, files) for output in range(len(plans))]
        receipts, sinks = fill(
            opened,
            walk,
            plans,
            sources,
            places,
            lambda nbytes: nullcontext(walk.progress),
            files,
            stds=[stds[noise.lam] for noise in noises] if stds else (),
        )
        filled = opened.pop_all()

    def leave() -> tuple[str, ...]:
        with filled:
            complete(sources, sinks)
            for output, place in enumerate(places):
                for name in [file.name for file in files] or share.files:
                    folder.keep(place(name), output, name)
        records = tuple(FileRecord(file.name, file.size, file.header_digest) for file in sources)
        for output, (noise, done) in enumerate(zip(noises, receipts, strict=True)):
            manifest = Manifest(
                tool_name="noisytune",
                tool_version=job.version,
                source=replace(job.source, files=records),
                noise=noise,
                receipts=done,
                output=_converted(job, files),
            )
            folder.storage.put(pieces(manifest), folder.receipt(number, output))
        return tuple(warning for done in receipts for warning in warnings_of(done))

    if folder.storage.beside:
        return leave
    told = leave()
    return lambda: told


def _place(scratch: Path, prefix: str, sources: Sequence[Source], files: Sequence[OutputFile]) -> Where:
    """Say where an output's weight files grow, without the folders that are part of their names."""
    names = [file.name for file in files] or [source.name for source in sources]
    numbers = {name: number for number, name in enumerate(names)}
    return lambda name: scratch / f"{prefix}{numbers[name]}"


def _converted(job: Job, files: Sequence[OutputFile]) -> OutputRecord | None:
    if job.conversion is None:
        return None
    return OutputRecord(job.conversion, tuple(file.record for file in files))


@functools.lru_cache(maxsize=1)  # every share needs them, and they are in as many files as there are shares
def _stds(folder: JobFolder) -> Mapping[float, float]:
    """Return for each strength the std of all values, from the sums of all shares, which stay as they are."""
    job = folder.job
    # Integers of Python: those of many shares, or what a stranger's say, may not fit into 64 bits.
    totals = {strength: (0, new_exact_sums().astype(object)) for strength in job.strengths}
    for number in range(len(job.shares)):
        with folder.storage.reading(folder.sums(number)) as path:
            of_share = read_sums(path, job)
        for strength, sums in zip(job.strengths, of_share, strict=True):
            count, exact = totals[strength]
            totals[strength] = count + sums.elements, exact + sums.exact
    return {
        strength: exact_std(exact, count) if count > 1 else 0.0 for strength, (count, exact) in totals.items()
    }


@contextmanager
def _opened(job: Job, share: Share, mmap: bool) -> Iterator[tuple[Source, ...]]:
    """Open the weight files of a share, which must be as they were when the job was planned."""
    asked = request_of(job, mmap=mmap)
    with ExitStack() as opened:
        if job.conversion is not None and job.conversion.dequantized is not None:
            # A weight's scale may lie in another file, so all are opened; a store's are read by range.
            whole = opened.enter_context(asked.open(few_values=is_address(job.asked)))
            check_stamps(job, whole.root, share.files, whole.remote)
            sources = tuple(source for source in whole.sources if source.name in share.files)
        else:
            found = asked.find()
            if found.remote is not None:
                opened.callback(found.close)
                opened.enter_context(found.remote.named())
            check_stamps(job, found.root, share.files, found.remote)
            sources = open_files(found, share.files, mmap=mmap)
            for source in sources:
                opened.callback(source.close)
        check_planned(job, sources, share.files)
        yield sources


def request_of(job: Job, *, mmap: bool = False) -> Request:
    """Return what the job's source is opened with as a whole; what was asked when it was planned, is not."""
    return Request(
        source=job.asked,
        noise=job.outputs[0].noise,
        conversion=job.conversion,
        weights=job.weights,
        components=job.components,
        revision=job.commit,
        mmap=mmap,
        again=True,
        follow_links=job.follow_links,
        card=job.card,
    )


def stamp_of(source: Checkpoint, name: str, path: Path) -> Stamp:
    """Return what tells a file of an open checkpoint from another of its size."""
    return os.stat(path).st_mtime_ns if source.remote is None else source.remote.etag(name)


def check_stamps(job: Job, root: Path, names: Collection[str], remote: Remote | None) -> None:
    """Raise Mismatch if a weight file is not, as far as can be told unread, what it was when planned."""
    if job.commit is not None:
        return
    for file, stamp in zip(job.source.files, job.stamps, strict=True):
        if file.name not in names:
            continue
        path = root / file.name
        try:
            if remote is None:
                status = os.stat(path)
                found: tuple[int, Stamp] = status.st_size, status.st_mtime_ns
            else:
                found = remote.size(file.name), remote.etag(file.name)
        except OSError as error:
            raise unreadable(error, path) from error
        except KeyError:
            raise changed_since(path, "it is no longer there") from None
        if found != (file.size, stamp):
            raise changed_since(path, ANOTHER)


def check_planned(job: Job, sources: Sequence[Source], names: Collection[str]) -> None:
    """Raise Mismatch if weight files are not, as far as headers tell, those that the job was planned for."""
    planned = {file.name: file for file in job.source.files if file.name in names}
    for source in sources:
        expected = planned.pop(source.name, None)
        if expected is None or (source.size, source.header_digest) != (expected.size, expected.header_digest):
            raise changed_since(source.path, "its size or its header is another")
    for name in planned:
        raise changed_since(Path(job.asked) / name, "it is no longer one of the weights")


#: How a file shows that it changed.
ANOTHER = "its size, or its time or ETag, is another"


def changed_since(path: Path, why: str) -> Mismatch:
    """Return the error for a source that is not as it was when the job was planned."""
    return Mismatch(
        "the source changed since the job was planned",
        path=path,
        why=why,
        next_step="Put it back as it was, or remove the job's folder (noisytune status names it) and plan "
        "again",
    )


def plans_of(
    noises: Sequence[NoiseSpec], steps: Sequence[Sequence[Step]], sources: Sequence[Source]
) -> list[Plan]:
    """Return the plans of a share, whose tensors lie where the files' headers say."""
    found = {tensor.name: tensor for source in sources for tensor in source.tensors}
    planned = [step.tensor for step in steps[0]]
    if list(found) != [tensor.name for tensor in planned] or not all(
        same_kind(tensor, found[tensor.name]) for tensor in planned
    ):
        raise changed_since(sources[0].path, "its tensors are others")
    return [
        Plan(noise, tuple(replace(step, tensor=found[step.tensor.name]) for step in of_one))
        for noise, of_one in zip(noises, steps, strict=True)
    ]
