"""The options of `noisytune perturb`: a noisy copy of a checkpoint, or several from one pass."""

# Annotations are no strings here: Typer would compile and evaluate each of them four times.

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisytune_cli.cli.help import NOISE, OUTPUT, RUNNING, SOURCE, TENSORS
from noisytune_cli.cli.options import (
    AsJson,
    BuffersFrom,
    Card,
    Components,
    Device,
    Direct,
    FollowLinks,
    Granularity,
    GranularityOption,
    Mmap,
    Overwrite,
    OverwriteChanged,
    Patterns,
    Quiet,
    Revision,
    Source,
    Splits,
    Threads,
    Weights,
)
from noisytune_cli.errors import UsageError
from noisytune_cli.noise import distributions
from noisytune_cli.records import Combination, Term, mixed_strength

if TYPE_CHECKING:
    from noisytune_cli.commands.request import Request

#: The choices are the file names in `distributions/`.
_Noise = StrEnum("_Noise", {name: name for name in distributions.names()})  # type: ignore[misc]


class _Scope(StrEnum):
    matrix = "matrix"
    global_ = "global"


class _DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class _To(StrEnum):
    safetensors = "safetensors"


class _Dequantize(StrEnum):
    bf16 = "bf16"


ShareBytes = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Weight files up to so many bytes together are one share, such as 4G. [default: 1G]",
        rich_help_panel=RUNNING,
    ),
]


@dataclass(frozen=True)
class Asked:
    """What the options of `perturb` ask for, as its command and that of `plan` take it."""

    request: "Request"
    wanted: tuple[Combination, ...]
    share_bytes: int
    outputs: dict[str, bool]


