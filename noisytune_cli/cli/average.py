"""`noisytune average`, the mean of several checkpoints' weights: its options, and what it tells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from noisytune_cli.cli.help import OUTPUT, SOURCE
from noisytune_cli.cli.options import (
    AsJson,
    Card,
    Direct,
    FollowLinks,
    Mmap,
    Overwrite,
    OverwriteChanged,
    Quiet,
    Threads,
)

if TYPE_CHECKING:
    from noisytune_cli.commands.average import Averaged


def average(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Two or more checkpoints of one model: files, folders, hub ids or addresses (s3://…).",
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
            rich_help_panel=OUTPUT,
        ),
    ],
    coefficients: Annotated[
        str | None,
        typer.Option(
            metavar="C,C,…",
            help="How much each SOURCE counts, in their order; only ratios matter. [default: all alike]",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    ignore_config: Annotated[
        bool,
        typer.Option(
            "--ignore-config",
            help="Average though the members' config.json differs: the first's is kept.",
            rich_help_panel=SOURCE,
        ),
    ] = False,
    average_statistics: Annotated[
        bool,
        typer.Option(
            "--average-statistics",
            help="Average a batch norm's running statistics too, to be estimated again on data.",
            rich_help_panel=SOURCE,
        ),
    ] = False,
    card: Card = False,
    threads: Threads = None,
    direct: Direct = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    overwrite: Overwrite = False,
    overwrite_changed: OverwriteChanged = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the mean of several checkpoints' weights (a model soup), and a manifest of what was done.

    Each value is the one nearest to the exact mean, whatever the order of the sources. The output has the
    first SOURCE's format, layout and other files; tensors that are not floats are its own.

    Examples:
      noisytune average ./run-s0 ./run-s1 ./run-s2 -o ./soup
      noisytune average ./run-s0 ./run-s1 --coefficients 3,1 -o ./soup-3-1
    """
    from noisytune_cli.cli import show
    from noisytune_cli.cli.parse import check_out, numbers
    from noisytune_cli.commands import average as command

    check_out(out)
    result = command.average(
        sources,
        out,
        coefficients=() if coefficients is None else numbers("--coefficients", coefficients),
        ignore_config=ignore_config,
        average_statistics=average_statistics,
        card=card,
        overwrite=overwrite,
        overwrite_changed=overwrite_changed,
        threads=threads,
        direct=direct,
        mmap=mmap,
        follow_links=follow_links,
        progress=lambda nbytes: show.progress(nbytes, "average"),
    )
    _show(result, as_json=as_json)


def _show(result: Averaged, *, as_json: bool) -> None:
    """Print the summary: one line on stderr, or with `as_json` a document on stdout."""
    from noisytune_cli.cli.show import note, note_left_out, size_of, warn_all, write_out
    from noisytune_cli.manifest.write import left_out_json

    warn_all(result.warnings, result.cleared)
    manifest = result.manifest
    averaged = sum(done.action == "average" for done in manifest.tensors)
    nbytes = sum(file.size for file in manifest.members[0][1].files)
    if as_json:
        document = {
            "output": str(result.output),
            "manifest": str(result.manifest_path),
            "members": [
                {"id": source.id, "revision": source.revision, "coefficient": coefficient}
                for coefficient, source in manifest.members
            ],
            "tensors": len(manifest.tensors),
            "averaged": averaged,
            "bytes": nbytes,
            "left_out": left_out_json(manifest.left_out),
            "warnings": list(result.warnings),
        }
        write_out(json.dumps(document, indent=1) + "\n", [result.output])
    note(
        f"averaged {averaged} of {len(manifest.tensors)} tensors of {len(manifest.members)} checkpoints "
        f"-> {result.output}: {size_of(nbytes)}"
    )
    note_left_out(manifest.left_out)
