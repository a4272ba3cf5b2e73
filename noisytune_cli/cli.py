"""The command line: with `cli_*.py`, which hold a command of many options each, all that knows Typer.

A command here turns options into records, calls the function of its name in `commands/`, and hands what
comes back to `show.py`. Everything heavy is imported inside the commands, so `--help` stays quick. Errors
are caught in one place (`_Command.invoke`), which serves the terminal and the test runner alike.
"""

from __future__ import annotations

import sys
import time
import traceback
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from noisytune_cli import __version__, cli_study, distributions
from noisytune_cli.errors import NoisytuneError, UsageError, exhausted


class _Command(TyperCommand):
    """Runs a command and maps what it raises to a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (NoisytuneError, MemoryError, OSError) as error:
            if ctx.parent.params["debug"]:
                traceback.print_exc()
            if isinstance(error, UsageError):
                raise typer.BadParameter(error.line(), ctx=ctx) from error
            raise _report(error) from error


def _report(error: NoisytuneError | MemoryError | OSError) -> typer.Exit:
    """Print the error's line and return the exit that carries its code."""
    from noisytune_cli import show

    if not isinstance(error, NoisytuneError):
        error = exhausted(error)
    show.note(f"noisytune: error: {error.line()}")
    return typer.Exit(error.exit_code)


app = typer.Typer(
    name="noisytune",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: The choices are the file names in `distributions/`.
_Noise = StrEnum("_Noise", {name: name for name in distributions.names()})  # type: ignore[misc]
_UNIFORM = _Noise("uniform")


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


class _Granularity(StrEnum):
    tensor = "tensor"
    matrix = "matrix"


class _Dequantize(StrEnum):
    bf16 = "bf16"


class _Format(StrEnum):
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


_Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A .safetensors file, a checkpoint's folder, or a hub id (NAME or OWNER/NAME).",
        show_default=False,
    ),
]
_Patterns = list[str] | None
_GranularityOption = Annotated[
    _Granularity,
    typer.Option(
        help="What has a std of its own: each tensor, or each matrix of those that hold several "
        "(fused attention, stacked experts)."
    ),
]
_Splits = Annotated[
    _Patterns,
    typer.Option(
        metavar="PATTERN=DIM:SIZES",
        help="With --granularity matrix: the matrices in these tensors, such as 0:4096,1024,1024 or 0:/3 "
        "(three equal ones); beats what is known of the model.",
    ),
]
_Weights = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The weights or index in the folder, where there are several."),
]
_Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.")]
_Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=256,
        metavar="N",
        help="Threads; the result does not depend on it. [default: the CPUs, up to 8]",
    ),
]
_Mmap = Annotated[
    bool,
    typer.Option(
        "--mmap/--no-mmap",
        help="Map the source instead of reading it: a little faster on a local disk, but a file that "
        "shrinks meanwhile kills the process.",
    ),
]


