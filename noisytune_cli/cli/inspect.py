"""The options of `noisytune inspect`: a checkpoint's tensors and what would be done with them."""

# Annotations are no strings here: Typer would compile and evaluate each of them four times.

from typing import Annotated

import typer

from noisytune_cli.cli.help import NOISE, OUTPUT, RUNNING, TENSORS
from noisytune_cli.cli.options import (
    AsJson,
    BuffersFrom,
    Components,
    FollowLinks,
    Format,
    Granularity,
    GranularityOption,
    Mmap,
    Patterns,
    Quiet,
    Raw,
    Report,
    Revision,
    Sources,
    Splits,
    Threads,
    Weights,
    number,
)


def inspect(
    sources: Sources,
    output_format: Format = None,
    as_json: AsJson = False,
    out: Report = None,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.png|svg|pdf",
            help="Draw the std by layer and kind, or the histogram (extra: plots).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    histogram: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Show only how the values of this tensor are spread.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    include: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN", help="List only these: a shell pattern or a kind.", rich_help_panel=TENSORS
        ),
    ] = None,
    exclude: Annotated[
        Patterns, typer.Option(metavar="PATTERN", help="Do not list these.", rich_help_panel=TENSORS)
    ] = None,
    granularity: GranularityOption = Granularity.tensor,
    split: Splits = None,
    sort: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="Sort by a column of the CSV, such as std; with - before it descending. By name layer 2 "
            "comes before layer 10.",
            rich_help_panel=OUTPUT,
        ),
    ] = "name",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="List only the first N; the totals count all.", rich_help_panel=OUTPUT
        ),
    ] = None,
    percentiles: Annotated[
        str | None,
        typer.Option(
            metavar="P,…",
            help="These percentiles of each tensor too, such as 1,50,99, exact; the weights are read again.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(
            "--lambda",
            metavar="λ",
            help="The λ whose noise ranges are shown. [default: 0.15]",
            parser=number,
            rich_help_panel=NOISE,
        ),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            metavar="σ",
            help="Show the noise of this std in place of λ's: Gaussian.",
            parser=number,
            rich_help_panel=NOISE,
        ),
    ] = None,
    headers_only: Annotated[
        bool,
        typer.Option(
            "--headers-only", help="Read no weights: names, shapes and the plan.", rich_help_panel=RUNNING
        ),
    ] = False,
    raw: Raw = False,
    buffers_from: BuffersFrom = "auto",
    threads: Threads = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    weights: Weights = None,
    component: Components = None,
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """List a checkpoint's tensors with their statistics, and what perturb would do with each.

    The statistics cover all elements: mean, std (unbiased), min, max, L1 and L2 norm, the share of zeros,
    and counts of NaN and Inf. No model is loaded. The totals are at the end: of jsonl in a line
    {"totals": …}, which has no other key; csv has none.

    Of several checkpoints each has its table, and in json, jsonl and csv every row says the id of its own.

    Examples:
      noisytune inspect ./bert --include '*layer.0.*'
      noisytune inspect ./bert --sort -std --limit 10
      noisytune inspect ./bert ./bert-noisy --percentiles 1,50,99
      noisytune inspect ./llama --granularity matrix --headers-only
      noisytune inspect ./bert --format csv > bert.csv
    """
    from noisytune_cli.cli import show, show_inspect
    from noisytune_cli.cli.parse import (
        DEFAULT_LAMBDA,
        check_reads_values,
        check_report,
        choose_strength,
        format_of,
        numbers,
        parse_split,
        read_components,
        refuse_given,
    )
    from noisytune_cli.commands import inspect as command
    from noisytune_cli.engine.threads import default_threads
    from noisytune_cli.output.reports import check_new

    kind = format_of(None if output_format is None else output_format.value, out, as_json=as_json)
    choose_strength({"--lambda": lam, "--sigma": sigma})
    single = {"--format html": kind == "html", "--plot": plot, "--histogram": histogram}
    if len(sources) > 1:
        refuse_given(
            single,
            f"{len(sources)} checkpoints",
            "it shows one",
            "Run once for each, or set two side by side with noisytune compare",
        )
    check_reads_values(headers_only, {"--percentiles": percentiles, "--histogram": histogram, "--plot": plot})
    if out is not None:
        check_report(out)
        check_new(out)
    if plot is not None:
        from noisytune_cli.cli import plots

        plots.check(plot)
    components = read_components(component)
    if histogram is not None:
        table = {
            "--include": include,
            "--exclude": exclude,
            "--split": split,
            "--sort": sort != "name",
            "--limit": limit,
            "--percentiles": percentiles,
            "--raw": raw,
        }
        refuse_given(
            table,
            "--histogram",
            "it is of the table of all tensors, and the histogram is of one",
            "Leave one of them out",
        )
        from noisytune_cli.cli import show_histogram
        from noisytune_cli.commands import histogram as counting

        show_histogram.check_format(kind)
        counted = counting.histogram(
            sources[0],
            histogram,
            weights=weights,
            components=components,
            revision=revision,
            mmap=mmap,
            follow_links=follow_links,
        )
        show_histogram.show_histogram(counted, kind, out=out, plot=plot)
        return
    percents = numbers("--percentiles", percentiles, 0.0, 100.0) if percentiles is not None else ()
    results = [
        command.inspect(
            source,
            lam=DEFAULT_LAMBDA if lam is None else lam,
            sigma=sigma,
            include=include or (),
            exclude=exclude or (),
            granularity=granularity.value,
            splits=[parse_split(text) for text in split or ()],
            sort=sort,
            limit=limit,
            percentiles=percents,
            headers_only=headers_only,
            buffers_from=buffers_from,
            weights=weights,
            components=components,
            revision=revision,
            mmap=mmap,
            threads=threads or default_threads(),
            follow_links=follow_links,
            progress=lambda nbytes: show.progress(nbytes, "inspect"),
        )
        for source in sources
    ]
    show_inspect.show_inspections(results, kind, out=out, plot=plot, raw=raw)
