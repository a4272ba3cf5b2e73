"""The options of `noisytune compare`: what lies between two checkpoints."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from noisytune_cli.cli.help import NOISE, OUTPUT, RUNNING, SOURCE, TENSORS
from noisytune_cli.cli.options import (
    AsJson,
    Components,
    FollowLinks,
    Format,
    Maps,
    Mmap,
    Patterns,
    Quiet,
    Raw,
    Report,
    Threads,
    number,
)


class _By(StrEnum):
    tensor = "tensor"
    layer = "layer"
    kind = "kind"


def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A weight file, a folder, a hub id, or an address (s3://…).", show_default=False
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, of what A became.", show_default=False)],
    by: Annotated[
        _By,
        typer.Option(
            help="What has a row.",
            rich_help_panel=OUTPUT,
        ),
    ] = _By.tensor,
    output_format: Format = None,
    out: Report = None,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.png|svg|pdf",
            help="Draw the change by layer and kind (extra: plots).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    name_map: Maps = None,
    include: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN", help="Compare only these: a shell pattern or a kind.", rich_help_panel=TENSORS
        ),
    ] = None,
    exclude: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN",
            help="Do not compare these.",
            rich_help_panel=TENSORS,
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="Sort by a column of the CSV, such as l2; with - before it descending. By name layer 2 "
            "comes before layer 10; kinds have an order of their own.",
            rich_help_panel=OUTPUT,
        ),
    ] = "name",
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="The largest change of a value that counts as none.",
            parser=number,
            rich_help_panel=RUNNING,
        ),
    ] = 0.0,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code",
            help="Exit code 8 where anything differs.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    headers_only: Annotated[
        bool,
        typer.Option(
            "--headers-only", help="Read no weights: names, shapes and dtypes.", rich_help_panel=RUNNING
        ),
    ] = False,
    seed: Annotated[
        str | None,
        typer.Option(
            metavar="N[-M][,…]",
            help="Tell whether the change is the noise of one of these seeds.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The same of the seed in a manifest (or the output it lies with), which has the names too.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    raw: Raw = False,
    weights_a: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The weights or index in A, where there are several.", rich_help_panel=SOURCE
        ),
    ] = None,
    weights_b: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The same in B.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    component: Components = None,
    revision_a: Annotated[
        str | None,
        typer.Option(
            metavar="REV", help="Branch, tag or commit, where A is a hub id.", rich_help_panel=SOURCE
        ),
    ] = None,
    revision_b: Annotated[
        str | None,
        typer.Option(
            metavar="REV",
            help="The same for B.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    threads: Threads = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tell what lies between two checkpoints, such as a base and what noise or finetuning made of it.

    For each tensor, layer or kind: norm_change, by which share the L1 norm changed, and change_norm, the L1
    norm of the change as a share of A's (what moves to and fro changes no norm); l2 and largest of the
    change; cosine; the share of equal elements; and where the change of a tensor looks like uniform or
    Gaussian noise, its λ with an interval of 95 %. Tensors without a partner, or with one of another shape,
    are listed. Formats, shards and dtypes may differ.

    Examples:
      noisytune compare ./bert ./bert-noisy --by kind
      noisytune compare ./bert ./bert-finetuned --by layer -o change.html
      noisytune compare ./bert ./suspect --seed 0-99
      noisytune compare a.safetensors b.safetensors --exit-code --format csv
    """
    from noisytune_cli.cli import show, show_compare
    from noisytune_cli.cli.parse import (
        check_reads_values,
        check_report,
        format_of,
        parse_map,
        read_components,
        read_seeds,
    )
    from noisytune_cli.commands import compare as command
    from noisytune_cli.engine.threads import default_threads
    from noisytune_cli.output.reports import check_new

    kind = format_of(None if output_format is None else output_format.value, out, as_json=as_json)
    if out is not None:
        check_report(out)
        check_new(out)
    if plot is not None:
        check_reads_values(headers_only, {"--plot": plot})
        from noisytune_cli.cli import plots

        plots.check(plot)
    result = command.compare(
        a,
        b,
        by=by.value,
        maps=[parse_map(text) for text in name_map or ()],
        include=include or (),
        exclude=exclude or (),
        sort=sort,
        tolerance=tolerance,
        headers_only=headers_only,
        seeds=read_seeds(seed) if seed is not None else (),
        manifest=manifest,
        weights=(weights_a, weights_b),
        components=read_components(component),
        revisions=(revision_a, revision_b),
        mmap=mmap,
        threads=threads or default_threads(),
        follow_links=follow_links,
        progress=lambda nbytes: show.progress(nbytes, "compare"),
    )
    show_compare.show_comparison(result, kind, out=out, plot=plot, raw=raw)
    if exit_code:
        show_compare.require_same(result)