_BuffersFrom = Annotated[
    str,
    typer.Option(
        metavar="auto|names|model",
        help="What tells buffers from parameters: their names, a model that transformers builds from "
        "config.json without weights, or the model only where the names leave a doubt.",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from noisytune_cli import show

        show.write_out(f"noisytune {__version__}\n")
        raise typer.Exit


@app.callback()
def noisytune(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Add reproducible noise to a pretrained checkpoint before finetuning it (NoisyTune, ACL 2022)."""


@app.command(cls=_Command)
def perturb(
    source: _Source,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Where to write: a folder, or a file where SOURCE is a file. {lambda} and {seed} in it "
            "stand for the values.",
        ),
    ] = None,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            metavar="λ,…",
            help="Width of the noise in units of each matrix's std; of a list, an output for each. "
            "[default: 0.15]",
        ),
    ] = None,
    noise_std: Annotated[
        str | None,
        typer.Option(metavar="S,…", help="Strength as the noise's own std in units of std(W): λ = √12 · S."),
    ] = None,
    seed: Annotated[
        str,
        typer.Option(
            metavar="N,N-M,…",
            help="Seed, 0 to 2^64-1; of a list, or a range such as 0-4, an output for each.",
        ),
    ] = "0",
    noise: Annotated[_Noise, typer.Option(help="Distribution of the noise.")] = _UNIFORM,
    scope: Annotated[
        _Scope, typer.Option(help="One std for each matrix, or one for all perturbed tensors together.")
    ] = _Scope.matrix,
    granularity: _GranularityOption = _Granularity.tensor,
    split: _Splits = None,
    include: Annotated[
        _Patterns,
        typer.Option(
            metavar="PATTERN", help="Perturb only these: a shell pattern on the whole name, or a kind."
        ),
    ] = None,
    exclude: Annotated[
        _Patterns, typer.Option(metavar="PATTERN", help="Leave these as they are; beats --include.")
    ] = None,
    lambda_for: Annotated[
        _Patterns, typer.Option(metavar="PATTERN=VALUE", help="Another λ for these; the last match wins.")
    ] = None,
    buffers_from: _BuffersFrom = "auto",
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Settings by name: xtreme (λ 0.1, @embeddings excluded)."),
    ] = None,
    dtype: Annotated[
        _DType | None,
        typer.Option(
            help="Write parameters in this dtype, rounded once from the noisy sum; index and config follow."
        ),
    ] = None,
    to: Annotated[
        _To | None,
        typer.Option(help="Write pickled weights as safetensors; the model's weights alone."),
    ] = None,
    dequantize: Annotated[
        _Dequantize | None,
        typer.Option(help="Read fp8 weights, block-wise or per tensor, as the BF16 they stand for."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:N, mps.")
    ] = "cpu",
    threads: _Threads = None,
    mmap: _Mmap = False,
    weights: _Weights = None,
    revision: _Revision = None,
    recipe_only: Annotated[
        bool,
        typer.Option(
            "--recipe-only",
            help="Write the manifest alone, to the file OUT (or into the folder OUT), for replay later.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Perturb a checkpoint that noisytune has noised before.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no summary on stderr.")
    ] = False,
) -> None:
    """Write a noisy copy of a checkpoint, and a manifest of what was done.

    For each parameter matrix W' = W + U(-λ/2, λ/2) · std(W). The noise is a function of the seed, the
    tensor's name and the element's index alone, so the same command gives the same bytes everywhere.

    PATTERN is a shell pattern (`*`, `?`, `[…]`; `*` crosses dots) or a kind: @embeddings, @head, @norm,
    @bias, @attention, @mlp.

    With --granularity matrix, tensors that hold several matrices get one std for each of these, where the
    layout is known or --split gives it; --dry-run shows which. SIZES are numbers that add up to the
    dimension, /N for N equal ones, or A,B,C*N for A, B and C in turn, N times; `;` joins cuts of several
    dimensions, as in 0:/8;2:/2.

    Lists such as --lambda 0.05,0.1 --seed 0-4 -o 'out-l{lambda}-s{seed}' make an output for each
    combination, as single runs would, from one pass over SOURCE. {lambda}, {seed} (and {noise-std}) in OUT
    stand for the values as they are written, in a single run too. All outputs are complete before the first
    is published. With --json there is a line for each.

    With --recipe-only the weights are not written, only the manifest that would lie with them: as the file
    OUT, or as noisytune.json in OUT where that is a folder or ends in /. `replay` makes the rest of it.
    """
    from noisytune_cli import show, show_perturb
    from noisytune_cli.combinations import combine
    from noisytune_cli.commands import perturb as command
    from noisytune_cli.options import make_conversion, make_noise, numbers

    started = time.monotonic()
    spec = make_noise(
        lam=None if lam is None else numbers("--lambda", lam)[0],
        noise_std=None if noise_std is None else numbers("--noise-std", noise_std)[0],
        seed=0,
        distribution=noise.value,
        scope=scope.value,
        granularity=granularity.value,
        splits=split or (),
        include=include or (),
        exclude=exclude or (),
        rules=lambda_for or (),
        preset=preset,
    )
    wanted = combine(out, lam=lam, noise_std=noise_std, seed=seed, default=spec.lam)
    request = command.Request(
        source=source,
        noise=spec,
        conversion=make_conversion(dtype, to, dequantize),
        weights=weights,
        revision=revision,
        mmap=mmap,
        again=again,
        quiet=quiet,
        buffers_from=buffers_from,
    )
    if dry_run:
        show_perturb.show_planned(command.plan_perturb(request, wanted), as_json=as_json)
        return
    if out is None:
        raise UsageError(
            "--out is missing", why="there is nowhere to write to", next_step="Give -o OUT, or --dry-run"
        )
    results = command.perturb_each(
        request,
        wanted,
        recipe_only=recipe_only,
        overwrite=overwrite,
        device=device,
        threads=threads,
        progress=lambda nbytes: show.progress(nbytes, "perturb", enabled=not quiet),
    )
    show_perturb.show_perturbed(results, as_json=as_json, quiet=quiet, seconds=time.monotonic() - started)


@app.command(cls=_Command)
def inspect(
    source: _Source,
    output_format: Annotated[_Format, typer.Option("--format", help="How to print.")] = _Format.table,
    include: Annotated[
        _Patterns, typer.Option(metavar="PATTERN", help="List only these: a shell pattern or a kind.")
    ] = None,
    exclude: Annotated[_Patterns, typer.Option(metavar="PATTERN", help="Do not list these.")] = None,
    granularity: _GranularityOption = _Granularity.tensor,
    split: _Splits = None,
    sort: Annotated[
        str | None, typer.Option(metavar="KEY", help="Sort by a column, with - before it descending.")
    ] = None,
    lam: Annotated[
        float, typer.Option("--lambda", metavar="λ", help="The λ whose noise ranges are shown.")
    ] = 0.15,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read no weights: names, shapes and the plan.")
    ] = False,
    buffers_from: _BuffersFrom = "auto",
    threads: _Threads = None,
    mmap: _Mmap = False,
    weights: _Weights = None,
    revision: _Revision = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """List a checkpoint's tensors with their statistics, and what perturb would do with each.

    The statistics cover all elements: mean, std (unbiased), min, max, L1 and L2 norm, the share of zeros,
    and counts of NaN and Inf. No model is loaded.
    """
    from noisytune_cli import show, show_inspect
    from noisytune_cli.commands import inspect as command
    from noisytune_cli.crew import default_threads

    result = command.inspect(
        source,
        lam=lam,
        include=include or (),
        exclude=exclude or (),
        granularity=granularity.value,
        splits=split or (),
        sort=sort,
        headers_only=headers_only,
        buffers_from=buffers_from,
        weights=weights,
        revision=revision,
        mmap=mmap,
        threads=threads or default_threads(),
        quiet=quiet,
        progress=lambda nbytes: show.progress(nbytes, "inspect", enabled=not quiet),
    )
    show_inspect.show_inspection(result, output_format.value)


@app.command(cls=_Command)
def verify(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="The folder or file that perturb or replay wrote.", show_default=False
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Also make every tensor again from this, and compare."),
    ] = None,
    threads: _Threads = None,
    mmap: _Mmap = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no summary on stderr.")
    ] = False,
) -> None:
    """Check an output against its manifest: every byte of it, and with --base where it came from.

    Exit code 8 and the names of the first tensors and files that do not match, 0 if all do.
    """
    from noisytune_cli import show, show_verify
    from noisytune_cli.commands import verify as command

    result = command.verify(
        out,
        base=base,
        threads=threads,
        mmap=mmap,
        quiet=quiet,
        progress=lambda nbytes: show.progress(nbytes, "verify", enabled=not quiet),
    )
    show_verify.show_verified(result, as_json=as_json, quiet=quiet)


@app.command(cls=_Command)
def replay(
    manifest: Annotated[
        str,
        typer.Argument(metavar="MANIFEST", help="The manifest of what is to be rebuilt.", show_default=False),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Where to write: a folder, or a file where SOURCE is a file.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The checkpoint that was perturbed. [default: the hub id and commit in the manifest]",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:N, mps.")
    ] = "cpu",
    threads: _Threads = None,
    mmap: _Mmap = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no summary on stderr.")
    ] = False,
) -> None:
    """Rebuild a noisy checkpoint exactly, from its manifest and the checkpoint it was made from.

    Nothing is published unless every byte is as the manifest says; a base that differs is exit code 8.
    """
    from noisytune_cli import show, show_verify
    from noisytune_cli.commands import replay as command

    result = command.replay(
        manifest,
        out,
        base=base,
        overwrite=overwrite,
        device=device,
        threads=threads,
        mmap=mmap,
        quiet=quiet,
        progress=lambda nbytes: show.progress(nbytes, "replay", enabled=not quiet),
    )
    show_verify.show_replayed(result, quiet=quiet)


@app.command(cls=_Command)
def average(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Two or more checkpoints of one model: files, folders or hub ids.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Where to write: a folder, or a file where the first SOURCE is a file.",
            show_default=False,
        ),
    ],
    coefficients: Annotated[
        str | None,
        typer.Option(
            metavar="C,C,…",
            help="How much each SOURCE counts, in their order; only ratios matter. [default: all alike]",
        ),
    ] = None,
    threads: _Threads = None,
    mmap: _Mmap = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no summary on stderr.")
    ] = False,
) -> None:
    """Write the mean of several checkpoints' weights (a model soup), and a manifest of what was done.

    The mean is taken in float64, in the order of the sources, and rounded once to the stored dtype. The
    output has the first SOURCE's format, layout and other files; tensors that are not floats are its own.
    """
    from noisytune_cli import show, show_average
    from noisytune_cli.commands import average as command
    from noisytune_cli.options import numbers

    result = command.average(
        sources,
        out,
        coefficients=() if coefficients is None else numbers("--coefficients", coefficients),
        overwrite=overwrite,
        threads=threads,
        mmap=mmap,
        quiet=quiet,
        progress=lambda nbytes: show.progress(nbytes, "average", enabled=not quiet),
    )
    show_average.show_averaged(result, as_json=as_json, quiet=quiet)


app.command(cls=_Command)(cli_study.study)


def run() -> None:
    """Run the command line and end the process with its exit code."""
    app(prog_name="noisytune", args=sys.argv[1:])
