"""perturb: a checkpoint in, a noisy checkpoint and its manifest out.

Everything that can be refused is refused before a weight is read: the source's kind, the plan, the place of
the output, the space it needs. Then tensors walk from source to staging, and publishing is the last step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from noisytune_cli.checkpoint.adapter import factors_among, kind_of_factors
from noisytune_cli.checkpoint.address import Address, Place, is_address
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.find import comes_from_hub
from noisytune_cli.checkpoint.weights import shard_count
from noisytune_cli.commands.replaced import (
    check_before_download,
    find_made,
    refuse_planned,
    require_unchanged,
)
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.result import Result
from noisytune_cli.commands.write import complete, fill, record_source
from noisytune_cli.engine.matrix import warnings_of
from noisytune_cli.engine.threads import Progress, default_threads
from noisytune_cli.engine.walk import Walk
from noisytune_cli.errors import UsageError
from noisytune_cli.escape import escape
from noisytune_cli.manifest.write import pieces, to_json
from noisytune_cli.noise.devices import open_device
from noisytune_cli.output.commits import all_staged, commit_all, publication_at
from noisytune_cli.output.convert import OutputFile, lay_out
from noisytune_cli.output.destination import check_places, find_place
from noisytune_cli.output.overwrite import Seen
from noisytune_cli.output.publish import Publication, copy_file, write_file
from noisytune_cli.output.sidecars import companions, left_behind
from noisytune_cli.output.space import check_room, free_bytes, manifest_bytes, needed_bytes
from noisytune_cli.plan.evidence.doubts import refuse_doubts, warning_of, warning_of_averages
from noisytune_cli.plan.evidence.told import Told, tell_checkpoint
from noisytune_cli.plan.plan import check_outcomes, idle_rules, no_matrices, too_strong
from noisytune_cli.plan.plans import make_plans, settle_plans, together
from noisytune_cli.records import (
    Combination,
    Conversion,
    Manifest,
    OutputRecord,
    Plan,
    Receipt,
)
from noisytune_cli.version import __version__

if TYPE_CHECKING:
    from noisytune_cli.commands.card import Card


@dataclass(frozen=True, repr=False)
class Perturbed(Result):
    """What was published: the manifest, where it and the output are, and what the user should know.

    Of a `recipe` the manifest is the output. What was `skipped` was there already, and is what was asked for.
    """

    output: Place
    manifest_path: Place
    manifest: Manifest
    cleared: tuple[str, ...]
    warnings: tuple[str, ...]
    recipe: bool = False
    skipped: bool = False

    def _rows(self) -> Sequence[Any]:
        rows: Sequence[Any] = to_json(self.manifest)["tensors"]
        return rows

    def _told(self) -> str:
        perturbed = sum(receipt.action == "perturb" for receipt in self.manifest.receipts)
        return f"{perturbed} of {len(self.manifest.receipts)} tensors -> {self.output}"


@dataclass(frozen=True)
class Planned:
    """A dry run's answer: the plan of each combination, made from headers alone, and where it would go.

    `left_out` names the files that would not be in the outputs, each with the reason. `nbytes` is what they
    take in all, nearly, and `free` what there is where the first would be, None where none is named. `kept`
    are those of `outs` that would stay.
    """

    id: str
    revision: str | None
    plans: tuple[Plan, ...]
    outs: tuple[str | None, ...]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    nbytes: int
    free: int | None
    kept: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan of the first combination."""
        return self.plans[0]


