"""`noisytune finish`, which publishes the outputs of a job."""

from __future__ import annotations

import time

from noisytune_cli.cli.options import AsJson, JobOut, Quiet, Threads


def finish(out: JobOut, threads: Threads = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Put the shares of a job together and publish the output, as noisytune perturb would have.

    Shares that are missing are named, and are exit code 4. What stops it loses nothing: the same command goes
    on.

    Examples:
      noisytune plan ./llama -o ./llama-noisy
      noisytune work ./llama-noisy
      noisytune finish ./llama-noisy
    """
    from noisytune_cli.cli import show, show_perturb
    from noisytune_cli.commands import finish as command

    started = time.monotonic()
    made = command.finish(
        out,
        threads=threads,
        progress=lambda nbytes: show.progress(nbytes, "check"),
    )
    show_perturb.show_perturbed(made, as_json=as_json, seconds=time.monotonic() - started)
