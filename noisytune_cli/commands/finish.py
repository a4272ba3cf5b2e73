"""finish: the shares of a job put together, and what lies beside them, published as `perturb` would have.

Receipts are read as a stranger's: each must be the manifest of just that share, of just that plan. The
weights themselves are not read again; `verify` does that. Whatever fails or is killed leaves the job, and the
same command goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from noisytune_cli.checkpoint.address import Address, Place
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.commands.differences import same_kind
from noisytune_cli.commands.perturb import Perturbed, Prepared, lay_out_all, publish_receipts, read_claims
from noisytune_cli.commands.replaced import require_unchanged
from noisytune_cli.commands.work import (
    ANOTHER,
    changed_since,
    check_planned,
    check_stamps,
    plans_of,
    request_of,
    stamp_of,
)
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import InputInvalid, InputUnreadable, NoisytuneError, OutputUnsafe
from noisytune_cli.escape import escape, list_some
from noisytune_cli.manifest.job import Job
from noisytune_cli.manifest.read import RecordedManifest, read_manifest
from noisytune_cli.manifest.share import read_steps
from noisytune_cli.manifest.write import MANIFEST, MANIFEST_SUFFIX
from noisytune_cli.output.commits import all_staged, publication_at
from noisytune_cli.output.destination import check_distinct, check_output, check_recipe, resolve_folder
from noisytune_cli.output.job_folder import (
    JobFolder,
    is_planned,
    job_path,
    open_finished,
    open_job,
    storage_at,
)
from noisytune_cli.output.jobs import JobStorage, no_job
from noisytune_cli.output.overwrite import Seen
from noisytune_cli.output.space import check_descriptors
from noisytune_cli.plan.evidence.told import Told
from noisytune_cli.reading import is_there
from noisytune_cli.records import Manifest, Plan, Receipt, Step

#: Missing shares that an error names.
_MOST_NAMED = 20


def finish(
    out: str,
    *,
    threads: int | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> tuple[Perturbed, ...]:
    """Publish the outputs of the job of `out`, durably, and remove the job; what is published stays.

    Raises InputUnreadable that names the shares which are missing, InputInvalid for a receipt that is no
    receipt of this job, Mismatch where the source changed since it was planned.
    """
    if not is_planned(out):
        return _published_before(out)
    folder = open_job(out)
    try:
        return _finish(folder, threads, progress)
    except NoisytuneError as error:
        if folder.is_there:
            raise
        # Another has just finished it, or it was removed.
        return published_all(folder, error)


def _finish(folder: JobFolder, threads: int | None, progress: Progress) -> tuple[Perturbed, ...]:
    """Do what `finish` does to a job that is there."""
    job = folder.job
    if left := folder.left:
        raise missing(folder, left)
    with request_of(job).open(headers_only=True) as source:
        _check_source(job, source)
        prepared = _prepare(folder, source)
        receipts = [_receipts(folder, at, plan) for at, plan in enumerate(prepared.plans)]
        there, new = dict[int, Perturbed](), dict[int, Place]()
        for at, plan in enumerate(prepared.plans):
            output = folder.output(at)
            path = _manifest_path(output, job)
            if (manifest := _published_by(folder, path, plan, receipts[at])) is not None:
                cleared = folder.storage.clear(output, folder.claim)
                there[at] = Perturbed(output, path, manifest, cleared, (), job.recipe_only, skipped=True)
            else:
                new[at] = output
        seen = _check_places(list(new.values()), job, source, threads, progress)
        made = there
        if new:
            made |= zip(new, _publish(folder, prepared, new, seen, receipts, progress), strict=True)
    done = [made[at] for at in sorted(made)]
    if not folder.remove():
        stays = f"{escape(folder.path.name)} beside the output is left over: it could not be deleted"
        done[0] = replace(done[0], warnings=(*done[0].warnings, stays))
    return tuple(done)


def missing(folder: JobFolder, left: Sequence[int]) -> InputUnreadable:
    """Return the error that names the shares which are still to be done."""
    count = len(folder.job.shares)
    named = list_some([str(share + 1) for share in left], _MOST_NAMED)
    return InputUnreadable(
        "shares are missing",
        path=folder.path,
        why=f"{len(left):,} of {count:,} are not done: {named}",
        next_step=f"Run noisytune work OUT --share {left[0] + 1}/{count} for each, or for all without it",
    )


def _published_before(out: str) -> tuple[Perturbed, ...]:
    """Return what is at OUT where no job is: an earlier `finish` has published it, and removed the job."""
    if (finished := open_finished(out)) is not None:
        made = published_all(finished)
        finished.remove()
        return made
    place = job_path(out)
    if (found := _published(storage_at(place), resolve_folder(out))) is None:
        raise no_job(place)
    return (found,)


def published_all(folder: JobFolder, error: NoisytuneError | None = None) -> tuple[Perturbed, ...]:
    """Return all outputs of a job, which another has finished; where one is not there, it was removed."""
    job, made = folder.job, list[Perturbed]()
    for at, output in enumerate(job.outputs):
        one = _published(folder.storage, folder.output(at))
        # What the job was to replace may be there still.
        if one is None or (one.manifest.source, one.manifest.noise) != (job.source, output.noise):
            raise no_job(folder.path) from error
        made.append(one)
    return tuple(made)


def _published(storage: JobStorage, output: Place) -> Perturbed | None:
    """Return what a manifest that lies in, beside or at an output says of it; None where none does.

    Without its weights it is a recipe.
    """
    for path in (output / MANIFEST, _beside(output)):
        with storage.reading_output(path) as file:
            if file is not None:
                manifest = read_manifest(file).manifest
                weights = (
                    [output] if path == _beside(output) else [output / f.name for f in manifest.output_files]
                )
                recipe = isinstance(output, Path) and not any(map(is_there, weights))
                return Perturbed(path if recipe else output, path, manifest, (), (), recipe, skipped=True)
    with storage.reading_output(output) as file, contextlib.suppress(InputInvalid):
        if file is not None and file.is_file():
            manifest = read_manifest(file).manifest
            return Perturbed(output, output, manifest, (), (), recipe=True, skipped=True)
    return None


def _check_source(job: Job, source: Checkpoint) -> None:
    """Raise Mismatch if the source is not as it was when the job was planned, by names, sizes and times."""
    names = [file.name for file in job.source.files]
    check_stamps(job, source.root, names, source.remote)
    check_planned(job, source.sources, names)
    planned = {one.name: (one.size, one.stamp) for one in job.others}
    for name in sorted(planned.keys() ^ set(source.others)):
        raise changed_since(source.root / name, "it was not there then, or is not there now")
    for name, (size, stamp) in planned.items():
        path = source.root / name
        if (source.seen[name].st_size, stamp_of(source, name, path)) != (size, stamp):
            raise changed_since(path, ANOTHER)
    if source.left_out != job.left_out:
        raise changed_since(source.root, "what is left out of the output is other than then")


def _prepare(folder: JobFolder, source: Checkpoint) -> Prepared:
    """Return the job as `perturb` would have it before it publishes."""
    job = folder.job
    noises = [output.noise for output in job.outputs]
    steps: dict[float, list[Step]] = {strength: [] for strength in job.strengths}
    for number, share in enumerate(job.shares):
        with folder.storage.reading(folder.steps(number)) as path:
            of_share = read_steps(path, job, share).steps
        for strength, found in zip(job.strengths, of_share, strict=True):
            steps[strength] += found
    plans = tuple(plans_of(noises, [steps[noise.lam] for noise in noises], source.sources))
    plans = tuple(replace(plan, ties=job.ties) for plan in plans)
    request = request_of(job)
    card, claims = read_claims(request, source)
    files = lay_out_all(source, plans, job.conversion)
    return Prepared(request, source, plans, files, card, claims, Told({}, {}))


def _receipts(folder: JobFolder, output: int, plan: Plan) -> tuple[Receipt, ...]:
    """Return the receipts of all tensors in an output, from those of every share."""
    job = folder.job
    sizes = {file.name: file for file in job.source.files}
    receipts: list[Receipt] = []
    for number, share in enumerate(job.shares):
        with folder.storage.reading(folder.receipt(number, output)) as path:
            recorded = read_manifest(path)
            manifest = recorded.manifest
            files = tuple(sizes[name] for name in share.files)
            source = replace(job.source, files=files)
            expected = (job.version, source, job.outputs[output].noise, job.conversion)
            found = (manifest.tool_version, manifest.source, manifest.noise, manifest.conversion)
            beside = (*manifest.copied, *manifest.rewritten, *manifest.left_out)
            steps = plan.steps[len(receipts) : len(receipts) + len(manifest.receipts)]
            if found != expected or beside or not all(map(_fits, manifest.receipts, steps)):
                raise _no_receipt(recorded, "it is not of this share of this job")
            receipts += manifest.receipts
            _check_files(folder, output, recorded)
    if len(receipts) != len(plan.steps):
        raise InputInvalid(
            "cannot use the job",
            path=folder.path,
            why="the receipts of its shares are not of all tensors",
            next_step="Remove the job's folder, and plan it again",
        )
    return tuple(receipts)


def _fits(receipt: Receipt, step: Step) -> bool:
    """Tell whether a receipt is what carrying out a step can leave."""
    done = receipt.step
    if (done.tensor.name, done.stream, done.out_dtype) != (step.tensor.name, step.stream, step.out_dtype):
        return False
    if not same_kind(done.tensor, step.tensor):
        return False
    if step.reason is not None:
        told = done.told_by == step.told_by or step.reason != "buffer"
        may: set[tuple[str, str | None]] = {(step.action, step.reason)}
        if step.action == "shrink":  # which the values decide
            may |= {("copy", "non-finite"), ("shrink", "one-element")}
        return (receipt.action, receipt.reason) in may and told
    if receipt.action == "perturb":
        return done.parts == step.parts and receipt.lam == step.lam
    return receipt.reason in ("constant", "non-finite", "unrepresentable", "one-element")


def _check_files(folder: JobFolder, output: int, recorded: RecordedManifest) -> None:
    """Raise InputInvalid unless the weight files that a receipt is of are there, and of its sizes."""
    if folder.job.recipe_only:
        return
    for file in recorded.manifest.output_files:
        if folder.kept(output, file.name) != file.size:
            raise _no_receipt(recorded, f"{file.name}, which it is of, is not there, or not whole")


def _no_receipt(recorded: RecordedManifest, why: str) -> InputInvalid:
    return InputInvalid(
        "cannot use the receipt",
        path=recorded.path,
        why=why,
        next_step="Remove it, do its share again with noisytune work, then finish",
    )


def _manifest_path(output: Place, job: Job) -> Place:
    if job.recipe_only:
        return output
    return _beside(output) if job.is_file else output / MANIFEST


def _beside(output: Place) -> Place:
    return output.parent / (output.name + MANIFEST_SUFFIX)


def _published_by(
    folder: JobFolder, path: Place, plan: Plan, receipts: tuple[Receipt, ...]
) -> Manifest | None:
    """Return an output's manifest if it is there: an earlier `finish` of the job was stopped after it.

    What is to be replaced may be the same but for a card or what changed since: it is replaced again.
    """
    job = folder.job
    if job.overwrite or job.overwrite_changed:
        return None
    with folder.storage.reading_output(path) as file:
        if file is None:
            return None
        try:
            manifest = read_manifest(file).manifest
        except InputInvalid:
            return None
    is_anew = bool(manifest.rewritten)
    found = (manifest.source, manifest.noise, manifest.conversion, is_anew, manifest.receipts)
    made = (job.source, plan.noise, job.conversion, job.card and not job.recipe_only, receipts)
    return manifest if found == made else None


def _check_places(
    outputs: Sequence[Place], job: Job, source: Checkpoint, threads: int | None, progress: Progress
) -> dict[Place, Seen]:
    """Raise what stands against outputs that are to be published now, as `perturb` does.

    Return what is there. In an object store the job's claim does, which whoever finishes it at the same time
    may have taken back.
    """
    replaces = job.overwrite or job.overwrite_changed
    try:
        for output in (one for one in outputs if not isinstance(one, Address)):
            (check_recipe if job.recipe_only else check_output)(output, source, overwrite=replaces)
        check_distinct(outputs)
        seen = require_unchanged(outputs, insists=job.overwrite_changed, threads=threads, progress=progress)
    except OutputUnsafe as error:
        step = "Move it away, and finish again: the shares that are done are kept"
        raise OutputUnsafe(error.what, path=error.path, why=error.why, next_step=step) from error
    check_descriptors(len(source.weight_files))
    return seen


def _publish(
    folder: JobFolder,
    prepared: Prepared,
    outputs: Mapping[int, Place],
    seen: Mapping[Place, Seen],
    receipts: Sequence[tuple[Receipt, ...]],
    progress: Progress,
) -> list[Perturbed]:
    """Publish some of the job's outputs, by their numbers."""
    job, source = folder.job, prepared.source
    files = [(file.name, file.size) for file in prepared.files or source.sources]
    publications = [
        publication_at(
            output,
            directory=not (job.is_file or job.recipe_only),
            overwrite=job.overwrite or job.overwrite_changed,
            recipe=job.recipe_only,
            seen=seen[output],
            progress=progress,
            job_claim=folder.claim,
        )
        for output in outputs.values()
    ]
    with all_staged(publications):
        for at, publication in zip(outputs, publications, strict=True):
            for name, size in [] if job.recipe_only else files:
                folder.adopt(publication, at, name, size)
        chosen = replace(prepared, plans=tuple(prepared.plans[at] for at in outputs))
        return publish_receipts(chosen, [receipts[at] for at in outputs], publications)