@dataclass(frozen=True)
class Prepared:
    """A request with its source open: what is told of the tensors, and the plan of each output.

    `files` are the outputs' weight files where they are not like the source's; `card` is the model card where
    it is to be written anew, and `claims` are what is warned of where it is not.
    """

    request: Request
    source: Checkpoint
    plans: tuple[Plan, ...]
    files: tuple[OutputFile, ...]
    card: Card | None
    claims: tuple[str, ...]
    told: Told

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before a weight is read."""
        plan = together(self.plans)
        doubts = (*warning_of(plan), *warning_of_averages(plan, self.told.buffers))
        adapters = _of_an_adapter(self.source, plan)
        alone = _of_a_shard(self.source)
        strong = (*no_matrices(plan), *too_strong(plan.noise for plan in self.plans))
        return (*self.source.warnings, *self.claims, *alone, *adapters, *doubts, *idle_rules(plan), *strong)

    def settled(self) -> Prepared:
        """Return it with all settled that takes reading; a buffer keeps its dtype."""
        request = self.request
        plans = tuple(settle_plans(self.plans, self.source, self.told, request.conversion))
        if request.strict:
            refuse_doubts(together(plans), request.source)
        return replace(self, plans=plans, files=lay_out_all(self.source, plans, request.conversion))


def prepare(request: Request, source: Checkpoint, wanted: Sequence[Combination]) -> Prepared:
    """Plan each combination from headers alone."""
    card, claims = read_claims(request, source)
    told = tell_checkpoint(source, request.buffers_from)
    plans = tuple(make_plans(source, request.noise, wanted, told, request.conversion))
    files = lay_out_all(source, plans, request.conversion)
    return Prepared(request, source, plans, files, card, claims, told)


def check_outputs(
    prepared: Prepared,
    outs: Sequence[str],
    *,
    recipe_only: bool,
    overwrite: bool,
    overwrite_changed: bool,
    threads: int | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
    in_shares: bool = False,
) -> dict[Place, Seen]:
    """Return where outputs go, and what there was when it was asked whether that may be replaced.

    Raises unless all of them may be written there, and there is room for them. What is written `in_shares` is
    not all staged here before it is sent to an object store.
    """
    source, files = prepared.source, prepared.files
    outputs = check_places(
        source, files, outs, recipe_only=recipe_only, overwrite=overwrite or overwrite_changed
    )
    seen = require_unchanged(outputs, insists=overwrite_changed, threads=threads, progress=progress)
    if not (in_shares and any(isinstance(output, Address) for output in outputs)):
        check_room(source, files, prepared.plans[0], outputs, recipe_only=recipe_only)
    return seen


def plan_perturb(
    request: Request,
    wanted: Sequence[Combination] = (),
    *,
    recipe_only: bool = False,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    skip_existing: bool = False,
    in_shares: bool = False,
) -> Planned:
    """Say what `perturb` (with combinations, `perturb_each`) would do, without reading a weight.

    Outputs that are named are refused as there; `in_shares` a job that is planned for them is gone on with.
    With `skip_existing` weights are read where only these tell whether an output would stay.
    """
    wanted = wanted or [only(request, None)]
    outs = outs_of(wanted)
    if skip_existing and is_address(request.source):
        raise UsageError(
            "--dry-run and --skip-existing",
            path=request.source,
            why="what is in an object store would have to be fetched to tell whether an output is of it",
            next_step="Leave one of them out",
        )
    if not skip_existing:
        check_before_download(
            request.source,
            outs,
            recipe_only=recipe_only,
            overwrite=overwrite,
            overwrite_changed=overwrite_changed,
        )
    with request.open(headers_only=True) as source:
        prepared = prepare(request, source, wanted)
        plans, files, card = prepared.plans, prepared.files, prepared.card
        kept = tuple(_find_made(prepared, outs, recipe_only)) if skip_existing and outs else ()
        outputs = check_outputs(
            prepared,
            [out for out in outs if out not in kept],
            recipe_only=recipe_only,
            overwrite=overwrite,
            overwrite_changed=overwrite_changed,
        )
        if not in_shares:
            refuse_planned(outputs)
        if request.strict:
            refuse_doubts(together(plans), request.source)
        each = manifest_bytes(plans[0]) if recipe_only else needed_bytes(source, plans[0], files)
        return Planned(
            id=source.id,
            revision=source.revision,
            plans=tuple(plans),
            outs=tuple(one.out for one in wanted),
            left_out=(*source.left_out, *(card.left_out if card else ()), *left_behind(source, files)),
            warnings=prepared.warnings,
            nbytes=each * (len(plans) - len(kept)),
            free=free_bytes(next(iter(outputs))) if outputs else None,
            kept=kept,
        )


def perturb(
    request: Request,
    out: str,
    *,
    recipe_only: bool = False,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    skip_existing: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    direct: bool | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Perturbed:
    """Write the noisy checkpoint and its manifest to `out`, durably, or change nothing."""
    (done,) = perturb_each(
        request,
        [only(request, out)],
        recipe_only=recipe_only,
        overwrite=overwrite,
        overwrite_changed=overwrite_changed,
        skip_existing=skip_existing,
        device=device,
        threads=threads,
        direct=direct,
        progress=progress,
    )
    return done


def perturb_each(
    request: Request,
    wanted: Sequence[Combination],
    *,
    recipe_only: bool = False,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    skip_existing: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    direct: bool | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> tuple[Perturbed, ...]:
    """Write what `perturb` would for each λ and seed of `wanted`, from one pass over the source.

    All are complete before the first is published. With `recipe_only` the manifests alone are written.
    `overwrite` replaces outputs that are as noisytune wrote them, `overwrite_changed` others too; with
    `skip_existing` those stay that are what is asked for.
    """
    if not skip_existing:  # what is to stay is told from the source
        check_before_download(
            request.source,
            outs_of(wanted),
            recipe_only=recipe_only,
            overwrite=overwrite,
            overwrite_changed=overwrite_changed,
        )
    outs = outs_of(wanted)
    if skip_existing and comes_from_hub(request.source):  # for what stays no weight is fetched
        with request.open(headers_only=True) as source:
            kept = _find_made(prepare(request, source, wanted), outs, recipe_only, threads, progress)
        if len(kept) == len(outs):
            return tuple(kept[out] for out in outs)
    with request.open(outs=() if skip_existing or recipe_only else outs) as source:
        prepared = prepare(request, source, wanted)
        plans = prepared.plans
        kept = _find_made(prepared, outs, recipe_only, threads, progress) if skip_existing else {}
        left = [at for at, out in enumerate(outs) if out not in kept]
        if not left:
            return tuple(kept[out] for out in outs)
        walk = Walk(open_device(device), threads or default_threads(), direct=direct)
        outputs = check_outputs(
            prepared,
            [outs[at] for at in left],
            recipe_only=recipe_only,
            overwrite=overwrite,
            overwrite_changed=overwrite_changed,
            threads=threads,
            progress=progress,
        )
        refuse_planned(outputs)
        publications = [
            publication_at(
                output,
                directory=not (source.single_file or recipe_only),
                overwrite=overwrite or overwrite_changed,
                recipe=recipe_only,
                seen=seen,
                progress=progress,
            )
            for output, seen in outputs.items()
        ]
        prepared = replace(prepared, plans=tuple(plans[at] for at in left))
        made = _make(prepared, publications, walk, progress)
        done = kept | {outs[at]: one for at, one in zip(left, made, strict=True)}
        return tuple(done[out] for out in outs)


def _find_made(
    prepared: Prepared,
    outs: Sequence[str],
    recipe_only: bool,
    threads: int | None = None,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> dict[str, Perturbed]:
    """Return what is there already of what is asked for, by how the user names it."""
    request, source = prepared.request, prepared.source
    found = {}
    for out, plan in zip(outs, prepared.plans, strict=True):
        output = find_place(out, source, prepared.files, recipe_only=recipe_only)
        recorded = find_made(
            output,
            source,
            plan,
            request.conversion,
            with_card=request.card,
            recipe_only=recipe_only,
            threads=threads,
            progress=progress,
        )
        if recorded is not None:
            if request.strict:
                refuse_doubts(
                    replace(plan, steps=tuple(r.step for r in recorded.manifest.receipts)), request.source
                )
            found[out] = Perturbed(
                output, recorded.path, recorded.manifest, (), (), recipe_only, skipped=True
            )
    return found


def _make(
    prepared: Prepared, publications: Sequence[Publication], walk: Walk, progress: Progress
) -> list[Perturbed]:
    """Write and publish an output for each plan."""
    filled = [publication for publication in publications if not publication.is_recipe]
    with all_staged(publications):
        prepared = prepared.settled()
        places = [publication.place for publication in filled]
        sources = prepared.source.sources
        with ExitStack() as filling:
            receipts, sinks = fill(filling, walk, prepared.plans, sources, places, progress, prepared.files)
            complete(sources, sinks)
        return publish_receipts(prepared, receipts, publications)


def publish_receipts(
    prepared: Prepared, receipts: Sequence[tuple[Receipt, ...]], publications: Sequence[Publication]
) -> list[Perturbed]:
    """Complete staged outputs whose weight files are made, each with its receipts, and publish them."""
    request, source, card, files = prepared.request, prepared.source, prepared.card, prepared.files
    filled = [publication for publication in publications if not publication.is_recipe]
    for plan, done in zip(prepared.plans, receipts, strict=True):
        check_outcomes(plan.noise, ((r.action, r.reason) for r in done), path=request.source)
    own = card.own if card else frozenset[str]()
    copied, converted = _write_beside(source, request.conversion, files, filled, own)
    manifests = [
        Manifest(
            tool_name="noisytune",
            tool_version=__version__,
            source=record_source(source),
            noise=plan.noise,
            receipts=done,
            copied=copied,
            left_out=(*source.left_out, *(card.left_out if card else ()), *left_behind(source, files)),
            output=converted,
        )
        for plan, done in zip(prepared.plans, receipts, strict=True)
    ]
    if card is not None:
        from noisytune_cli.commands.card import write_card

        manifests = [
            replace(
                manifest,
                rewritten=write_card(card, card.of_noise(manifest), filled[index : index + 1]),
            )
            for index, manifest in enumerate(manifests)
        ]
    for publication, manifest in zip(publications, manifests, strict=True):
        publication.seal(pieces(manifest))
    paths = commit_all(publications)
    warnings = prepared.warnings
    return [
        Perturbed(
            publication.shown,
            path,
            manifest,
            publication.cleared,
            (*warnings, *publication.warnings, *warnings_of(manifest.receipts)),
            publication.is_recipe,
        )
        for publication, path, manifest in zip(publications, paths, manifests, strict=True)
    ]


def outs_of(wanted: Sequence[Combination]) -> list[str]:
    return [one.out for one in wanted if one.out is not None]


def lay_out_all(
    source: Checkpoint, plans: Sequence[Plan], conversion: Conversion | None
) -> tuple[OutputFile, ...]:
    """Return the outputs' weight files where they are not like the source's; λ makes no difference."""
    return () if conversion is None else lay_out(source.sources, plans[0], conversion)


def _write_beside(
    source: Checkpoint,
    conversion: Conversion | None,
    files: Sequence[OutputFile],
    publications: Sequence[Publication],
    own: Collection[str],
) -> tuple[tuple[tuple[str, str], ...], OutputRecord | None]:
    """Write what lies beside the weights to every output: return what was copied, and what was converted.

    What is `own` to each output, or to none, is left to the caller.
    """
    anew = [] if conversion is None else companions(source, files, conversion)
    kept = [name for name in source.others if name not in {*own, *(one.source for one in anew)}]
    copied = tuple(
        (name, copy_file(source.root / name, name, publications, source.open_beside)) for name in kept
    )
    rewritten = tuple(
        (c.name, c.source, write_file(c.content, c.name, publications, source.mode_beside(c.source)))
        for c in anew
    )
    source.check_beside()
    if conversion is None:
        return copied, None
    return copied, OutputRecord(conversion, tuple(file.record for file in files), rewritten)


def only(request: Request, out: str | None) -> Combination:
    """Return the one combination of a request without lists."""
    return Combination(request.noise.lam, request.noise.seed, out)


def read_claims(request: Request, source: Checkpoint) -> tuple[Card | None, tuple[str, ...]]:
    """Read the model card that is to be written anew; or warn of what it claims, which a file has none of."""
    if source.single_file and not request.card:
        return None, ()
    # Few outputs have one, and the others should not wait for it.
    from noisytune_cli.commands.card import claims_of, read_card

    return (read_card(source), ()) if request.card else (None, tuple(claims_of(source)))


def _of_a_shard(source: Checkpoint) -> list[str]:
    """Warn of a shard that is taken without the others: what it shares with them is not seen."""
    name = source.sources[0].name
    if len(source.sources) > 1 or source.index is not None or not (shards := shard_count(name)):
        return []
    return [
        f"{escape(name)} is one of {shards:,} shards and is taken for a whole: a weight that is tied to one "
        "in another shard gets another noise; give the folder, or its index with --weights"
    ]


def _of_an_adapter(source: Checkpoint, plan: Plan) -> list[str]:
    """Warn of an adapter's factors: the noise of the method is on the weights that they are added to."""
    noisy = [step.tensor.name for step in plan.steps if step.action == "perturb"]
    factors, kind = factors_among(noisy), kind_of_factors(source)
    # A model may have layers of such names itself, as RWKV-7 does: of an adapter they are most of all.
    if not noisy or not (kind or 2 * len(factors) > len(noisy)):
        return []
    which, name = f" ({escape(kind)})" if kind else "", escape([*factors, *noisy][0])
    return [
        f"{name} is of an adapter{which}, whose factors get noise of their own: the method's is on its base, "
        "before the adapter is made"
    ]
