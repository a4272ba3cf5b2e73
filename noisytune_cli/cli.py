"""The command line: the only file that knows Typer.

A command here turns options into records, calls the function of its name in `commands/`, and hands what
comes back to `show.py`. Everything heavy is imported inside the commands, so `--help` stays quick. Errors
are caught in one place (`_Commands.invoke`), which serves the terminal and the test runner alike.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from noisytune_cli import __version__, distributions
from noisytune_cli.errors import NoisytuneError, ResourceExhausted, UsageError


class _Commands(TyperGroup):
    """Runs a command and maps what it raises to a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.params.get("debug", False)
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if debug:
                raise
            raise typer.BadParameter(error.line()) from error
        except NoisytuneError as error:
            if debug:
                raise
            from noisytune_cli import show

            show.error(error)
            raise typer.Exit(error.exit_code) from error
        except MemoryError as error:
            if debug:
                raise
            from noisytune_cli import show

            show.error(
                ResourceExhausted(
                    "out of memory",
                    why="the process may not have more",
                    next_step="Raise the limit (ulimit -v), or use fewer --threads",
                )
            )
            raise typer.Exit(ResourceExhausted.exit_code) from error


app = typer.Typer(
    name="noisytune",
    cls=_Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: The choices are the file names in `distributions/`.
_Noise = Enum("_Noise", {name: name for name in distributions.names()}, type=str)  # type: ignore[misc]


class _Scope(str, Enum):
    matrix = "matrix"
    global_ = "global"


class _Format(str, Enum):
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


_Source = Annotated[
    str,
    typer.Argument(
        help="A .safetensors file, a checkpoint's folder, or a hub id (NAME or OWNER/NAME).",
        show_default=False,
    ),
]
_Patterns = list[str] | None
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


def _show_version(wanted: bool) -> None:
    if wanted:
        from noisytune_cli import show

        show.write_out(f"noisytune {__version__}\n")
        raise typer.Exit


@app.callback()
def noisytune(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for every error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Add a little reproducible noise to a pretrained checkpoint before finetuning it (NoisyTune, ACL 2022)."""


@app.command()
def perturb(
    source: _Source,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="OUT", help="Where to write: a folder, or a file where SOURCE is a file."
        ),
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(
            "--lambda", metavar="λ", help="Width of the noise in units of each matrix's std. [default: 0.15]"
        ),
    ] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(metavar="S", help="Strength as the noise's own std in units of std(W): λ = √12 · S."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, metavar="N", help="Seed, 0 to 2^64-1.")] = 0,
    noise: Annotated[_Noise, typer.Option(help="Distribution of the noise.")] = _Noise("uniform"),
    scope: Annotated[
        _Scope, typer.Option(help="One std for each matrix, or one for all perturbed tensors together.")
    ] = _Scope.matrix,
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
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Settings by name: xtreme (λ 0.1, @embeddings excluded)."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:N, mps.")
    ] = "cpu",
    threads: _Threads = None,
    mmap: _Mmap = False,
    weights: _Weights = None,
    revision: _Revision = None,
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
    """
    from noisytune_cli import show
    from noisytune_cli.commands import perturb as command
    from noisytune_cli.options import make_noise

    request = command.Request(
        source=source,
        noise=make_noise(
            lam=lam,
            noise_std=noise_std,
            seed=seed,
            distribution=noise.value,
            scope=scope.value,
            include=include or (),
            exclude=exclude or (),
            rules=lambda_for or (),
            preset=preset,
        ),
        weights=weights,
        revision=revision,
        mmap=mmap,
        again=again,
        quiet=quiet,
    )
    if dry_run:
        show.planned(command.plan_perturb(request), as_json=as_json)
        return
    if out is None:
        raise UsageError(
            "--out is missing", why="there is nowhere to write to", next_step="Give -o OUT, or --dry-run"
        )
    result = command.perturb(
        request,
        out,
        overwrite=overwrite,
        device=device,
        threads=threads,
        progress=lambda nbytes: show.progress(nbytes, "perturb", enabled=not quiet),
    )
    show.perturbed(result, as_json=as_json, quiet=quiet)


def run() -> None:
    """Run the command line and end the process with its exit code."""
    app(prog_name="noisytune", args=sys.argv[1:])
