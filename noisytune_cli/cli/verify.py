"""The options of `noisytune verify` and `noisytune replay`: what a manifest is checked and rebuilt by."""

from __future__ import annotations

from typing import Annotated

import typer

from noisytune_cli.cli.options import AsJson, Device, FollowLinks, Mmap, Overwrite, Quiet, Threads


def verify(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="The folder or file that perturb, replay or average wrote, or its manifest.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Also make every tensor again from this, and compare."),
    ] = None,
    threads: Threads = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")] = False,
    quiet: Quiet = False,
) -> None:
    """Check an output against its manifest: every byte of it, and with --base where it came from.

    Exit code 8 and the names of the first tensors and files that do not match, 0 if all do.
    """
    from noisytune_cli.cli import show, show_verify
    from noisytune_cli.commands import verify as command

    result = command.verify(
        out,
        base=base,
        threads=threads,
        mmap=mmap,
        quiet=quiet,
        follow_links=follow_links,
        progress=lambda nbytes: show.progress(nbytes, "verify", enabled=not quiet),
    )
    show_verify.show_verified(result, as_json=as_json, quiet=quiet)


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
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The checkpoint that was perturbed. [default: the hub id and commit in the manifest]",
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild a noisy checkpoint exactly, from its manifest and the checkpoint it was made from.

    Nothing is published unless every byte is as the manifest says; a base that differs is exit code 8.
    """
    from noisytune_cli.cli import show, show_verify
    from noisytune_cli.cli.parse import check_out
    from noisytune_cli.commands import replay as command

    check_out(out)
    result = command.replay(
        manifest,
        out,
        base=base,
        overwrite=overwrite,
        device=device,
        threads=threads,
        mmap=mmap,
        quiet=quiet,
        follow_links=follow_links,
        progress=lambda nbytes: show.progress(nbytes, "replay", enabled=not quiet),
    )
    show_verify.show_replayed(result, as_json=as_json, quiet=quiet)