def perturb(
    source: Source,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Where to write: a folder, or a file where SOURCE is a file. {lambda} and {seed} in it "
            "stand for the values.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            metavar="λ,…",
            help="Width of the noise in units of each matrix's std; of a list, an output for each. "
            "[default: 0.15]",
            rich_help_panel=NOISE,
        ),
    ] = None,
    noise_std: Annotated[
        str | None,
        typer.Option(
            metavar="S,…",
            help="Strength as the noise's own std in units of std(W): λ = √12 · S.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    sigma: Annotated[
        str | None,
        typer.Option(
            metavar="σ,…",
            help="The noise's std itself, the same for every tensor: Gaussian unless --noise.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Add up the noises of many seeds: a file of lines "
            '{"seed": 17, "sigma": 0.001, "coefficient": 0.02} (or "lambda").',
            rich_help_panel=NOISE,
        ),
    ] = None,
    shrink: Annotated[
        str | None,
        typer.Option(
            metavar="κ",
            help="Keep this share of the weights, 0 to 1, under the noise: κ · W + noise.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            metavar="N,N-M,…",
            help="Seed, 0 to 2^64-1; of a list, or a range such as 0-4, an output for each. [default: 0]",
            rich_help_panel=NOISE,
        ),
    ] = None,
    noise: Annotated[
        _Noise | None,
        typer.Option(
            help="Distribution of the noise. [default: uniform, with σ gaussian]", rich_help_panel=NOISE
        ),
    ] = None,
    scope: Annotated[
        _Scope | None,
        typer.Option(
            help="One std for each matrix, or one for all perturbed tensors together. [default: matrix]",
            rich_help_panel=NOISE,
        ),
    ] = None,
    granularity: GranularityOption = Granularity.tensor,
    split: Splits = None,
    include: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN",
            help="Perturb only these: a shell pattern on the whole name, or a kind.",
            rich_help_panel=TENSORS,
        ),
    ] = None,
    exclude: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN", help="Leave these as they are; beats --include.", rich_help_panel=TENSORS
        ),
    ] = None,
    lambda_for: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN=VALUE", help="Another λ for these; the last match wins.", rich_help_panel=TENSORS
        ),
    ] = None,
    sigma_for: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN=VALUE", help="Another σ for these; the last match wins.", rich_help_panel=TENSORS
        ),
    ] = None,
    buffers_from: BuffersFrom = "auto",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse a checkpoint with a tensor that may be no parameter by its name alone.",
            rich_help_panel=TENSORS,
        ),
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Settings by name: xtreme (λ 0.1, @embeddings excluded).",
            rich_help_panel=NOISE,
        ),
    ] = None,
    dtype: Annotated[
        _DType | None,
        typer.Option(
            help="Write parameters in this dtype, rounded once from the noisy sum; index and config follow.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    to: Annotated[
        _To | None,
        typer.Option(
            help="Write pickled weights as safetensors; the model's weights alone.", rich_help_panel=OUTPUT
        ),
    ] = None,
    dequantize: Annotated[
        _Dequantize | None,
        typer.Option(
            help="Read fp8 weights, block-wise or per tensor, as the BF16 they stand for.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    direct: Direct = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    weights: Weights = None,
    component: Components = None,
    revision: Revision = None,
    card: Card = False,
    recipe_only: Annotated[
        bool,
        typer.Option(
            "--recipe-only",
            help="Write the manifest alone, to the file OUT (or into the folder OUT), for replay later.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel=RUNNING)
    ] = False,
    overwrite: Overwrite = False,
    overwrite_changed: OverwriteChanged = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Keep OUT where it is already what this run would write, and SOURCE is not newer.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="local|ray",
            help="Do it in shares, here (local) or on a Ray cluster: what is stopped goes on when the same "
            "command is given again.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The head of the Ray cluster. [default: one is started here]",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    share_bytes: ShareBytes = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Perturb a checkpoint that noisytune has noised or averaged before.",
            rich_help_panel=SOURCE,
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a noisy copy of a checkpoint, and a manifest of what was done.

    For each parameter matrix W' = W + U(-λ/2, λ/2) · std(W). The noise is a function of the seed, the
    tensor's name and the element's index alone, so the same command gives the same bytes everywhere.

    PATTERN is a shell pattern (`*`, `?`, `[…]`; `*` crosses dots) or a kind: @embeddings, @head, @norm,
    @bias, @attention, @mlp. Repeat an option to give several.

    Of lists (--lambda 0.05,0.1 --seed 0-4) each combination is an output, from one pass over SOURCE;
    {lambda}, {noise-std} and {sigma} in OUT stand for the values as they are written, {seed} for the seed
    without leading zeros. More on lists, strengths below 0, SIZES and recipes: docs/concepts.md.

    Examples:
      noisytune perturb bert-base-uncased --lambda 0.15 -o ./bert-noisy
      noisytune perturb model.safetensors --noise gaussian --seed 7 -o noisy.safetensors
      noisytune perturb ./llama --exclude '@norm' --lambda-for '@attention=0.1' -o ./llama-noisy
      noisytune perturb ./bert --lambda 0.1,0.15 --seed 0-4 -o 'bert-l{lambda}-s{seed}'
      noisytune perturb ./llama --dry-run
    """
    given = dict(locals())
    from noisytune_cli.cli import show, show_perturb
    from noisytune_cli.commands import perturb as command

    started = time.monotonic()
    asked = ask(**given)
    _check_running(engine, address, share_bytes, device, skip_existing=skip_existing)
    if dry_run:
        planned = command.plan_perturb(
            asked.request,
            asked.wanted,
            skip_existing=skip_existing,
            in_shares=engine is not None,
            **asked.outputs,
        )
        show_perturb.show_planned(planned, as_json=as_json)
        return
    if out is None:
        raise UsageError(
            "--out is missing", why="there is nowhere to write to", next_step="Give -o OUT, or --dry-run"
        )

    def progress(nbytes: int) -> Any:
        return show.progress(nbytes, "perturb")

    if engine is not None:
        from noisytune_cli.commands.distribute import perturb_shares

        results = perturb_shares(
            asked.request,
            out,
            asked.wanted,
            engine=engine,
            address=address,
            share_bytes=asked.share_bytes,
            device=device,
            threads=threads,
            direct=direct,
            progress=progress,
            **asked.outputs,
        )
    else:
        results = command.perturb_each(
            asked.request,
            asked.wanted,
            skip_existing=skip_existing,
            device=device,
            threads=threads,
            direct=direct,
            progress=progress,
            **asked.outputs,
        )
    show_perturb.show_perturbed(results, as_json=as_json, seconds=time.monotonic() - started)


def _check_running(
    engine: str | None, address: str | None, share_bytes: str | None, device: str, *, skip_existing: bool
) -> None:
    """Refuse what cannot be run so, in a dry run too; no device is opened."""
    from noisytune_cli.noise.devices import module_of

    module_of(device)
    if engine is not None:
        from noisytune_cli.commands import engines

        engines.check(engine, address)
        if skip_existing:
            raise UsageError(
                "--engine and --skip-existing",
                why="the shares that are done are passed over in any case",
                next_step="Leave one of them out",
            )
    elif address is not None or share_bytes is not None:
        raise UsageError(
            "--share-bytes" if address is None else "--address",
            why="it is for a run in shares",
            next_step="Add --engine local or --engine ray" if address is None else "Add --engine ray",
        )


def ask(
    *,
    source: str,
    out: str | None,
    lam: str | None,
    noise_std: str | None,
    sigma: str | None,
    mix: str | None,
    shrink: str | None,
    seed: str | None,
    noise: Any,
    scope: Any,
    granularity: Any,
    split: Any,
    include: Any,
    exclude: Any,
    lambda_for: Any,
    sigma_for: Any,
    buffers_from: str,
    strict: bool,
    preset: str | None,
    dtype: Any,
    to: Any,
    dequantize: Any,
    mmap: bool,
    follow_links: bool,
    weights: str | None,
    component: str | None,
    revision: str | None,
    card: bool,
    recipe_only: bool,
    overwrite: bool,
    overwrite_changed: bool,
    share_bytes: str | None,
    again: bool,
    **_: object,
) -> Asked:
    """Return what options ask for; UsageError where they do not go together."""
    from noisytune_cli.cli.parse import (
        check_out,
        choose_strength,
        combine,
        make_noise,
        read_bytes,
        read_components,
        read_preset,
        read_shrink,
    )
    from noisytune_cli.commands.request import SHARE_BYTES, Request, make_conversion

    if out is not None:
        check_out(out)
    chosen = read_preset(preset)
    given = {
        "--lambda": lam,
        "--noise-std": noise_std,
        "--sigma": sigma,
        "--mix": mix,
        "--lambda-for": lambda_for or None,
        "--sigma-for": sigma_for or None,
        "--scope": scope,
        "--seed": seed,
    }
    strength = choose_strength(given)
    terms: tuple[Term, ...] = ()
    is_absolute = strength == "--sigma"
    if mix is not None:
        from noisytune_cli.manifest.mixture import read_mix

        terms, is_absolute = read_mix(mix)
    if terms and is_absolute and scope is not None:
        raise UsageError("--scope and --mix", why="σ is scaled with no std", next_step="Leave --scope out")
    default = mixed_strength(terms) if terms else chosen.lam
    wanted = combine(
        out, lam=lam, noise_std=noise_std, sigma=sigma, seed="0" if seed is None else seed, default=default
    )
    spec = make_noise(
        lam=wanted[0].lam,
        distribution=noise.value if noise is not None else "gaussian" if is_absolute else "uniform",
        scope="absolute" if is_absolute else "matrix" if scope is None else scope.value,
        kept=read_shrink(shrink),
        mix=terms,
        granularity=granularity.value,
        splits=split or (),
        include=include or (),
        exclude=exclude or (),
        rules=lambda_for or sigma_for or (),
        preset=chosen,
    )
    request = Request(
        source=source,
        noise=spec,
        conversion=make_conversion(dtype, to, dequantize),
        weights=weights,
        components=read_components(component),
        revision=revision,
        mmap=mmap,
        again=again,
        follow_links=follow_links,
        buffers_from=buffers_from,
        strict=strict,
        card=card,
    )
    outputs = {"recipe_only": recipe_only, "overwrite": overwrite, "overwrite_changed": overwrite_changed}
    return Asked(request, wanted, read_bytes("--share-bytes", share_bytes, SHARE_BYTES), outputs)
