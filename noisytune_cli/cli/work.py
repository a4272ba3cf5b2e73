"""`noisytune work`, which does shares of a job."""

from __future__ import annotations

from typing import Annotated

import typer

from noisytune_cli.cli.help import RUNNING
from noisytune_cli.cli.options import Device, Direct, JobOut, Mmap, Quiet, Threads


def work(
    out: JobOut,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="K/N|env",
            help="Every N-th share from the K-th on; env: as the variables of Slurm, Kubernetes or AWS Batch "
            "say. [default: all that are left]",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    direct: Direct = None,
    mmap: Mmap = False,
    quiet: Quiet = False,
) -> None:
    """Do shares of a job: read their weight files, write them with noise, leave receipts.

    What is done already is passed over, so the same command can be given again, and by several at once. With
    --scope global the first round leaves sums; give the command again once all are there.

    Examples:
      noisytune plan ./llama -o ./llama-noisy
      noisytune work ./llama-noisy --share 1/2
      noisytune work ./llama-noisy
    """
    import os

    from noisytune_cli.cli import show
    from noisytune_cli.cli.shares import read_share
    from noisytune_cli.commands import work as command

    done = command.work(
        out,
        read_share(share, os.environ),
        device=device,
        threads=threads,
        direct=direct,
        mmap=mmap,
        progress=lambda nbytes: show.progress(nbytes, "work"),
    )
    show.warn_all(done.warnings)
    if done.waits_for:
        what = f"summed up {done.done} of {done.shares} shares; noise follows once all sums are there, "
        what += f"of which {len(done.waits_for)} are still to come"
    else:
        what = f"did {done.done} of {done.shares} shares, the others were done"
        if done.done == done.shares:
            what = f"did {done.done} of {done.shares} shares"
    show.note(what)
