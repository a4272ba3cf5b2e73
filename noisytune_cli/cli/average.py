"""The options of `noisytune average`: the mean of several checkpoints' weights."""

from __future__ import annotations

from typing import Annotated

import typer

from noisytune_cli.cli.options import AsJson, FollowLinks, Mmap, Overwrite, Quiet, Threads


def average(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
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
    threads: Threads = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the mean of several checkpoints' weights (a model soup), and a manifest of what was done.

    The mean is taken in float64, in the order of the sources, and rounded once to the stored dtype. The
    output has the first SOURCE's format, layout and other files; tensors that are not floats are its own.
    """
    from noisytune_cli.cli import show, show_average
    from noisytune_cli.cli.parse import check_out, numbers
    from noisytune_cli.commands import average as command

    check_out(out)
    result = command.average(
        sources,
        out,
        coefficients=() if coefficients is None else numbers("--coefficients", coefficients),
        overwrite=overwrite,
        threads=threads,
        mmap=mmap,
        quiet=quiet,
        follow_links=follow_links,
        progress=lambda nbytes: show.progress(nbytes, "average", enabled=not quiet),
    )
    show_average.show_averaged(result, as_json=as_json, quiet=quiet)
