"""`noisytune replay`, which rebuilds an output: its options, and what it tells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from noisytune_cli.cli.help import OUTPUT, SOURCE
from noisytune_cli.cli.options import (
    AsJson,
    Device,
    Direct,
    FollowLinks,
    Mmap,
    Overwrite,
    OverwriteChanged,
    Quiet,
    Threads,
)

if TYPE_CHECKING:
    from noisytune_cli.commands.replay import Replayed


def replay(
    manifest: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST",
            help="The manifest of what is to be rebuilt, or the output that it is in or beside.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Where to write: a folder, or a file where the base is a file.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The checkpoint that was perturbed. [default: the hub id and commit in the manifest]",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    direct: Direct = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    overwrite: Overwrite = False,
    overwrite_changed: OverwriteChanged = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild a noisy checkpoint exactly, from its manifest and the checkpoint it was made from.

    Nothing is published unless every byte is as the manifest says; a base that differs is exit code 8.

    Examples:
      noisytune replay noisytune.json --base bert-base-uncased -o ./bert-noisy
      noisytune replay noisytune.json -o ./bert-again
    """
    from noisytune_cli.cli import show
    from noisytune_cli.cli.parse import check_out
    from noisytune_cli.commands import replay as command

    check_out(out)
    result = command.replay(
        manifest,
        out,
        base=base,
        overwrite=overwrite,
        overwrite_changed=overwrite_changed,
        device=device,
        threads=threads,
        direct=direct,
        mmap=mmap,
        follow_links=follow_links,
        progress=lambda nbytes: show.progress(nbytes, "replay"),
    )
    _show_replayed(result, as_json=as_json)


def _show_replayed(result: Replayed, *, as_json: bool) -> None:
    """Say what was written: one line on stderr, or with `as_json` a document on stdout."""
    from noisytune_cli.cli.show import note, warn_all, write_out

    warn_all(result.warnings, result.cleared)
    source, tensors = result.manifest.source, len(result.manifest.receipts)
    if as_json:
        document = {
            "output": str(result.output),
            "manifest": str(result.manifest_path),
            "source": {"id": source.id, "revision": source.revision},
            "tensors": tensors,
        }
        write_out(json.dumps(document, indent=1) + "\n", [result.output])
    note(f"rebuilt {tensors} tensors exactly as recorded: {result.output}")
